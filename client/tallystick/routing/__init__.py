"""Which nodes carry a session: what they are known to deliver, the best route over them, and when to leave it."""

"""How this node is reached: its TLS keys, its Reach record, and others who dial it before it is announced."""

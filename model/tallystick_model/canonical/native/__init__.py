"""What canonical execution computes in machine code of its own, by rules that decide every bit on every processor."""

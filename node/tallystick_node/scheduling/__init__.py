"""Which rows go into the next forward of the span, and the one thread that computes them."""

"""Benchmarks: ratios within one run, printed, never asserted. `scripts/bench` runs them."""

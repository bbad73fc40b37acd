"""Canonical execution: a row has the same bits, however it was cut, packed or threaded (docs/numerics.md)."""

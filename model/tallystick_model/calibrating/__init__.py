"""Measuring how far apart nodes of different classes are on one model: honest ones, and cheaters."""

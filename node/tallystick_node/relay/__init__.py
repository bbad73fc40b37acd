"""Relaying: letting nodes be reached that can only dial out, and being reached through those who do."""

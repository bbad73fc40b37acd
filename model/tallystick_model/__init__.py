"""Spans of a model: cut a checkpoint into pieces, load a span of layers, run it canonically, measure its class."""

"""Speculation: tokens drafted here, verified by the route in one pass (docs/sessions.md)."""

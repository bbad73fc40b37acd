"""Sketches of rows: how nodes whose bits differ are compared (docs/verification.md, "Across classes")."""

"""`tallystick calibrate`: a model with thresholds of its own (docs/publishing.md)."""

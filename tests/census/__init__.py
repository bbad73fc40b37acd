"""The census of text model types: tiny configs, the exam that each one takes, and the workers that run it."""

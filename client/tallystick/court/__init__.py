"""Going to Court as a client: evidence, accusations, cases."""

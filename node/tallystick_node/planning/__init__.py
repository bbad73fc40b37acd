"""Which span a node serves, and why."""

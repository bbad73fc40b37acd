"""Content by hash: ids, file DAGs, stores, and the ways to fetch and serve their blocks."""

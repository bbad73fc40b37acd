"""A session at its client: the hops of one route, opened, fed, watched, checked, paid, mended and closed."""

"""`make bench-scale`: what Exarq costs when it is idle, when its tables are full, and when it has run for long."""

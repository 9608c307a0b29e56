"""Redis, which may be wiped at any moment: keys and scripts."""

"""What helps to test actcache, and what extends it."""

"""The durable cache: packed segments on disk, found by prompt, read by mapping."""

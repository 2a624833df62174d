"""One forward pass into memory: hooks on, values out, hooks off."""

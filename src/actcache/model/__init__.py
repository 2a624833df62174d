"""What a model is made of: its parts, the names of its values, and where each is read."""

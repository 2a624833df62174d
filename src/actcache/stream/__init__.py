"""Streams of token vectors for training, out of what is stored."""

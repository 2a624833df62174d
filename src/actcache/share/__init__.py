"""Datasets of activations, on the Hugging Face Hub or in a folder."""

"""The shipped demo: a tiny trained language model and the table of facts it was trained on."""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """The folder of the shipped model: an ordinary ``save_pretrained`` folder, loaded like any other local model."""
    return Path(__file__).resolve().parent / "model"

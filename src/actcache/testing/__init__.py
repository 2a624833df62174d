"""What helps to test actcache, and what extends it: ``from actcache.testing import tiny_model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actcache.testing.tiny import tiny_model, tiny_tokenizer

__all__ = ["tiny_model", "tiny_tokenizer"]


def __getattr__(name: str) -> Any:
    # Importing transformers takes a second, and a Hub for tests needs none of it.
    if name in __all__:
        from actcache.testing import tiny

        return getattr(tiny, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

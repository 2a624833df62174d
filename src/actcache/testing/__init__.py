"""What helps to test actcache, and what extends it: ``from actcache.testing import tiny_model``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actcache.testing.backends import CacheBackendTests
    from actcache.testing.faults import Fault, FaultyBackend
    from actcache.testing.tiny import tiny_model, tiny_tokenizer

__all__ = ["CacheBackendTests", "Fault", "FaultyBackend", "tiny_model", "tiny_tokenizer"]

_MODULES = {"CacheBackendTests": "backends", "Fault": "faults", "FaultyBackend": "faults"}


def __getattr__(name: str) -> Any:
    # Importing transformers takes a second, and a Hub for tests needs none of it; nor is pytest there for everybody.
    if name in __all__:
        return getattr(import_module(f"actcache.testing.{_MODULES.get(name, 'tiny')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Capture language-model activations once, keep them safe, and read them back at memory speed.

    import actcache as ac

    vectors = ac.activations("gpt2", ["The Eiffel Tower is in", "Cats are"], layers=[3, 6])   # [2, 2, 768]

Names are loaded when first used, so that importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actcache import errors as errors
    from actcache._version import __version__ as __version__
    from actcache.capture.cache import ActivationCache as ActivationCache
    from actcache.capture.entry import Entry as Entry
    from actcache.capture.hooks import capture as capture
    from actcache.capture.hooks import run_with_cache as run_with_cache
    from actcache.errors import ActCacheError as ActCacheError
    from actcache.extract.extractor import ActivationExtractor as ActivationExtractor
    from actcache.extract.extractor import CachedExtractor as CachedExtractor
    from actcache.extract.plan import Plan as Plan
    from actcache.model.sites import Site as Site
    from actcache.model.sites import list_sites as sites
    from actcache.store.default import cache_info as cache_info
    from actcache.store.default import clear_cache as clear_cache
    from actcache.store.default import discover_cached as discover_cached
    from actcache.store.default import invalidate_extraction_cache as invalidate_extraction_cache
    from actcache.store.default import new_space as new_space
    from actcache.store.default import set_cache_backend as set_cache_backend
    from actcache.store.store import Store as Store
    from actcache.unified import UnifiedCache as UnifiedCache
    from actcache.unified import WarmupStats as WarmupStats
    from actcache.unified import activations as activations

# Public name -> (module, name there; "" for the module itself).
_PUBLIC: dict[str, tuple[str, str]] = {
    "__version__": ("_version", "__version__"),
    "errors": ("errors", ""),
    "ActCacheError": ("errors", "ActCacheError"),
    # One forward pass
    "capture": ("capture", ""),  # the room itself, which is callable: see there
    "run_with_cache": ("capture.hooks", "run_with_cache"),
    "ActivationCache": ("capture.cache", "ActivationCache"),
    "Entry": ("capture.entry", "Entry"),
    "Site": ("model.sites", "Site"),
    "sites": ("model.sites", "list_sites"),
    # Many prompts
    "activations": ("unified", "activations"),
    "ActivationExtractor": ("extract.extractor", "ActivationExtractor"),
    "CachedExtractor": ("extract.extractor", "CachedExtractor"),
    "UnifiedCache": ("unified", "UnifiedCache"),
    "WarmupStats": ("unified", "WarmupStats"),
    "Plan": ("extract.plan", "Plan"),
    # What is kept
    "Store": ("store.store", "Store"),
    "cache_info": ("store.default", "cache_info"),
    "clear_cache": ("store.default", "clear_cache"),
    "discover_cached": ("store.default", "discover_cached"),
    "invalidate_extraction_cache": ("store.default", "invalidate_extraction_cache"),
    "new_space": ("store.default", "new_space"),
    "set_cache_backend": ("store.default", "set_cache_backend"),
}

__all__ = [*_PUBLIC]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> object:
    try:
        module, attribute = _PUBLIC[name]
    except KeyError:
        from actcache.errors import did_you_mean

        raise AttributeError(f"module 'actcache' has no attribute {name!r}.{did_you_mean(name, _PUBLIC)}") from None
    loaded = import_module(f"{__name__}.{module}")
    value: object = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

"""Capture language-model activations once, keep them safe, and map them back into memory.

    import actcache as ac

    vectors = ac.activations("gpt2", ["The Eiffel Tower is in", "Cats are"], layers=[3, 6])   # [2, 2, 768]

Names are loaded when first used, so that importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

# Type checkers take this name for true; importing it from typing would be most of what this package's import costs.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from actcache import errors
    from actcache._version import __version__
    from actcache.capture import aggregate
    from actcache.capture.attention import AttentionBlocks
    from actcache.capture.attention_steering import steer_attention
    from actcache.capture.cache import ActivationCache
    from actcache.capture.edits import edit
    from actcache.capture.encoding import encode
    from actcache.capture.entry import Entry
    from actcache.capture.extract_batches import extract_batches
    from actcache.capture.hooks import capture, run_with_cache
    from actcache.capture.knockout import knockout
    from actcache.capture.lens import LogitLens
    from actcache.capture.notes import ValueWithInfo
    from actcache.capture.positions import tokens_of
    from actcache.capture.ready_made import ReadyMade, ablate, patch, steer
    from actcache.capture.residual import FullActivationCache
    from actcache.capture.saved import SavedCache
    from actcache.capture.texts import text_positions
    from actcache.config import enable_cache_logging, set_cache_dtype, set_cache_limit
    from actcache.derive.features import Features
    from actcache.distributed.warmup import warmup_distributed
    from actcache.errors import ActCacheError
    from actcache.extract.cached import CachedExtractor
    from actcache.extract.completions import Completion
    from actcache.extract.extractor import ActivationExtractor
    from actcache.extract.features import encode_store
    from actcache.extract.plan import Plan
    from actcache.extract.reading import CachedLogits
    from actcache.extract.stats import WarmupStats
    from actcache.model.sites import Site
    from actcache.model.sites import list_sites as sites
    from actcache.probing.difference import mean_difference
    from actcache.probing.probe import probe_by_layer
    from actcache.probing.report import ProbeReport
    from actcache.report import plot
    from actcache.selftest.report import SelftestReport
    from actcache.selftest.run import selftest
    from actcache.share.load import load_activation_dataset, load_activations
    from actcache.share.metadata import DatasetMetadata, fetch_dataset_metadata
    from actcache.share.migrate import migrate_dataset, upgrade_dataset_format
    from actcache.share.pull import pull_dataset
    from actcache.share.push import DEFAULT_SHARD_BYTES, push_dataset
    from actcache.store.backend import CacheBackend, LocalBackend, MemoryBackend
    from actcache.store.default import (
        cache_info,
        clear_cache,
        discover_cached,
        evict,
        invalidate_extraction_cache,
        set_cache_backend,
        verify_cache,
    )
    from actcache.store.discovered import CachedPromptInfo, CachedVariant
    from actcache.store.eviction import EvictionReport
    from actcache.store.importing import ImportReport, import_arrays
    from actcache.store.lmprobe import import_lmprobe
    from actcache.store.object_backend import ObjectBackend
    from actcache.store.reports import CacheInfo, ModelCacheInfo
    from actcache.store.spaces import SpaceInfo, new_space
    from actcache.store.statistics import SiteStatistics
    from actcache.store.store import Store
    from actcache.store.transformer_lens import import_transformer_lens
    from actcache.store.verification import VerifyReport
    from actcache.store.wrapped_backends import LoggingBackend
    from actcache.stream.batches import ActivationStream
    from actcache.stream.stream import stream_activations
    from actcache.stream.tokens import TokenBatch
    from actcache.unified import UnifiedCache, activations

# Public name -> (module, name there; "" for the module itself).
_PUBLIC: dict[str, tuple[str, str]] = {
    "__version__": ("_version", "__version__"),
    "errors": ("errors", ""),
    "plot": ("report.plot", ""),
    "ActCacheError": ("errors", "ActCacheError"),
    # One forward pass
    "capture": ("capture", ""),  # the room itself, which is callable: see there
    "run_with_cache": ("capture.hooks", "run_with_cache"),
    "AttentionBlocks": ("capture.attention", "AttentionBlocks"),
    "extract_batches": ("capture.extract_batches", "extract_batches"),
    "tokens_of": ("capture.positions", "tokens_of"),
    "text_positions": ("capture.texts", "text_positions"),
    "ActivationCache": ("capture.cache", "ActivationCache"),
    "Entry": ("capture.entry", "Entry"),
    "edit": ("capture.edits", "edit"),
    "encode": ("capture.encoding", "encode"),
    "ablate": ("capture.ready_made", "ablate"),
    "steer": ("capture.ready_made", "steer"),
    "knockout": ("capture.knockout", "knockout"),
    "steer_attention": ("capture.attention_steering", "steer_attention"),
    "patch": ("capture.ready_made", "patch"),
    "ReadyMade": ("capture.ready_made", "ReadyMade"),
    "FullActivationCache": ("capture.residual", "FullActivationCache"),
    "LogitLens": ("capture.lens", "LogitLens"),
    "SavedCache": ("capture.saved", "SavedCache"),
    "ValueWithInfo": ("capture.notes", "ValueWithInfo"),
    "aggregate": ("capture.aggregate", ""),
    "Site": ("model.sites", "Site"),
    "sites": ("model.sites", "list_sites"),
    # Many prompts
    "activations": ("unified", "activations"),
    "ActivationExtractor": ("extract.extractor", "ActivationExtractor"),
    "CachedExtractor": ("extract.cached", "CachedExtractor"),
    "UnifiedCache": ("unified", "UnifiedCache"),
    "WarmupStats": ("extract.stats", "WarmupStats"),
    "CachedLogits": ("extract.reading", "CachedLogits"),
    "Completion": ("extract.completions", "Completion"),
    "Plan": ("extract.plan", "Plan"),
    "encode_store": ("extract.features", "encode_store"),
    "Features": ("derive.features", "Features"),
    "mean_difference": ("probing.difference", "mean_difference"),
    "probe_by_layer": ("probing.probe", "probe_by_layer"),
    "ProbeReport": ("probing.report", "ProbeReport"),
    # Many machines
    "warmup_distributed": ("distributed.warmup", "warmup_distributed"),
    # Is it right here?
    "selftest": ("selftest", ""),  # as with capture
    "SelftestReport": ("selftest.report", "SelftestReport"),
    # For training
    "stream_activations": ("stream.stream", "stream_activations"),
    "ActivationStream": ("stream.batches", "ActivationStream"),
    "TokenBatch": ("stream.tokens", "TokenBatch"),
    # What is shared
    "DEFAULT_SHARD_BYTES": ("share.push", "DEFAULT_SHARD_BYTES"),
    "migrate_dataset": ("share.migrate", "migrate_dataset"),
    "push_dataset": ("share.push", "push_dataset"),
    "upgrade_dataset_format": ("share.migrate", "upgrade_dataset_format"),
    # What is kept
    "Store": ("store.store", "Store"),
    "CacheBackend": ("store.backend", "CacheBackend"),
    "LocalBackend": ("store.backend", "LocalBackend"),
    "MemoryBackend": ("store.backend", "MemoryBackend"),
    "ObjectBackend": ("store.object_backend", "ObjectBackend"),
    "LoggingBackend": ("store.wrapped_backends", "LoggingBackend"),
    "cache_info": ("store.default", "cache_info"),
    "CachedPromptInfo": ("store.discovered", "CachedPromptInfo"),
    "CachedVariant": ("store.discovered", "CachedVariant"),
    "CacheInfo": ("store.reports", "CacheInfo"),
    "ModelCacheInfo": ("store.reports", "ModelCacheInfo"),
    "EvictionReport": ("store.eviction", "EvictionReport"),
    "SiteStatistics": ("store.statistics", "SiteStatistics"),
    "SpaceInfo": ("store.spaces", "SpaceInfo"),
    "VerifyReport": ("store.verification", "VerifyReport"),
    "clear_cache": ("store.default", "clear_cache"),
    "evict": ("store.default", "evict"),
    "verify_cache": ("store.default", "verify_cache"),
    "discover_cached": ("store.default", "discover_cached"),
    "ImportReport": ("store.importing", "ImportReport"),
    "import_arrays": ("store.importing", "import_arrays"),
    "import_lmprobe": ("store.lmprobe", "import_lmprobe"),
    "import_transformer_lens": ("store.transformer_lens", "import_transformer_lens"),
    "invalidate_extraction_cache": ("store.default", "invalidate_extraction_cache"),
    # Datasets
    "DatasetMetadata": ("share.metadata", "DatasetMetadata"),
    "fetch_dataset_metadata": ("share.metadata", "fetch_dataset_metadata"),
    "load_activation_dataset": ("share.load", "load_activation_dataset"),
    "load_activations": ("share.load", "load_activations"),
    "pull_dataset": ("share.pull", "pull_dataset"),
    "new_space": ("store.spaces", "new_space"),
    "set_cache_backend": ("store.default", "set_cache_backend"),
    "set_cache_dtype": ("config", "set_cache_dtype"),
    "set_cache_limit": ("config", "set_cache_limit"),
    "enable_cache_logging": ("config", "enable_cache_logging"),
}

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "ActCacheError",
    "ActivationCache",
    "ActivationExtractor",
    "ActivationStream",
    "AttentionBlocks",
    "CacheBackend",
    "CacheInfo",
    "CachedExtractor",
    "CachedLogits",
    "CachedPromptInfo",
    "CachedVariant",
    "Completion",
    "DatasetMetadata",
    "Entry",
    "EvictionReport",
    "Features",
    "FullActivationCache",
    "ImportReport",
    "LocalBackend",
    "LoggingBackend",
    "LogitLens",
    "MemoryBackend",
    "ModelCacheInfo",
    "ObjectBackend",
    "Plan",
    "ProbeReport",
    "ReadyMade",
    "SavedCache",
    "SelftestReport",
    "Site",
    "SiteStatistics",
    "SpaceInfo",
    "Store",
    "TokenBatch",
    "UnifiedCache",
    "ValueWithInfo",
    "VerifyReport",
    "WarmupStats",
    "__version__",
    "ablate",
    "activations",
    "aggregate",
    "cache_info",
    "capture",
    "clear_cache",
    "discover_cached",
    "edit",
    "enable_cache_logging",
    "encode",
    "encode_store",
    "errors",
    "evict",
    "extract_batches",
    "fetch_dataset_metadata",
    "import_arrays",
    "import_lmprobe",
    "import_transformer_lens",
    "invalidate_extraction_cache",
    "knockout",
    "load_activation_dataset",
    "load_activations",
    "mean_difference",
    "migrate_dataset",
    "new_space",
    "patch",
    "plot",
    "probe_by_layer",
    "pull_dataset",
    "push_dataset",
    "run_with_cache",
    "selftest",
    "set_cache_backend",
    "set_cache_dtype",
    "set_cache_limit",
    "sites",
    "steer",
    "steer_attention",
    "stream_activations",
    "text_positions",
    "tokens_of",
    "upgrade_dataset_format",
    "verify_cache",
    "warmup_distributed",
]


def __getattr__(name: str) -> object:
    try:
        module, attribute = _PUBLIC[name]
    except KeyError:
        from actcache.errors import did_you_mean

        raise AttributeError(f"module 'actcache' has no attribute {name!r}.{did_you_mean(name, _PUBLIC)}") from None
    from importlib import import_module

    loaded = import_module(f"{__name__}.{module}")
    value: object = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

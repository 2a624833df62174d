"""The process's default store, and the functions that act on it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.config import Setting, overruled_location, store_location
from actcache.errors import AmbiguousVariantError, OptionError
from actcache.store.backend import CacheBackend
from actcache.store.discovered import agreeing, listed, none_of_that_name
from actcache.store.files import log
from actcache.store.locations import named_place
from actcache.store.store import Store
from actcache.store.variants import variant_names

if TYPE_CHECKING:
    from actcache.store.store import CachedPromptInfo, CacheInfo, EvictionReport, SpaceInfo, VerifyReport

_lock = threading.Lock()
_chosen: Store | None = None
_environment: tuple[str | Path, Store] | None = None


def default_store() -> Store:
    """The store that is used where none is given: the one chosen last, else the one the environment names.

    A change of ``ACTCACHE_BACKEND`` or ``ACTCACHE_DIR`` takes effect at the next call.
    """
    global _environment
    with _lock:
        if _chosen is not None:
            return _chosen
        location = _named_by_environment().value
        if _environment is None or _environment[0] != location:
            if overruled := overruled_location():
                log.warning("%s", overruled)
            _environment = location, Store(location)
            _environment[1].is_default = True
        return _environment[1]


def default_location() -> Setting:
    """Where the default store is, and what says so."""
    with _lock:
        return _named_by_environment() if _chosen is None else Setting(_chosen.location, "set_cache_backend()")


def _named_by_environment() -> Setting:
    setting = store_location()
    return Setting(named_place(setting.value, setting.source), setting.source)


def store_at(location: str | Path | CacheBackend | Store | None) -> Store:
    """A store as callers name it: a folder, a URL, a `CacheBackend`, a `Store`, or None for the default one, which its
    folder or URL names, too.

    Raises:
        OptionError: none of these, or a URL of an unknown kind.
        StoreAccessError: the folder cannot be made or read.
    """
    if location is None:
        return default_store()
    if isinstance(location, Store):
        return location
    if isinstance(location, CacheBackend):
        return Store(location)
    if isinstance(location, str | Path):
        place = named_place(location, "store")
        return default_store() if _is_default(place) else Store(place)
    raise OptionError(
        f"store is a {type(location).__name__}: expected a folder, a URL, a CacheBackend, a Store, or None for the "
        "default."
    )


def _is_default(place: str | Path) -> bool:
    with contextlib.suppress(OptionError):
        default = default_location().value
        if isinstance(place, str) or isinstance(default, str):
            return bool(place == default)
        return bool(os.path.realpath(place) == os.path.realpath(default))
    # Where the environment names no place, one that is named here is none of its business.
    return False


def set_cache_backend(backend: str | Path | CacheBackend | Store | None = None) -> None:
    """Choose the default store of this process: a folder, the URL of what lies elsewhere ("s3://bucket/prefix",
    "gs://...", "az://..."), a `CacheBackend`, a `Store`, or None for what the environment says.

    `set_cache_limit`, `set_cache_dtype`, ``ACTCACHE_MAX_GB`` and ``ACTCACHE_DTYPE`` are for it, unless it is a `Store`
    with a limit or a dtype of its own.

    Raises:
        OptionError: none of these, or a URL of an unknown kind.
        MissingExtraError: a URL, and the extra ``actcache[s3]`` is not installed.
    """
    global _chosen
    chosen = None if backend is None else store_at(backend)
    with _lock:
        if _chosen is not None:
            _chosen.is_default = _environment is not None and _chosen is _environment[1]
        _chosen = chosen
        if chosen is not None:
            chosen.is_default = True


def cache_info(model: str | Path | None = None) -> CacheInfo:
    """What the default store holds: folder, sizes, and one `ModelCacheInfo` per model variant.

    With `model`, only that model's variants (none of them stored: an empty list).
    """
    info = default_store().info()
    return info if model is None else only_model(info, model_label(model))


def only_model(info: CacheInfo, name: str) -> CacheInfo:
    """The part of a report that is about one model; sizes are of that part."""
    models = [m for m in info.models if m.model_name == name]
    return dataclasses.replace(info, models=models, total_size_bytes=sum(m.size_bytes for m in models))


def discover_cached(
    model_name: str | Path,
    prompt: Any,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    space: str | None = None,
) -> CachedPromptInfo | None:
    """What the default store holds for one prompt of a model, without loading the model; None when nothing.

    `prompt` is text, token ids or chat messages. Of several variants the newest of the model as it is is described, the
    others are listed (`CachedPromptInfo.variants`, each a `CachedVariant`); what was computed with edits is never taken
    for the model's own. `revision`, `dtype` and `space` choose among them.

    Raises:
        NotCachedError: something is stored of the model, but no variant of it agrees with what was chosen.
    """
    label = model_label(model_name)
    return default_store().discover(label, prompt, revision=revision, dtype=dtype, space=space)


def clear_cache(model: str | Path | None = None) -> int:
    """Delete what the default store holds for `model`, or everything; the number of entries deleted.

    `model`: a name, of which all variants go (revisions, dtypes, edits, ...), or the space id of one of them (see
    `cache_info`: `model_hash`). Never touches a file that actcache did not write.

    Raises:
        NotCachedError: nothing is stored under that name.
    """
    return default_store().clear(None if model is None else model_label(model))


def evict(limit_gb: float | None = None) -> EvictionReport:
    """Make the default store smaller than `limit_gb` GB (default: its limit); what was read longest ago goes first.

    As `Store.evict`.
    """
    return default_store().evict(limit_gb)


def verify_cache(repair: bool = False) -> VerifyReport:
    """Check every checksum of the default store and every row of its index; with `repair`, drop what is damaged.

    As `Store.verify`.
    """
    return default_store().verify(repair)


def invalidate_extraction_cache(
    model_name: str | Path,
    prompts: Sequence[Any] | None = None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    space: str | None = None,
) -> int:
    """Forget stored prompts of one variant of a model (all of them without `prompts`), so that they are computed again.

    Returns the number of entries forgotten.

    Raises:
        NotCachedError: nothing is stored under that name, or no variant agrees with `revision`, `dtype`, `space`.
        AmbiguousVariantError: several variants agree; the message lists them.
    """
    store = default_store()
    chosen = one_variant(store, model_label(model_name), revision=revision, dtype=dtype, space=space)
    return store.invalidate(chosen.space, prompts)


def one_variant(
    store: Store, name: str, *, revision: str | None = None, dtype: str | None = None, space: str | None = None
) -> SpaceInfo:
    """The one variant of model `name` that agrees with what is given; errors as `invalidate_extraction_cache`."""
    spaces = store.spaces()
    named = [s for s in spaces if s.model_name == name]
    if not named:
        raise none_of_that_name(name, spaces, store)
    agree = agreeing(named, name, revision=revision, dtype=dtype, space=space)
    if len(agree) == 1:
        return agree[0]
    told = listed(agree, variant_names(named))
    raise AmbiguousVariantError(f"{name!r} is stored in {len(agree)} variants that fit; choose one: {told}.")


def model_label(model: str | Path) -> str:
    """The name under which a store knows `model`: a folder by its full path, a Hub id as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(model)

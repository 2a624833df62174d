"""What every worker is to do, in a form that travels to other processes and machines; checked before any is started."""

from __future__ import annotations

import contextlib
import inspect
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actcache.errors import OptionError, StoreAccessError, TokenizerError, did_you_mean
from actcache.extract.attempts import check_retries
from actcache.extract.prompts import text_context
from actcache.model.identity import digest_json
from actcache.store.backend import LocalBackend
from actcache.store.default import model_label
from actcache.store.locations import Place
from actcache.store.object_backend import ObjectBackend
from actcache.store.spaces import space_id
from actcache.store.store import Store
from actcache.unified import UnifiedCache


@dataclass(frozen=True)
class StorePlace:
    """A store, and what it does with what is stored there; limit in GB, None for none."""

    location: str | Path
    limit_gb: float | None
    dtype: str | None
    index_dir: Path | None

    @classmethod
    def of(cls, store: Store) -> StorePlace:
        """Of a store of this process.

        Raises:
            OptionError: one that only this process can reach, or that keeps nothing.
            StoreAccessError: a folder that cannot be written.
        """
        if type(store.backend) not in (LocalBackend, ObjectBackend):
            raise OptionError(
                f"store is a {type(store.backend).__name__}, which is in this process only: give a folder or a URL."
            )
        if store.limit.value == 0:
            raise OptionError(
                f"the limit of the store is 0 ({store.limit.source}): nothing is stored, so there is nothing to do."
            )
        store.check_writable()
        own = store.index_dir if store.index_dir != Place(store.location).index_dir else None
        limit = store.limit.value
        return cls(store.location, None if limit is None else limit / 2**30, store.dtype.value, own)

    def open(self) -> Store:
        """The store, in a worker."""
        if isinstance(self.location, Path) and not self.location.is_dir():
            raise StoreAccessError(
                f"the folder of the store, {self.location}, is not on this machine: workers on several machines need "
                "one that all of them share, or store='s3://...'."
            )
        return Store(self.location, limit_gb=self.limit_gb, dtype=self.dtype, index_dir=self.index_dir)


@dataclass(frozen=True)
class Job:
    """The same for all workers.

    Attributes:
        options: those of `UnifiedCache`, without model and store.
        space: that of the model, as the driver knows it.
        label: what the model is called.
        config: what is extracted, as text that is the same for the same extraction.
        verify_cache, max_retries: as `UnifiedCache.warmup` takes them.
        threads: of torch, in each worker; None leaves them alone.
        log_level: what of actcache's log the driver shows.
    """

    model: str
    options: Mapping[str, Any]
    store: StorePlace
    space: str
    label: str
    config: str
    verify_cache: bool = False
    max_retries: int | None = None
    threads: int | None = None
    log_level: int = logging.WARNING

    def open(self) -> UnifiedCache:
        """The cache of a worker."""
        return UnifiedCache(self.model, store=self.store.open(), **self.options)

    def with_threads(self, threads: int) -> Job:
        return replace(self, threads=threads)


def make_job(
    model: Any,
    store: Any,
    options: Mapping[str, Any],
    *,
    verify_cache: bool = False,
    max_retries: int | None = None,
) -> Job:
    """Raises what `UnifiedCache` raises, and `OptionError` for what workers cannot be given."""
    if not isinstance(model, str | Path):
        raise OptionError(
            f"model is a {type(model).__name__} in this process, and each worker loads its own: pass its id on the "
            "Hub, or the folder that model.save_pretrained(folder) makes."
        )
    check_retries(max_retries)
    known = [name for name in inspect.signature(UnifiedCache).parameters if name not in ("model", "store")]
    for name in ("labels", "metadata"):
        if name in options:
            column = "label_column=" if name == "labels" else "metadata_columns="
            raise OptionError(
                f"{name}= is of prompts in memory, and workers read files: name the column with {column}."
            )
    for name in options:
        if name not in known:
            raise OptionError(f"unknown option {name!r} of UnifiedCache.{did_you_mean(name, known)}")
    tokenizer = options.get("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        raise OptionError(
            f"tokenizer is a {type(tokenizer).__name__} in this process: pass its id on the Hub or its folder."
        )
    _check_travels(options)
    given = {**options}
    if tokenizer is not None:
        # Workers may run in another folder.
        given["tokenizer"] = model_label(tokenizer)
    cache = UnifiedCache(model, store=store, **given)
    source = cache.extractor.source
    identity = source.identity()
    if str(identity.values.get("weights", "")).startswith("commit:"):
        # What the revision means now, however long the run takes.
        given["revision"] = identity.label["revision"]
    context = ""
    with contextlib.suppress(TokenizerError):
        # Without one, all prompts may be token ids.
        context = text_context(source, add_special_tokens=cache.extractor.add_special_tokens)
    said = {
        "identity": dict(identity.values),
        "sites": cache.extractor._asked,
        "layers": repr(given.get("layers", "all")),
        "layout": cache.cached.layout,
        "context": context,
        "asked": repr(cache._asked),
    }
    space = space_id(identity.values)
    place = StorePlace.of(cache.store)
    return Job(
        model_label(model), given, place, space, source.name, digest_json(said), verify_cache, max_retries,
        log_level=logging.getLogger("actcache").getEffectiveLevel(),
    )  # fmt: skip


def _check_travels(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        module = getattr(value, "__module__", None) if callable(value) else None
        try:
            pickle.dumps(value)
        except Exception:
            module = "__main__"
        if module == "__main__":
            raise OptionError(
                f"{name}={value!r:.60} cannot be sent to other processes: use what can be imported there, such as a "
                "function of a module."
            )

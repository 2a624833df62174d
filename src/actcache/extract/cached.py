"""CachedExtractor: only what is missing is computed, and every finished batch is kept."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import ModelChangedError, OptionError, PartialWarmupError
from actcache.extract.declared import check_edited
from actcache.extract.extractor import ActivationExtractor
from actcache.extract.lookup import Lookup, Question, look_up
from actcache.extract.plan import Plan, bytes_free, estimate_seconds, remember_speed
from actcache.extract.prompts import (
    Prompt,
    PromptList,
    check_tokens,
    prompt_table,
    read_prompts,
    text_context,
    tokenize,
)
from actcache.progress import progress
from actcache.store.default import store_at
from actcache.store.records import TOKENS, Records
from actcache.store.spaces import space_id

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from actcache.extract.batching import Batch
    from actcache.store.prompts import PromptTable
    from actcache.store.store import Store

# Rows that may wait for the disk; more would only be memory.
_QUEUE_BYTES = 32 << 20
# How long a finished batch may wait for company before it is made durable.
_LINGER_SECONDS = 0.05


@dataclass
class Request:
    """Prompts looked up in a store, and what is still to be computed for them.

    Attributes:
        lookup: what was found.
        missing: by the names still missing, the prompts (positions in the request), each different prompt once.
    """

    prompts: PromptList
    lookup: Lookup
    space: str
    text_context: str
    missing: dict[tuple[str, ...], list[int]]

    @property
    def cached(self) -> int:
        return int(self.lookup.found.sum())

    @property
    def to_compute(self) -> int:
        return sum(len(members) for members in self.missing.values())


@dataclass
class Filled:
    """What a run of the model added to the store."""

    extracted: int = 0
    tokens: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    failed: list[tuple[int, str]] = field(default_factory=list)


class CachedExtractor:
    """An `ActivationExtractor` with a store behind it.

    Args:
        extractor: what to compute; its `positions` must be ``"all"``.
        store: an `ac.Store`, a folder, or None for the default store.
    """

    def __init__(self, extractor: ActivationExtractor, store: Store | str | Path | None = None) -> None:
        if not (isinstance(extractor.reduction.positions, str) and extractor.reduction.positions == "all"):
            raise OptionError(
                f"positions={extractor.reduction.positions!r} cannot be cached: keep positions='all' here and choose "
                "positions when reading (get_activations(..., positions=...))."
            )
        self.extractor = extractor
        self.layout = layout_name(extractor.reduction.pooling)
        self.store = store_at(store)

    def extract(
        self, prompts: Prompt | Iterable[Prompt], *, invalidate_cache: bool = False, cache_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(activations [B, S, L*D], mask [B, S])`, sites side by side, right-padded with zeros, bool mask.

        Pooled extractors give `S = 1`. Only what is missing is computed; every finished batch survives a kill.

        Args:
            invalidate_cache: forget what is stored for these prompts first, and compute it again.
            cache_only: compute and store, return None.

        Raises:
            PartialWarmupError: some prompts could not be computed; the others are stored.
        """
        from actcache.extract.arrays import to_torch

        names = self.extractor.sites
        read = prompts if isinstance(prompts, PromptList) else read_prompts(prompts)
        request = self.request(read, names)
        if invalidate_cache:
            # What cannot be computed again is not thrown away.
            self.store.check_writable()
            self.extractor.source.model_to_run()
            self.invalidate(request)
            request = self.request(read, names)
        filled = self.fill(request)
        if filled.failed:
            raise partial_failure(filled, stats=filled)
        if cache_only:
            return None
        answer = self.request(read, names).lookup if filled.extracted else request.lookup
        if self.layout == TOKENS:
            values, mask = answer.padded()
            return to_torch(values), to_torch(mask)
        import torch

        if len(set(self._widths(names))) == 1:
            pooled = answer.pooled().reshape(len(read), -1)
        else:
            # Site by site: each array has one width.
            each = [self.request(read, [name], check=False).lookup.pooled()[:, 0] for name in names]
            pooled = np.concatenate(each, axis=1)
        return to_torch(pooled[:, None]), torch.ones(len(pooled), 1, dtype=torch.bool)

    def request(
        self, prompts: Prompt | Iterable[Prompt] | PromptList, names: Sequence[str], *, check: bool = True
    ) -> Request:
        """Look `prompts` up; nothing is computed, nothing written.

        Raises:
            PromptError, PromptTypeError, TokenizerError: a prompt that cannot be run.
        """
        source = self.extractor.source
        read = prompts if isinstance(prompts, PromptList) else read_prompts(prompts)
        special = self.extractor.add_special_tokens
        context = text_context(source, add_special_tokens=special) if read.any_text else ""
        space = space_id(source.identity().values)
        question = Question(self.store, space, names, self.layout, check)
        lookup = look_up(question, read, source, context, add_special_tokens=special)
        absent = np.flatnonzero(~lookup.found).tolist()
        if absent:
            check_tokens(read, absent, source)
            check_edited(read, absent, self.extractor.edits)
        missing: dict[tuple[str, ...], list[int]] = {}
        seen: set[bytes] = set()
        for i in absent:
            ids = read.ids[i]
            assert ids is not None
            if ids.tobytes() not in seen:
                seen.add(ids.tobytes())
                missing.setdefault(lookup.missing[i], []).append(i)
        return Request(read, lookup, space, context, missing)

    def plan(self, request: Request) -> Plan:
        """What filling `request` would cost."""
        source = self.extractor.source
        tokens = nbytes = 0
        itemsize = {"float64": 8, "float32": 4}.get(source.dtype, 2)
        for names, members in request.missing.items():
            count = sum(self._tokens_of(request, i) for i in members)
            tokens += count
            rows = count if self.layout == TOKENS else len(members)
            nbytes += rows * itemsize * sum(self._widths(names))
        seconds = 0.0
        if tokens:
            device = self.extractor.backend().device
            seconds = estimate_seconds(source, request.space, device, tokens, depth=self._depth())
        policy = source.batch_policy()
        return Plan(
            cached=request.cached,
            missing=request.to_compute,
            tokens=tokens,
            bytes_to_write=nbytes,
            bytes_free=bytes_free(Path(self.store.location)),
            seconds=seconds,
            batching="" if policy.lengths == "any" else policy.why,
        )

    @staticmethod
    def _tokens_of(request: Request, i: int) -> int:
        ids = request.prompts.ids[i]
        assert ids is not None
        return len(ids)

    def _widths(self, names: Iterable[str]) -> list[int]:
        source = self.extractor.source
        width = source.d_model
        return [(source.vocab_size or width) if name == "logits" else width for name in names]

    def _depth(self) -> float:
        """The fraction of the blocks that runs: those before the deepest site, an encoder's before its decoder's."""
        from actcache.model.sites import Site

        source = self.extractor.source
        before, start = {}, 0
        for stack in source.stacks:
            before[stack] = start
            start += source.depth(stack)
        deepest = 0
        for site in map(Site.parse, self.extractor.sites):
            if site.name == "logits":
                return 1.0
            blocks = source.depth(site.stack) if site.name == "final_norm" else (site.layer or 0) + 1
            deepest = max(deepest, before[site.stack] + blocks)
        return deepest / start

    def fill(self, request: Request) -> Filled:
        """Compute and store what `request` lacks; a batch that fails is noted and the rest goes on.

        Raises:
            DiskFullError, StoreAccessError: what was finished before stays stored.
        """
        filled = Filled()
        if not request.missing:
            return filled
        self.store.check_writable()
        self.plan(request).require_room(Path(self.store.location))
        source = self.extractor.source
        start = time.perf_counter()
        identity = source.identity()
        space = self.store.open_space(identity.values, identity.label)
        with (
            self.store.writer(space, max_bytes=_QUEUE_BYTES, linger=_LINGER_SECONDS) as writer,
            progress(request.to_compute, f"extracting {Path(source.name).name}") as bar,
        ):
            for names, members in request.missing.items():
                table = prompt_table(request.prompts, members, request.text_context)

                def failed(batch: Batch, error: Exception, members: list[int] = members) -> None:
                    reason = f"{type(error).__name__}: {error}"
                    filled.failed += [(members[i], reason) for i in batch.indices]

                ids = [table.tokens(i) for i in range(len(members))]
                confirmed = False
                for batch, rows in self.extractor.batches(ids, names, failed):
                    if not confirmed:
                        self._confirm(identity.values)
                        confirmed = True
                    records = self._records(table, batch, rows)
                    writer.put(records)
                    filled.extracted += len(batch.indices)
                    filled.tokens += sum(len(ids[i]) for i in batch.indices)
                    filled.bytes_written += sum(matrix.nbytes for matrix in records.data.values())
                    bar.update(len(batch.indices))
        filled.seconds = time.perf_counter() - start
        remember_speed(space, self.extractor.backend().device, filled.tokens, filled.seconds)
        return filled

    def _confirm(self, values: Mapping[str, Any]) -> None:
        """Refuse to store what a model gave that was replaced between its identification and its first batch."""
        if self.extractor.source.identity().values != values:
            raise ModelChangedError(
                f"the model {self.extractor.source.name!r} was replaced while this run began: "
                "nothing of it was stored, run again."
            )

    def _records(self, table: PromptTable, batch: Batch, rows: Mapping[str, torch.Tensor]) -> Any:
        from actcache.extract.arrays import to_numpy

        prompts = table.select(list(batch.indices))
        offset: npt.NDArray[np.int64] = (
            prompts.token_offset if self.layout == TOKENS else np.arange(len(prompts) + 1, dtype=np.int64)
        )
        return Records(prompts, self.layout, offset, {name: to_numpy(tensor) for name, tensor in rows.items()})

    def invalidate(self, request: Request) -> None:
        """Forget what is stored for the prompts of `request`, whatever its layout."""
        prompts = request.prompts
        special = self.extractor.add_special_tokens
        source = self.extractor.source
        everything = list(range(len(prompts)))
        tokenize(prompts, everything, source, add_special_tokens=special)
        self.store.invalidate(request.space, prompt_table(prompts, everything, ""))


def partial_failure(filled: Filled, *, stats: object) -> PartialWarmupError:
    """The error that names the prompts a run could not store."""
    shown = "; ".join(f"prompt {i}: {reason}" for i, reason in filled.failed[:3])
    more = f"; and {len(filled.failed) - 3} more" if len(filled.failed) > 3 else ""
    return PartialWarmupError(
        f"{len(filled.failed)} prompts were not stored ({shown}{more}). "
        "The others are stored; run again to try these again.",
        stats=stats,
        failed=filled.failed,
    )


def layout_name(pooling: Any) -> str:
    """The store's name for a pooling; a function is named by its import path, its code and its default arguments.

    Raises `OptionError` for a function without a stable name (a lambda, a local function) or with hidden state (a
    method, a closure).
    """
    if pooling is None:
        return TOKENS
    if isinstance(pooling, str):
        return pooling
    name = f"{getattr(pooling, '__module__', '')}.{getattr(pooling, '__qualname__', '')}"
    code = getattr(pooling, "__code__", None)
    # A method or a closure computes with values that its code does not show.
    hidden = getattr(pooling, "__self__", None) is not None or getattr(pooling, "__closure__", None) is not None
    if "<" in name or code is None or hidden:
        raise OptionError(
            f"pooling {pooling!r} cannot be cached: use a named module-level function, or a built-in pooling."
        )
    from actcache.model.identity import digest_json

    defaults = repr((pooling.__defaults__, pooling.__kwdefaults__))
    return f"function:{name}:{digest_json([_code(code), defaults])[:16]}"


def _code(code: CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]

"""Many batches into one cache: `extract_batches`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actcache.capture.attention import AttentionBlocks
from actcache.capture.averaging import Means
from actcache.capture.batch_columns import BatchColumns, Columns
from actcache.capture.batch_forms import BatchReader, OnePass, ReadBatch
from actcache.capture.cache import ActivationCache
from actcache.capture.edits import Editing, Edits, ReadyMade
from actcache.capture.hooks import capture, kept_tokens
from actcache.capture.media import on_model
from actcache.capture.positions import check_named, each_prompt
from actcache.capture.recording import Recording
from actcache.capture.requests import Modules
from actcache.capture.spans import told_by_prompts
from actcache.capture.values import read_dtype
from actcache.errors import (
    ActCacheError,
    JoinError,
    OptionError,
    PromptError,
    PromptTypeError,
    require_choice,
)
from actcache.model.anatomy import describe, original
from actcache.model.modes import evaluating
from actcache.model.sites import Site, expand_sites
from actcache.model.structure import require_module
from actcache.progress import progress

__all__ = ["extract_batches"]


def extract_batches(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    sites: str | Site | Sequence[str | Site] | None = None,
    modules: Modules | None = None,
    layers: Any = None,
    positions: Any = "all",
    columns: Columns | None = None,
    reduce: str | None = None,
    attention: AttentionBlocks | Callable[[Any], AttentionBlocks] | None = None,
    edits: Edits | None = None,
    tokenizer: Any = None,
    include_output: bool = True,
    include_inputs: bool = False,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
    into: ActivationCache | None = None,
) -> ActivationCache:
    """Run every batch of `dataloader` through `model` and return one cache of all of them.

        loader = DataLoader(dataset, batch_size=8)         # or a list, or a generator
        cache = ac.extract_batches(model, loader, sites="resid_post", positions="last", columns=["label"])
        cache["resid_post.3"], cache.columns["label"]      # [N, 1, D], N labels

    A **batch** is a list of texts, chats or token ids, a tensor of ids ``[B, S]`` (all real), or a dict of tensors such
    as a tokenizer returns: what the model takes of it is passed on, all else (labels, texts) is not. Of a tuple
    ``(inputs, anything)``, or the list that a `DataLoader` makes of such pairs, the model gets the first. A model that
    takes no token ids is called with the tensor. Every prompt's values are those it has alone, whatever shares its
    batch and whichever side is padded: prompts that would change each other's values run apart, and padding that the
    model would not see through is moved to the right (``cache.attention_mask`` says where tokens are).

    Args:
        sites, modules, layers, include_output, include_inputs, dtype: as in `capture`; name sites, modules or both.
            ``"logits"`` are kept only if asked for, and what lies behind the last of the sites does not run.
        positions: as in `capture`, or `ac.tokens_of` for chats, or a function of the batch, for other positions in
            every batch. Named positions of every batch stay what they were for its prompts.
        columns: values to keep row by row, ``function(batch) -> {name: one value per prompt}`` (a list, array or
            tensor), or the names of fields of dict batches. They are in ``cache.columns``, as they were.
        reduce: None keeps every prompt; ``"mean"`` only the mean over examples, in constant memory (below).
        attention: groups of tokens to which every pattern among `sites` is brought down, batch by batch; patterns
            themselves are not kept. It may be a function of the batch, for other groups in every batch. The result is
            under "attention_blocks.l" (`ac.AttentionBlocks`).
        edits: edits of every pass, as for `ac.edit`.
        device: where values are kept; each batch's are moved there before the next one runs. None: where they are.
        into: a cache to which the batches are joined, and which is returned. When the run is interrupted (Ctrl-C, an
            error), the batches finished by then are in it; without it they are let go. The model is left as it was.

    Means: with ``reduce="mean"`` every example (prompt) counts once, whatever its length and batch, padding never, and
    there is no batch axis. With `x_e` an example's value, the result is ``1/N * sum_e m(x_e)``, summed in float64:

    - positions that are as many in every prompt (``"last"``, ``3``, ``(0, 4)``, ``[0, -1]``) are averaged position by
      position: ``m(x_e) = x_e[p]``, giving ``[D]`` for a single one, else ``[n, D]``;
    - for positions whose number may differ (``"all"``, ``(2, -1)``, a list for each prompt, `ac.tokens_of`) each
      example's chosen tokens are averaged first: ``m(x_e) = 1/T_e * sum_t x_e[t]``, giving ``[D]``;
    - named positions give a dict of these by name;
    - an attention pattern keeps all queries and keys, ``[H, S, S]``, or the chosen queries by the same rules; its
      examples must have one length. Blocks of attention, ``[H, queries, keys]``, need not; where one is nan for an
      example, the others make up its mean.

    The result is float32 at least, or `dtype`; ``cache.metadata["examples"]`` is `N`.

    Raises, before the first pass, the errors of `capture` for what does not exist; `PromptError` or `PromptTypeError`
    for a batch that cannot be read, `OptionError` for a column without one value per prompt, `JoinError` for what
    cannot be joined or averaged. Errors name the batch, counted from 0.
    """
    if into is not None and (reduce is not None or not isinstance(into, ActivationCache)):
        why = "a mean is not joined to anything" if reduce is not None else f"it is a {type(into).__name__}"
        raise OptionError(f"into must be an ActivationCache to which prompts are joined: {why}")
    job = _Job(
        model,
        {
            "sites": sites,
            "modules": modules,
            "layers": layers,
            "include_output": include_output,
            "include_inputs": include_inputs,
            "device": device,
            "dtype": dtype,
        },
        positions,
        columns,
        reduce,
        attention,
        edits,
        tokenizer,
    )
    batches, total = _batches(dataloader)
    result = ActivationCache() if into is None else into
    with progress(total, "extracting", unit="batch") as bar, result.deferred_mode():
        number = -1
        for number, batch in enumerate(batches):
            try:
                cache = job.run(batch)
                if cache is not None:
                    # Nobody else has it: joining is the only copy.
                    result._add(cache, "error", True, copying=False)
            except ActCacheError as error:
                error.args = (f"batch {number}: {error}", *error.args[1:])
                raise
            except Exception as error:
                error.add_note(f"This was batch {number}, counted from 0.")
                raise
            bar.update()
    if number < 0:
        raise PromptError("there was no batch: the data loader yielded nothing (a generator yields only once)")
    return result if reduce is None else job.mean()


class _Job:
    """What is done with every batch."""

    def __init__(
        self,
        model: nn.Module,
        options: dict[str, Any],
        positions: Any,
        columns: Columns | None,
        reduce: str | None,
        attention: AttentionBlocks | Callable[[Any], AttentionBlocks] | None,
        edits: Edits | None,
        tokenizer: Any,
    ) -> None:
        require_module(model, "extract_batches")
        if options["sites"] is None and options["modules"] is None:
            raise OptionError("name sites=, modules= or both: every module of every batch is more than memory holds")
        if reduce is not None:
            require_choice(reduce, ("mean",), "reduce")
            if columns is not None or options["modules"] is not None:
                what = "columns have no rows left" if columns is not None else "modules have no known positions"
                raise OptionError(f"reduce={reduce!r} averages sites over examples, where {what}: leave them out")
        if not callable(positions):
            check_named(positions, chats=True, ids=True)
            positions = on_model(positions, original(model))
        self._model = model
        self._means = Means(read_dtype(options["dtype"])) if reduce is not None else None
        # A mean is rounded once, at the end.
        self._options = options = options if reduce is None else {**options, "dtype": None}
        self._edits = edits is not None
        self._positions = positions
        self._columns = BatchColumns(columns)
        self._attention = attention
        # The names of positions and of groups, as the first batch had them.
        self._names: dict[str, list[str]] = {}
        self._examples = 0
        # What is cut to the positions, and patterns of which blocks are to be made, which are needed whole.
        self._cut: dict[str, Any] | None = options
        self._whole: dict[str, Any] | None = None
        if attention is not None:
            if not callable(attention) and not isinstance(attention, AttentionBlocks):
                raise OptionError(
                    f"attention is {attention!r}: expected ac.AttentionBlocks, or a function that makes it"
                )
            self._cut, self._whole = _without_patterns(original(model), options)
            if self._cut is None and (positions is not None and positions != "all"):
                raise OptionError("positions= has nothing to choose from: blocks of attention have groups of their own")
        # Whatever is asked for and is not there is an error before the first batch is taken.
        self._blocks("all")
        self._editing = None if edits is None else Editing(model, edits)
        self._edits_of_batch = edits is not None and not _fit_any_prompts(edits)
        self._reader = BatchReader(original(model), tokenizer)

    def run(self, batch: Any) -> ActivationCache | None:
        """The cache of one batch; None when its values went into the means."""
        read = self._reader.read(batch)
        if len(read.passes) > 1 and self._edits_of_batch:
            raise PromptError(
                "its prompts would change each other's values and run apart, and its edits may belong to the batch as "
                "a whole: pass prompts of one length, one by one if need be"
            )
        positions = self._positions
        if callable(positions):
            positions = positions(batch)
            check_named(positions, chats=True, ids=True)
        positions = "all" if positions is None else positions
        positions = self._told(positions, read)
        self._same_names("positions", list(positions) if isinstance(positions, dict) else [])
        attention = self._groups(batch, read)
        columns = self._columns.read(batch, read.size)
        parts: list[ActivationCache] = []
        for one in read.passes:
            mine = _of_rows(positions, one.rows, read.size)
            cut, whole = self._pass(one, mine)
            blocks = {}
            if attention is not None and whole is not None:
                blocks = attention.with_groups(partial(_of_rows, rows=one.rows, size=read.size)).values(whole)
            if self._means is None:
                part = cut
                if part is None:
                    assert whole is not None
                    part = whole.select()
                    part.clear()
                part.update(blocks)
                parts.append(part)
                continue
            if cut is not None:
                self._means.add_sites(cut, mine)
            self._means.add_blocks(blocks)
        self._examples += read.size
        if self._means is not None:
            return None
        cache = parts[0]
        if len(parts) > 1:
            order = [row for one in read.passes for row in one.rows]
            cache = ActivationCache.concatenate(parts).select(prompts=np.argsort(order).tolist())
        cache.tokens = kept_tokens("all" if self._cut is None else positions, read.prompts)
        cache.columns.update(columns)
        return cache

    def mean(self) -> ActivationCache:
        assert self._means is not None
        result = self._means.result()
        result.metadata.update(reduce="mean", examples=self._examples)
        return result

    def _blocks(self, positions: Any) -> list[Recording | None]:
        """Capture blocks for one pass: of what is cut, and of what is needed whole."""
        # A module may run again in the same pass, and one block must not end what another, or an edit, still waits for.
        several = (self._cut is None) == (self._whole is None)
        stop = not (several or self._options["modules"] is not None or self._edits)
        return [
            None if options is None else capture(self._model, positions=where, stop_after_last=stop, **options)
            for options, where in ((self._cut, positions), (self._whole, "all"))
        ]

    def _pass(self, one: OnePass, positions: Any) -> list[ActivationCache | None]:
        blocks = self._blocks(positions)
        self._reader.preparer.begin()
        with ExitStack() as stack:
            stack.callback(self._reader.preparer.begin)
            stack.enter_context(evaluating(self._model))
            stack.enter_context(torch.no_grad())
            if self._editing is not None:
                stack.enter_context(self._editing)
            caches = []
            for block in blocks:
                if block is not None:
                    block.track_tokens()
                caches.append(None if block is None else stack.enter_context(block))
            self._model(*one.args, **one.kwargs)
        return caches

    def _groups(self, batch: Any, read: ReadBatch) -> AttentionBlocks | None:
        """The groups of tokens of a batch, in numbers."""
        attention = self._attention
        if attention is None or isinstance(attention, AttentionBlocks):
            found = attention
        else:
            found = attention(batch)
            if not isinstance(found, AttentionBlocks):
                raise OptionError(f"attention returned a {type(found).__name__}: expected ac.AttentionBlocks")
        if found is None:
            return None
        for what, names in (("keys", found.keys), ("queries", found.queries or {})):
            self._same_names(f"groups of {what}", list(names))
        return found.with_groups(lambda groups: self._told(groups, read))

    def _told(self, positions: Any, read: ReadBatch) -> Any:
        return told_by_prompts(on_model(positions, original(self._model)), read.prompts)

    def _same_names(self, what: str, names: list[str]) -> None:
        before = self._names.setdefault(what, names)
        if names != before and (what != "positions" or sorted(names) != sorted(before)):
            raise JoinError(f"its {what} are named {names}, and those of the batches before {before}")


def _without_patterns(model: nn.Module, options: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The options of a capture of all but patterns, and of one of patterns."""
    sites = options["sites"]
    wanted = [] if sites is None else expand_sites(describe(model), sites, options["layers"])
    patterns = [site for site in wanted if site.name == "pattern"]
    others = [site for site in wanted if site.name != "pattern"] or None
    if not patterns:
        raise OptionError("attention= is about attention patterns: name them too, sites='pattern'")
    rest = {**options, "sites": others, "layers": None}
    whole = {**options, "sites": patterns, "layers": None, "modules": None}
    return (None if others is None and options["modules"] is None else rest), whole


def _batches(dataloader: Any) -> tuple[Iterable[Any], int | None]:
    """The batches, and how many they are where that can be told."""
    if isinstance(dataloader, (Mapping, Tensor, np.ndarray)):
        return [dataloader], 1
    if isinstance(dataloader, (str, bytes)) or not (
        hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__")
    ):
        raise PromptTypeError(
            f"dataloader is {dataloader!r:.60}: expected batches, such as [[text, text], [text]], a generator or a "
            "torch DataLoader"
        )
    try:
        return dataloader, len(dataloader)
    except TypeError:
        return dataloader, None


def _fit_any_prompts(edits: Any) -> bool:
    given = list(edits.values()) if isinstance(edits, Mapping) else edits
    listed = given if isinstance(given, (list, tuple)) else [given]
    return all(isinstance(one, ReadyMade) and one.of_prompts is None for one in listed)


def _of_rows(positions: Any, rows: Sequence[int], size: int) -> Any:
    """The positions of some prompts of a batch."""
    if isinstance(positions, dict):
        return {name: _of_rows(choice, rows, size) for name, choice in positions.items()}
    each = each_prompt(positions, size)
    return [each[row] for row in rows] if each is positions else positions

"""The logit lens over the streams that are stored, batch by batch, without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.capture.positions import each_prompt, resolve_positions
from actcache.errors import OptionError, SiteUnavailableError, did_you_mean, require_choice
from actcache.extract.declared import refuse_edits_behind
from actcache.extract.inventory import width_of
from actcache.extract.prompts import PromptList
from actcache.model.sites import Site, resolve_layers
from actcache.progress import progress
from actcache.store.dtypes import common_dtype
from actcache.store.records import TOKENS

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from actcache.capture.lens import LogitLens
    from actcache.capture.translators import Map
    from actcache.extract.answer import Lookup
    from actcache.extract.cached import CachedExtractor
    from actcache.model.head import Head
    from actcache.model.source import ModelSource

# Rows of a batch of prompts, all layers together.
_BYTES = 64 << 20
_LAST = "last_token"


@dataclass(frozen=True)
class LensAsked:
    """Which streams a lens reads: the complete names of `layers` of one site, that of the last block's output, and the
    columns they are read from (`layout`)."""

    name: str
    stack: str | None
    layers: list[int]
    depth: int
    layout: str

    def site(self, layer: int) -> str:
        return str(Site(self.name, layer, stack=self.stack))

    @property
    def final(self) -> str:
        return str(Site("resid_post", self.depth - 1, stack=self.stack))

    @property
    def names(self) -> list[str]:
        """Every column that is read, once."""
        return list(dict.fromkeys([*map(self.site, self.layers), self.final]))


def ask_for_lens(cached: CachedExtractor, site: str | None, layers: Any, positions: Any) -> LensAsked:
    """Which of the sites of `cached` answer for `site`, `layers` and `positions`.

    Raises:
        OptionError: a site, layer or position that this cache does not keep.
        LayerRangeError: a layer that the model does not have.
    """
    from actcache.capture.lens import STREAM_SITES

    source, held = cached.extractor.source, cached.extractor.sites
    stack = source.stacks[-1]
    asked = Site.parse("resid_post" if site is None else site)
    require_choice(asked.name, STREAM_SITES, "site of the residual stream")
    if asked.layer is not None:
        raise OptionError(f"site={site!r} names a layer: write site={asked.name!r} and layers=[{asked.layer}]")
    if asked.stack not in (None, stack):
        raise OptionError(f"site={site!r}: the logits are computed from the {stack}, write '{stack}.{asked.name}'")
    depth = source.depth(stack)
    mine = [s.layer for s in map(Site.parse, held) if (s.name, s.stack) == (asked.name, stack)]
    kept = [layer for layer in mine if layer is not None]
    full = str(Site(asked.name, stack=stack))
    if not kept:
        raise OptionError(
            f"the lens reads {full!r}, which is not among this cache's sites {held}: add it to sites=."
            f"{did_you_mean(full, held)}"
        )
    numbers = kept if layers is None else resolve_layers(layers, depth)
    layout = _LAST if cached.layout == _LAST or positions == "last" else TOKENS
    found = LensAsked(asked.name, stack, numbers, depth, layout)
    for layer in numbers:
        if layer not in kept:
            raise OptionError(
                f"layers={layers!r} asks for {found.site(layer)!r}, and this cache holds {held}: add it to layers=."
            )
    if found.final not in held:
        raise OptionError(
            f"the final prediction follows from {found.final!r}, which is not among this cache's sites: add the last "
            "layer to layers= (-1)."
        )
    if cached.layout not in (TOKENS, _LAST):
        raise OptionError(
            f"this cache keeps vectors pooled as {cached.layout!r}, which no token's prediction follows from: make the "
            "UnifiedCache with cache_pooled=False, or with pooling='last_token' for positions='last'."
        )
    if cached.layout == _LAST and positions not in (None, "last", -1):
        raise OptionError(
            f"positions={positions!r} needs full sequences, and this cache keeps the last token of each prompt: make "
            "the UnifiedCache with cache_pooled=False."
        )
    return found


def stored_lens(
    cached: CachedExtractor,
    prompts: PromptList,
    asked: LensAsked,
    positions: Any,
    *,
    top_k: int,
    tokens: Any,
    translators: Any,
    device: str | None,
    complete: Callable[[PromptList, list[str]], object],
) -> LogitLens:
    """The lens of `prompts`; see `UnifiedCache.logit_lens`. Within a session of `cached`.

    `complete` computes and stores those of the named columns that prompts lack: also when logits are asked of the lens
    later, which it computes from what is stored then.
    """
    import torch

    from actcache.capture.lens import check_top_k, lens_of, read_chosen
    from actcache.capture.translators import read_translators
    from actcache.extract.backends.local import exact_float32
    from actcache.model.layer_predictions import LayerPredictions, predict_layers

    source, identity = cached.extractor.source, cached.identity().values
    size, width = source.vocab_size, width_of(source, Site.parse(asked.final))
    if size is None:
        # Its config does not say.
        size = _head(source, device).vocab_size
    check_top_k(top_k, size)
    chosen = read_chosen(tokens, size, source.tokenizer)
    maps = read_translators(translators, asked.name, asked.layers, asked.depth, width)
    reader = _Reader(cached, prompts, asked, positions, maps, width)
    if len(reader.missing(asked.names)):
        # It is needed, and has the head.
        source.model()
    head = _head(source, device)
    refuse_edits_behind(cached.extractor.edits, head, normalised=False)
    _complete(reader, asked.names, complete)
    made: list[LayerPredictions] = []
    where: list[list[int]] = []
    ids: list[list[int]] = []
    with (
        progress(len(prompts), f"lens of {Path(source.name).name}") as bar,
        torch.no_grad(),
        torch.autocast(head.device.type, enabled=False),
        exact_float32(),
    ):
        for rows, last, at, said in reader.batches():
            made.append(predict_layers(head, rows, last, top_k=top_k, chosen=chosen))
            where += at
            ids += said
            bar.update(len(at))

    def rows_again(place: int) -> Iterator[torch.Tensor]:
        with cached.session():
            # The head is that of the model as it is now.
            cached.confirm(identity)
            _complete(reader, [asked.site(asked.layers[place])], complete)
            yield from reader.rows_of(place)

    longest = max(map(len, where))
    numbers = _padded(where, longest)
    return lens_of(
        LayerPredictions.join(made),
        numbers >= 0,
        site=str(Site(asked.name, stack=asked.stack)),
        layers=asked.layers,
        chosen=chosen,
        positions=numbers,
        input_ids=_padded(ids, longest),
        final=asked.final,
        rows=rows_again,
        normalised=False,
        head=head,
        load_tokenizer=source.tokenizer,
    )


def _head(source: ModelSource, device: str | None) -> Head:
    try:
        return source.head(device)
    except SiteUnavailableError:
        if source.loaded:
            raise
        # Of some models no part is read by itself.
        source.model()
        return source.head(device)


def _complete(reader: _Reader, names: list[str], complete: Callable[[PromptList, list[str]], object]) -> None:
    absent = reader.missing(names)
    if len(absent):
        complete(absent, names)


class _Reader:
    """The chosen rows of stored prompts, translated, in batches that fit in memory."""

    def __init__(
        self,
        cached: CachedExtractor,
        prompts: PromptList,
        asked: LensAsked,
        positions: Any,
        maps: list[Map | None],
        width: int,
    ) -> None:
        self._cached, self._prompts, self._asked, self._maps = cached, prompts, asked, maps
        self._positions = each_prompt(positions, len(prompts))
        self._most = max(1, _BYTES // (4 * width * len(asked.names)))

    def missing(self, names: list[str]) -> PromptList:
        """The prompts that lack one of the columns."""
        found = self._look_up(self._prompts, names, check=True).found
        return self._prompts.select(np.flatnonzero(~found).tolist())

    def _look_up(self, prompts: PromptList, names: list[str], *, check: bool) -> Lookup:
        if self._asked.layout == self._cached.layout:
            # What was imported counts too, where it is trusted.
            return self._cached.request(prompts, names, check=check).lookup
        return self._cached.look_up(prompts, names, self._asked.layout, check=check)

    def batches(self) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, list[list[int]], list[list[int]]]]:
        """For some prompts the rows ``[n, D]`` of each layer and of the last block, for each of these prompts the
        positions that they are of, and the tokens there."""
        asked = self._asked
        names = asked.names
        for members in self._members():
            columns, where, ids = self._read(names, members)
            by_name = dict(zip(names, columns, strict=True))
            last = by_name[asked.final]
            rows = [self._mapped(by_name[asked.site(layer)], i) for i, layer in enumerate(asked.layers)]
            yield rows, last, where, ids

    def rows_of(self, place: int) -> Iterator[torch.Tensor]:
        """The rows of one of the layers, in the same order."""
        name = self._asked.site(self._asked.layers[place])
        for members in self._members():
            (rows,), _, _ = self._read([name], members)
            yield self._mapped(rows, place)

    def _mapped(self, rows: torch.Tensor, place: int) -> torch.Tensor:
        translate = self._maps[place]
        return rows if translate is None else translate(rows)

    def _members(self) -> Iterator[list[int]]:
        """Prompts that are read together."""
        batch: list[int] = []
        rows = 0
        for i, length in enumerate(self._lengths()):
            if batch and rows + length > self._most:
                yield batch
                batch, rows = [], 0
            batch.append(i)
            rows += length
        if batch:
            yield batch

    def _lengths(self) -> list[int]:
        if self._asked.layout != TOKENS:
            return [1] * len(self._prompts)
        # Of a prompt that is known by its text the tokens are not; its text is longer.
        return [
            len(ids) if ids is not None else len(text or "")
            for ids, text in zip(self._prompts.ids, self._prompts.texts, strict=True)
        ]

    def _read(
        self, names: list[str], members: list[int]
    ) -> tuple[list[torch.Tensor], list[list[int]], list[list[int]]]:
        from actcache.extract.arrays import to_torch

        prompts = self._prompts.select(members)
        lookup = self._look_up(prompts, names, check=False)
        lookup.require_all()
        rows, stored = lookup.with_prompts(list(range(len(members))))
        columns: list[list[Any]] = [[] for _ in names]
        where: list[list[int]] = []
        said: list[list[int]] = []
        for k, (i, parts) in enumerate(zip(members, rows, strict=True)):
            given = prompts.ids[k]
            # An import need not know them; such a prompt was looked up by its own.
            ids = stored[k] if given is None else given
            if self._asked.layout == TOKENS:
                at = resolve_positions(self._positions[i], len(parts[0]))
                taken = [part[at] for part in parts]
            else:
                # Of every token where the prompt is stored whole.
                at = [len(ids) - 1]
                taken = [part.reshape(-1, part.shape[-1])[-1:] for part in parts]
            where.append(at)
            said.append(ids[at].tolist())
            for column, part in zip(columns, taken, strict=True):
                column.append(part)
        return [to_torch(_joined(column)) for column in columns], where, said


def _joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """A copy, since what is mapped is read-only; the dtype of the store may have changed between prompts."""
    dtype = common_dtype(part.dtype for part in parts)
    return np.concatenate([part.astype(dtype, copy=False) for part in parts])


def _padded(rows: list[list[int]], longest: int) -> torch.Tensor:
    import torch

    found = torch.full((len(rows), longest), -1)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row)
    return found

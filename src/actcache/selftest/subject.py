"""The model under test with everything the checks share: prompts, sites, and each prompt run alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from actcache.capture.hooks import observe
from actcache.extract.backends import Reduction
from actcache.extract.extractor import ActivationExtractor
from actcache.model.config_values import text_values
from actcache.model.decoder_inputs import is_encoder_decoder, require_decoder_start
from actcache.model.offload import input_device
from actcache.selftest.alone import Alone, run_alone
from actcache.selftest.experts import Flips, find_routers
from actcache.selftest.ledger import Ledger, row_scale

if TYPE_CHECKING:
    from torch import Tensor, nn

    from actcache.extract.batching import Batch
    from actcache.model.anatomy import Anatomy, ReadPoint
    from actcache.model.invariance import BatchPolicy
    from actcache.model.sites import Site
    from actcache.model.source import ModelSource


@dataclass
class Watched:
    """What an extraction was seen to do: its batches, their rows, and the choices of routers in each."""

    batches: list[Batch] = field(default_factory=list)
    rows: list[Mapping[str, Tensor]] = field(default_factory=list)
    choices: dict[str, list[Tensor]] = field(default_factory=dict)


class _WatchedExtractor(ActivationExtractor):
    """An extractor whose batches are noted as they go by."""

    watched: Watched

    def batches(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch, rows in super().batches(*args, **kwargs):
            self.watched.batches.append(batch)
            self.watched.rows.append(rows)
            yield batch, rows


class Subject:
    """See the module. `sites`: those that are compared row by row, by name; `every`: these and all others."""

    def __init__(
        self,
        source: ModelSource,
        anatomy: Anatomy,
        sites: Mapping[str, Site],
        prompts: list[list[int]],
        ledger: Ledger,
        extractor: ActivationExtractor,
        every: Mapping[str, Site] | None = None,
    ) -> None:
        self.source = source
        self.anatomy = anatomy
        self.model: nn.Module = anatomy.model
        self.sites = sites
        self.prompts = prompts
        self.ledger = ledger
        self.policy: BatchPolicy = source.batch_policy()
        self.points: dict[str, ReadPoint] = {name: anatomy.read_point(site) for name, site in sites.items()}
        self.routers = find_routers(anatomy, text_values(source.config))
        self.alone: list[Alone] = []
        self.scales: list[dict[str, Tensor]] = []
        self.routed = self.flipped = 0
        self._extractor = extractor
        self._every = sites if every is None else every

    def inside(self, name: str) -> dict[str, Site]:
        """The sites of this name that the model has, at the layers that are compared."""
        return {text: site for text, site in self._every.items() if site.name == name}

    def inputs(self, rows: list[list[int]], pad: str = "right") -> dict[str, Tensor]:
        """The arguments of one pass as a user would make them: `rows` padded on one side with a mask (none for
        rows of one length), and for a decoder the same rows behind its start token."""
        longest = max(map(len, rows))
        device = input_device(self.model)
        start = require_decoder_start(self.source.config) if is_encoder_decoder(self.source.config) else None

        def padded(values: list[list[int]]) -> Tensor:
            filled = [[0] * (longest - len(value)) for value in values]
            pairs = zip(values, filled, strict=True)
            return torch.tensor([v + f if pad == "right" else f + v for v, f in pairs], device=device)

        made = {"input_ids": padded(rows)}
        mask = padded([[1] * len(row) for row in rows])
        if self.policy.mask_always or len(set(map(len, rows))) > 1:
            made["attention_mask"] = mask
        if start is not None:
            made["decoder_input_ids"] = padded([[start, *row[:-1]] for row in rows])
            if "attention_mask" in made:
                made["decoder_attention_mask"] = mask
        return made

    def run_alone(self) -> Iterator[Alone]:
        """Fill `alone`, prompt after prompt."""
        # From short to long: a rotary embedding that keeps its longest pass in mind starts each prompt afresh so,
        # whatever the package knows of it.
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        found: dict[int, Alone] = {}
        for i in order:
            found[i] = run_alone(self.model, self.inputs([self.prompts[i]]), self.points, self.routers)
            yield found[i]
        self.alone = [found[i] for i in range(len(self.prompts))]
        self.scales = [{name: row_scale(value) for name, value in one.values.items()} for one in self.alone]

    @contextmanager
    def extracting(self, batch_size: int, pooling: str | None = None) -> Iterator[tuple[ActivationExtractor, Watched]]:
        """An extractor of all sites on the model that is loaded, and what it is seen to do."""
        watched = Watched(choices={path: [] for path in self.routers})
        extractor: Any = copy.copy(self._extractor)
        extractor.__class__ = _WatchedExtractor
        extractor.watched = watched
        extractor.reduction = Reduction(pooling)
        extractor.batch_size = batch_size
        # Batches are to be as large as is said, however long their prompts.
        extractor.max_batch_tokens = batch_size * max(map(len, self.prompts))
        with self.watching(watched):
            yield extractor, watched

    @contextmanager
    def watching(self, watched: Watched) -> Iterator[None]:
        """Note the choices of every router in every pass of the block."""
        with observe(self.routers, lambda path, chosen: watched.choices[path].append(chosen.cpu())):
            yield

    def compare(
        self,
        check: str,
        which: Sequence[int],
        ours: Sequence[Mapping[str, Tensor]],
        choices: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Hold every site of some prompts, ``[T, D]`` each or ``[1, D]`` of its last token, against them alone."""
        if not which:
            return
        flips = [self._flips(i, chosen) for i, chosen in zip(which, choices, strict=True)]
        for name, site in self.sites.items():
            counts = [len(rows[name]) for rows in ours]
            theirs = torch.cat([self.alone[i].values[name][-n:] for i, n in zip(which, counts, strict=True)])
            scale = torch.cat([self.scales[i][name][-n:] for i, n in zip(which, counts, strict=True)])
            skip = None
            if any(flip is not None and flip.flipped for flip in flips):
                touched = [_touched(flip, site, len(self.prompts[i])) for flip, i in zip(flips, which, strict=True)]
                skip = torch.cat([rows[-n:] for rows, n in zip(touched, counts, strict=True)])
            whose = [i for i, n in zip(which, counts, strict=True) for _ in range(n)]
            self.ledger.compare(
                check, name, torch.cat([rows[name] for rows in ours]), theirs, scale, skip=skip, prompts=whose
            )

    def _flips(self, i: int, choices: Mapping[str, Tensor]) -> Flips | None:
        if not choices:
            return None
        # Behind its end there is padding, which is sent to experts too.
        here = {path: chosen[: len(self.prompts[i])] for path, chosen in choices.items()}
        flips = Flips(self.anatomy, self.alone[i].choices, here)
        self.routed += flips.routed
        self.flipped += flips.flipped
        return flips

    def choices_of(self, watched: Watched, number: int) -> list[dict[str, Tensor]]:
        """For each prompt of batch `number`, what each router chose for its tokens, and for the padding behind them."""
        batch = watched.batches[number]
        found: list[dict[str, Tensor]] = [{} for _ in batch.indices]
        for path, visits in watched.choices.items():
            if len(visits) != len(watched.batches) or len(visits[number]) != len(batch.indices) * batch.length:
                continue
            table = visits[number].reshape(len(batch.indices), batch.length, -1)
            for row, chosen in enumerate(table):
                found[row][path] = chosen
        return found


def _touched(flips: Flips | None, site: Site, tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.bool) if flips is None else flips.touched(site, tokens)

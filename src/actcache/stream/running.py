"""`LiveStream`: batches of token vectors while the model runs, and of what is stored afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from actcache.errors import NotCachedError, OptionError
from actcache.store import tensors
from actcache.store.prompts import PromptTable
from actcache.store.statistics import Moments
from actcache.stream.batches import ActivationStream, Options
from actcache.stream.device import await_copy
from actcache.stream.live import LIVE_BATCHES, Buffer, Extraction
from actcache.stream.normalize import Finish
from actcache.stream.tokens import TokenBatch


class LiveStream(ActivationStream):
    """The stream of a `UnifiedCache` some of whose `prompts` are not stored yet.

    While one of them is not, an iteration runs the model in a thread of its own, which waits where its tokens are not
    taken: they come as they are computed, in random order out of a buffer of up to `LIVE_BATCHES` batches (fewer at the
    beginning and at the end, so that nobody waits for it), and are stored.
    Afterwards all is as with what is stored.
    """

    def __init__(self, extraction: Extraction, options: Options) -> None:
        if options.normalize in ("mean", "mean_std"):
            raise OptionError(
                f"normalize={options.normalize!r} needs the statistics of all tokens, and {extraction.missing} prompts "
                "are not stored yet: warm them up first (UnifiedCache.warmup)."
            )
        self._prepare(options)
        self._finish = {site: Finish(options.normalize, options.dtype) for site in options.sites}
        self._extraction = extraction
        self._live = True
        # The epoch whose tokens are being taken while the model runs.
        self._under_way: int | None = None
        if self._rank()[1] > 1:
            raise OptionError(
                f"{extraction.missing} prompts are not stored yet, and ranks do not share an extraction: warm them up "
                "first (UnifiedCache.warmup)."
            )

    @property
    def num_tokens(self) -> int:
        return self._extraction.tokens if self._live else super().num_tokens

    @property
    def prompts(self) -> PromptTable:
        return self._extraction.table if self._live else super().prompts

    def _moments_of(self, site: str) -> Moments:
        if not self._settled():
            raise NotCachedError("there are no statistics before all prompts are stored: go through an epoch first.")
        return super()._moments_of(site)

    def __len__(self) -> int:
        size, total = self._options.batch_size, self.num_tokens
        return (total // size if self._options.drop_last else -(-total // size)) if self._live else super().__len__()

    def __iter__(self) -> Iterator[Any]:
        reader = self._reader()
        if reader.seed is not None:
            if self._settled():
                return super().__iter__()
            raise OptionError(
                f"{self._extraction.missing} prompts are not stored yet, and a worker of a DataLoader does not run the "
                "model: go through an epoch with num_workers=0, or warm them up first."
            )
        stored = self._extraction.stored()
        if stored is not None:
            self._live = False
            self._set([stored], None)
            return super().__iter__()
        self._live = True
        self._require_batches()
        epoch = self._epochs.begin(None)
        # What is stored when it ends, or is cut short, is gone through from the next epoch on.
        self._start = epoch + 1, 0
        return self._extracted(epoch)

    def _extracted(self, epoch: int) -> Iterator[Any]:
        self._under_way = epoch
        try:
            yield from self._batches_of(np.random.default_rng([self._options.seed, epoch]))
        finally:
            if self._under_way == epoch:
                self._under_way = None

    def _batches_of(self, draw: np.random.Generator) -> Iterator[Any]:
        options = self._options
        total = self._extraction.tokens
        buffer = Buffer(options.batch_size, LIVE_BATCHES, draw if options.shuffle else None, total)
        for numbers, vectors in buffer.batches(self._extraction.chunks(), drop_last=options.drop_last):
            delivered, ready = self._delivered({site: tensors.to_tensor(array) for site, array in vectors.items()})
            await_copy(ready, options.device)
            found: Any = delivered[options.sites[0]] if options.single else delivered
            if options.with_tokens:
                found = found, TokenBatch(*map(torch.from_numpy, self._extraction.of_tokens(numbers)))
            yield found

    def state_dict(self, *, batches: int | None = None) -> dict[str, Any]:
        self._require_stored()
        return super().state_dict(batches=batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._require_stored()
        super().load_state_dict(state)

    def _settled(self) -> bool:
        """Whether all is stored by now, and the stream is one of what is."""
        if self._live and (stored := self._extraction.stored()) is not None:
            self._live = False
            self._set([stored], None)
        return not self._live

    def _require_stored(self) -> None:
        if self._under_way is not None or not self._settled():
            missing = self._extraction.missing
            raise OptionError(
                f"{f'{missing} prompts are not stored yet' if missing else 'this epoch began without some prompts'}: "
                "what comes while the model runs has no order to go on in. Begin again where it was stopped: what was "
                "computed is stored."
            )

"""`ActivationStream`: batches of token vectors out of what is stored, an epoch for each iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from actcache.errors import OptionError
from actcache.store import tensors
from actcache.store.dtypes import common_dtype
from actcache.store.prompts import PromptTable
from actcache.store.statistics import Moments, SiteStatistics, as_float
from actcache.stream.ahead import ahead
from actcache.stream.device import Copied, await_copy, sent
from actcache.stream.epochs import Epochs, Reader, is_spawning, rank_and_world, share_of
from actcache.stream.lending import can_lend, lent
from actcache.stream.mixture import Mixture
from actcache.stream.normalize import Finish
from actcache.stream.permutation import Ints, Permutation
from actcache.stream.states import check_state
from actcache.stream.stored import Order, Tokens
from actcache.stream.tokens import TokenBatch

_STATE_VERSION = 1
# What the keys of permutations are for, besides the seed and the epoch.
_OF_TOKENS, _OF_BATCH = 0, 1


@dataclass(frozen=True)
class Options:
    """How tokens become batches; see `stream_activations`."""

    sites: tuple[str, ...]
    single: bool
    batch_size: int
    shuffle: bool
    seed: int
    dtype: torch.dtype | None
    device: torch.device
    normalize: str | None
    with_tokens: bool
    drop_last: bool
    prefetch: int
    rank: int | None
    world: int | None


class ActivationStream(IterableDataset[Any]):
    """Batches of token vectors, an epoch for each iteration; `stream_activations` makes it.

    Batches are tensors ``[batch_size, D]`` (the last of an epoch may be smaller), of several sites dicts of them; with
    `with_tokens` pairs of that and a `TokenBatch`. They are the caller's to change. What is stored later is not part of
    it; what is removed meanwhile still is.

    As a dataset of a `torch.utils.data.DataLoader` (``batch_size=None``) it splits over the workers, and over ranks:
    each batch comes from one of them, in the order that it has without.
    """

    def __init__(self, parts: Sequence[Tokens], weights: Sequence[float] | None, options: Options) -> None:
        self._prepare(options)
        self._set(parts, weights)

    def _prepare(self, options: Options) -> None:
        self._options = options
        self._epochs = Epochs()
        self._start = (0, 0)
        self._taken = 0

    def _set(self, parts: Sequence[Tokens], weights: Sequence[float] | None) -> None:
        options = self._options
        self._parts = list(parts)
        self._mixture = Mixture([len(part) for part in parts], weights)
        self._columns = {site: self._column(site) for site in options.sites}
        self._moments: dict[str, Moments] = {}
        self._finish = {
            site: Finish.made(options.normalize, options.dtype, partial(self._moments_of, site))
            for site in options.sites
        }

    def _column(self, site: str) -> tuple[np.dtype[Any], int]:
        columns = [part.column(site) for part in self._parts]
        widths = sorted({width for _, width in columns})
        if len(widths) > 1:
            raise OptionError(f"{site!r} has different widths {widths} in the sources: stream them apart.")
        return common_dtype(dtype for dtype, _ in columns), widths[0]

    # -- what there is ---------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """How many tokens an epoch has, over all ranks, those of a last batch included that `drop_last` leaves out."""
        return self._mixture.total

    @property
    def prompts(self) -> PromptTable:
        """The prompts whose tokens are streamed: `TokenBatch.prompt` are numbers of them. Of several sources one
        source after the other."""
        return PromptTable.concatenate([part.prompts for part in self._parts], mixed=True)

    @property
    def statistics(self) -> dict[str, SiteStatistics]:
        """Count, mean, variance and mean length of the tokens of an epoch, by site: what `normalize` goes by.

        Computed once: out of what is recorded where whole segments are streamed, else by reading.
        """
        return {site: SiteStatistics.of(self._moments_of(site)) for site in self._options.sites}

    def _moments_of(self, site: str) -> Moments:
        if site not in self._moments:
            total = Moments.empty(self._columns[site][1])
            for part, count in zip(self._parts, self._mixture.counts, strict=True):
                one = part.moments(site)
                share = count / len(part)
                total.merge(replace(one, count=count, m2=one.m2 * share, norms=one.norms * share))
            self._moments[site] = total
        return self._moments[site]

    def __len__(self) -> int:
        """How many batches an epoch has for this rank."""
        rank, world = self._rank()
        return share_of(self._batches(world), rank, world)

    def _batches(self, world: int) -> int:
        size, total = self._options.batch_size, self._mixture.total
        return total // size // world * world if self._options.drop_last else -(-total // size)

    def _require_batches(self) -> None:
        """OptionError where nothing comes: whoever takes epoch after epoch would wait for a batch for ever."""
        if not len(self):
            size, (rank, world) = self._options.batch_size, self._rank()
            dropped = " and drop_last=True" if self._options.drop_last else ""
            whose = f" for rank {rank} of {world}" if world > 1 else ""
            raise OptionError(f"{self.num_tokens} tokens with batch_size={size}{dropped} give no batch{whose}.")

    def _rank(self) -> tuple[int, int]:
        return rank_and_world(self._options.rank, self._options.world)

    def __repr__(self) -> str:
        return (
            f"ActivationStream({', '.join(self._options.sites)}: {self.num_tokens} tokens, {len(self)} batches of "
            f"{self._options.batch_size})"
        )

    # -- going through it ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch; those that are left of the one that `load_state_dict` has told of.

        Raises:
            OptionError: an epoch has not one batch for this rank.
        """
        self._require_batches()
        reader = self._reader()
        if reader.seed is not None and self._epochs.is_replaced:
            return _refused(
                "load_state_dict was called after these workers of a DataLoader had begun, and they do not know of it: "
                "make a new DataLoader."
            )
        epoch = self._epochs.begin(reader.seed)
        first = self._start[1] if epoch == self._start[0] else 0
        if reader.seed is None:
            self._taken = first
        elif self._options.device.type != "cpu":
            raise OptionError(
                f"device='{self._options.device}': workers of a DataLoader make batches on the CPU. Give device='cpu' "
                "here and pin_memory=True to the DataLoader."
            )
        return self._epoch(reader, epoch, first)

    def _epoch(self, reader: Reader, epoch: int, first: int) -> Iterator[Any]:
        mine = reader.batches(self._batches(reader.world), first)
        orders = [part.order(self._key(epoch, _OF_TOKENS, i)) for i, part in enumerate(self._parts)]
        # A DataLoader works ahead itself.
        depth = self._options.prefetch if reader.seed is None else 0
        lend = reader.seed is not None and can_lend()
        for batch, ready in ahead(partial(self._made, epoch, orders), mine, depth):
            await_copy(ready, self._options.device)
            if reader.seed is None and self._epochs.begun == epoch + 1:
                self._taken += 1
            yield lent(batch) if lend else batch

    def _reader(self) -> Reader:
        rank, world = self._rank()
        info = get_worker_info()
        if info is None:
            return Reader(rank, world)
        return Reader(rank, world, info.id, info.num_workers, info.seed - info.id)

    def _key(self, epoch: int, purpose: int, number: int) -> list[int] | None:
        return [self._options.seed, epoch, purpose, number] if self._options.shuffle else None

    def _made(self, epoch: int, orders: Sequence[Order], batch: int) -> tuple[Any, Copied | None]:
        """Batch number `batch` of an epoch, and what a stream of the device must wait for before it is used."""
        size, sites = self._options.batch_size, self._options.sites
        start, stop = batch * size, min((batch + 1) * size, self._mixture.total)
        shares = self._mixture.between(start, stop)
        if len(orders) == 1:
            numbers, vectors = orders[0].take(start, stop, sites)
            tokens = list(self._parts[0].tokens(numbers)) if self._options.with_tokens else []
        else:
            vectors, tokens = self._mixed(orders, shares, self._key(epoch, _OF_BATCH, batch))
        delivered, ready = self._delivered({site: tensors.to_tensor(array) for site, array in vectors.items()})
        found: Any = delivered[sites[0]] if self._options.single else delivered
        if self._options.with_tokens:
            found = found, TokenBatch(*map(torch.from_numpy, tokens))
        return found, ready

    def _mixed(
        self, orders: Sequence[Order], shares: Sequence[tuple[int, int]], key: Sequence[int] | None
    ) -> tuple[dict[str, npt.NDArray[Any]], list[Ints]]:
        """A batch of several sources, arranged as `key` says (None: source by source)."""
        total = sum(end - begin for begin, end in shares)
        places = np.arange(total) if key is None else Permutation(total, key)(np.arange(total))
        found = {site: np.empty((total, width), dtype) for site, (dtype, width) in self._columns.items()}
        tokens = np.empty((3, total), np.int64)
        prompts = 0
        for part, order, (begin, end) in zip(self._parts, orders, shares, strict=True):
            mine, places = places[: end - begin], places[end - begin :]
            numbers, vectors = order.take(begin, end, self._options.sites)
            for site, rows in vectors.items():
                found[site][mine] = as_float(rows) if rows.dtype != found[site].dtype else rows
            if self._options.with_tokens:
                prompt, position, token_id = part.tokens(numbers)
                tokens[:, mine] = prompt + prompts, position, token_id
            prompts += len(part.prompts)
        return found, list(tokens)

    def _delivered(self, vectors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Copied | None]:
        found = {
            site: self._finish[site](tensor, lambda at, site=site: f"{site}, token {at[0]} of a batch")  # type: ignore[misc]
            for site, tensor in vectors.items()
        }
        return sent(found, self._options.device)

    # -- where it stands -------------------------------------------------------------------------------

    def state_dict(self, *, batches: int | None = None) -> dict[str, Any]:
        """Where this rank stands: plain numbers and strings, to be kept with the model.

        `batches`: how many batches of the current epoch the caller has taken; only needed where workers of a DataLoader
        read the stream, which does not know how many have come.

        Raises:
            OptionError: workers read it, and `batches` is not given; this is such a worker.
        """
        if get_worker_info() is not None:
            raise OptionError(
                "a worker of a DataLoader does not know where the stream stands: ask in the process that made the "
                "loader, state_dict(batches=...). (torchdata's StatefulDataLoader asks its workers: give it "
                "num_workers=0, or use torch.utils.data.DataLoader.)"
            )
        rank, world = self._rank()
        epoch, taken = max(self._epochs.begun - 1, 0), self._taken
        if self._epochs.begun == self._start[0]:
            epoch, taken = self._start
        if not self._epochs.mine and batches is None:
            raise OptionError(
                "workers of a DataLoader read this stream, and only you know how many batches have come: "
                "state_dict(batches=...), counted since the epoch began."
            )
        taken = taken if batches is None else batches
        place = {"world_size": world, "rank": rank, "epoch": epoch, "batches": taken}
        return {**self._terms(), "sources": [part.said() for part in self._parts], **place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken: the next iteration begins with the batch behind it, with however many workers.

        What has been stored since is no part of the stream from then on, as it was none of the other one.

        Raises:
            OptionError: it is of another stream, or of another number of ranks; what differs is named.
        """
        check_state(state)
        terms = {**self._terms(), "world_size": self._rank()[1]}
        for name, value in terms.items():
            if state.get(name) != value:
                raise OptionError(f"the state is of a stream with {name}={state.get(name)!r}, this one has {value!r}.")
        self._set(self._as_before(state), self._mixture.weights)
        epoch, taken = int(state["epoch"]), int(state["batches"])
        if taken >= len(self):
            epoch, taken = epoch + 1, 0
        self._start, self._taken = (epoch, taken), taken
        self._epochs = self._epochs.replaced_by(Epochs(epoch))

    def _as_before(self, state: Mapping[str, Any]) -> list[Tokens]:
        """The sources with the prompts that they had."""
        said = state["sources"]
        if len(said) != len(self._parts):
            raise OptionError(f"the state is of a stream of {len(said)} sources, this one has {len(self._parts)}.")
        parts = []
        for part, then in zip(self._parts, said, strict=True):
            if (before := part.before(then)) is None:
                raise OptionError(
                    f"the state is of a stream of {then['prompts']} prompts that are not all among those of this one "
                    f"(of {len(part.prompts)}), or in another order, or with other tokens left out: some of what it "
                    "began with has been removed or stored anew, or prompts= or exclude= differ."
                )
            parts.append(before)
        return parts

    def _terms(self) -> dict[str, Any]:
        """What streams must have in common for one to go on where another stood, besides the tokens."""
        options = self._options
        return {
            "version": _STATE_VERSION,
            "sites": list(options.sites),
            "batch_size": options.batch_size,
            "shuffle": options.shuffle,
            "seed": options.seed,
            "drop_last": options.drop_last,
            "weights": self._mixture.weights,
        }

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if is_spawning():
            # Where the workers start anew nobody has told them of the ranks.
            rank, world = self._rank()
            state["_options"] = replace(self._options, rank=rank, world=world)
        return state


def _refused(why: str) -> Iterator[Any]:
    """An iterator that raises: what `__iter__` raises in a worker that persists ends it without a word."""
    raise OptionError(why)
    yield

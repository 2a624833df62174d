"""Which blocks of a segment are intact: each is read and hashed once per process, whoever asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.store import mirror
from actcache.store.block_groups import BlockGroup, Ranges, Shape, marked
from actcache.store.container import Tensor
from actcache.store.fetcher import Fetcher
from actcache.store.fetching import fetch
from actcache.store.lazy import lazy
from actcache.store.mapped import MappedFile
from actcache.store.records import BLOCK
from actcache.store.wanted import Blocks, Wanted

Ints = npt.NDArray[np.int64]

_UNKNOWN, _GOOD, _DAMAGED = 0, 1, 2
# Blocks that are mapped and hashed in one go, and for how many such pieces the disk is asked ahead of that.
_PIECE, _AHEAD = 8, 32
_MOST_KEPT = 64


class BlockChecks:
    """The checksums of a mapped segment, and what is known of its blocks.

    `parts`: for each site the tensors that hold it, its matrix and its scales, in the order of the file; `checksum`
    uint64, one for each of their blocks; `block_offset` says which rows share scales. `source`: where the blocks of a
    mirror come from that are not in it yet; None for a file that is whole.
    """

    def __init__(
        self,
        file: MappedFile,
        parts: Mapping[str, Sequence[Tensor]],
        checksum: npt.NDArray[np.uint64],
        block_offset: Ints,
        source: Fetcher | None = None,
    ) -> None:
        self._file = file
        self.source = source
        self._parts = parts
        self._checksum = checksum
        self._block_offset = block_offset
        self._shape: dict[str, Shape] = {}
        self._first: dict[str, int] = {}
        first = 0
        for site, tensors in parts.items():
            self._shape[site] = tuple((t.shape[1] * t.dtype.itemsize, blocks_of(t)) for t in tensors)
            self._first[site] = first
            first += sum(map(blocks_of, tensors))
        self._known = bytearray(first)
        self._state: npt.NDArray[np.uint8] = np.frombuffer(self._known, np.uint8)
        """The same memory: of neighbours bytes are counted faster than an array is looked at."""
        self._clean: set[str] = set()
        self._grouped: dict[tuple[str, ...], list[BlockGroup]] = {}
        self._asked: set[tuple[int, int]] = set()

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._state)

    def all_good(self, sites: Iterable[str]) -> bool:
        """Whether every block of all `sites` has been checked and is good."""
        return self._clean.issuperset(sites)

    def good(self, sites: Sequence[str], starts: Ints, stops: Ints | None = None) -> bool:
        """Whether the rows ``starts[i]:stops[i]`` of all `sites` have been checked and are good; reads nothing.

        `stops`: None for one row each.
        """
        for group in self._groups(tuple(sites)):
            if stops is None and group.knows_rows(starts):
                continue
            ranges = self._touched(group.shape, starts, starts + 1 if stops is None else stops)
            if group.knows(ranges):
                continue
            blocks = group.marked(ranges)
            if (self._state[group.first[:, None] + blocks] != _GOOD).any():
                return False
            group.learn(blocks)
            if group.known.all():
                self._clean.update(group.sites)
        return True

    def verify(self, sites: Sequence[str], starts: Ints, stops: Ints) -> npt.NDArray[np.bool_]:
        """Whether the rows ``starts[i]:stops[i]`` of each of `sites` are intact, bool ``[sites, len(starts)]``."""
        intact = np.ones((len(sites), len(starts)), bool)
        row = {site: i for i, site in enumerate(sites)}
        if self.source is not None:
            self._see_to(sites, starts, stops)
        for shape, alike in self._by_shape(s for s in sites if s not in self._clean).items():
            ranges = self._touched(shape, starts, stops)
            blocks = marked(ranges, sum(count for _, count in shape))
            for site in alike:
                state = self._check(site, blocks)
                if (state == _DAMAGED).any():
                    before = np.zeros(len(state) + 1, np.int64)
                    np.cumsum(state == _DAMAGED, out=before[1:])
                    for low, high in ranges:
                        intact[row[site]] &= before[high] == before[low]
                elif (state == _GOOD).all():
                    self._clean.add(site)
        return intact

    def ask(self, sites: Sequence[str], starts: Ints, stops: Ints, most: int) -> int:
        """Ask the disk for what `verify` would hash, for up to `most` bytes and a few; how many it was asked for."""
        asked = 0
        if self.source is not None:
            # Much of it is not on the disk: `fetch_together` asks for that.
            return 0
        for shape, alike in self._by_shape(s for s in sites if s not in self._clean).items():
            blocks = marked(self._touched(shape, starts, stops), sum(count for _, count in shape))
            for site in alike:
                for tensor, mine, _ in self._unknown(site, blocks):
                    for piece in _pieces(mine):
                        if asked >= most:
                            return asked
                        asked += self._ask(tensor, piece)
        return asked

    def _ask(self, tensor: Tensor, blocks: Ints) -> int:
        """Ask the disk for neighbouring `blocks` of `tensor`, unless it was asked for them before; their bytes."""
        start, stop = _span(tensor, blocks)
        # To ask again for what is on its way costs as much as to ask.
        if (start, stop) not in self._asked:
            self._asked.add((start, stop))
            self._file.will_need(start, stop)
        return stop - start

    def damaged(self, site: str) -> Ints:
        """Numbers of the blocks of `site` that fail their checksum, its scales behind its rows; reads all of it."""
        if self.source is not None:
            self._fetch_unknown(self._first[site] + np.arange(sum(count for _, count in self._shape[site])))
        state = self._check(site, np.arange(sum(count for _, count in self._shape[site])))
        return np.flatnonzero(state == _DAMAGED)

    def intact_here(self) -> npt.NDArray[np.bool_]:
        """Which of all blocks the file itself holds intact; for one that is whole, of which every byte is read."""
        assert self.source is None
        for site, shape in self._shape.items():
            self._check(site, np.arange(sum(count for _, count in shape)))
        good: npt.NDArray[np.bool_] = self._state == _GOOD
        return good

    # -- blocks that may not be here yet ---------------------------------------------------------------------

    def absent(self, sites: Sequence[str], starts: Ints, stops: Ints) -> Wanted | None:
        """What of these rows of a mirror has neither been checked nor is said to be there; None where all is here."""
        if self.source is None or self.all_good(sites):
            return None
        return self._absent(self._numbers(sites, starts, stops))

    def check_source(self) -> None:
        """Read every block of the object itself, and take what is found there for what is known of it.

        Only for whoever asks how the object is: what is in the mirror may be something else.
        """
        every = np.arange(len(self._state))
        if self.source is not None and len(every):
            self.source.settle()
            self._state[:] = _UNKNOWN
            self._clean.clear()
            self._grouped.clear()
            fetch([self._wanted(every)], keep=False)

    @lazy
    def spans(self) -> tuple[Ints, Ints]:
        """Where in the file each of all blocks begins and ends."""
        starts, stops = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for tensors in self._parts.values():
            for tensor in tensors:
                first = tensor.start + np.arange(blocks_of(tensor), dtype=np.int64) * BLOCK
                starts.append(first)
                stops.append(np.minimum(first + BLOCK, tensor.stop))
        return np.concatenate(starts), np.concatenate(stops)

    def _numbers(self, sites: Sequence[str], starts: Ints, stops: Ints) -> Ints | slice:
        """The blocks of all `sites` that hold these rows, among those of the whole segment."""
        starts, stops = _joined(starts, stops)
        if len(starts) == len(sites) == len(self._shape[sites[0]]) == 1:
            width, first = self._shape[sites[0]][0][0], self._first[sites[0]]
            low = starts.item() * width // BLOCK
            return slice(first + low, first + max(low, -(-stops.item() * width // BLOCK)))
        found = [np.empty(0, np.int64)]
        for shape, alike in self._by_shape(sites).items():
            blocks = marked(self._touched(shape, starts, stops), sum(count for _, count in shape))
            found += [self._first[site] + blocks for site in alike]
        return found[1] if len(found) == 2 else np.concatenate(found)

    def _absent(self, which: Ints | slice) -> Wanted | None:
        assert self.source is not None
        self.source.settle()
        if isinstance(which, slice):
            first, end = which.start, which.stop
            unknown = self._known.count(_UNKNOWN, first, end)
            if not unknown:
                return None
            marks = self.source.marks(first, end)
            if unknown == end - first and mirror.THERE not in marks:
                return self._wanted(which)
            missing = np.frombuffer(marks, np.uint8) != mirror.THERE
        elif (self._state[which] != _UNKNOWN).all():
            return None
        else:
            marks = self.source.marks(0, len(self._known))
            missing = np.frombuffer(marks, np.uint8)[which] != mirror.THERE
        some = _numbers_of(which)[missing & (self._state[which] == _UNKNOWN)]
        return self._wanted(some) if len(some) else None

    def _wanted(self, which: Ints | slice) -> Wanted:
        """`which`: as a slice blocks of one tensor."""
        assert self.source is not None
        return Wanted(self.source, self._all_blocks, which, self._done)

    @lazy
    def _all_blocks(self) -> Blocks:
        return Blocks(*self.spans, self._checksum)

    def _done(self, numbers: Ints, good: bool) -> None:
        # What somebody else has read rightly in the meantime stays right.
        self._state[numbers if good else numbers[self._state[numbers] == _UNKNOWN]] = _GOOD if good else _DAMAGED

    def _see_to(self, sites: Sequence[str], starts: Ints, stops: Ints) -> None:
        wanted = [site for site in sites if site not in self._clean]
        if wanted:
            self._fetch_unknown(_numbers_of(self._numbers(wanted, starts, stops)))

    def _fetch_unknown(self, numbers: Ints) -> None:
        """See to it that all is known of these blocks of a mirror.

        What is said to be there is hashed; what of that is wrong (after a loss of power, say) is read anew.
        """
        assert self.source is not None
        absent = self._absent(numbers)
        if absent is not None:
            fetch([absent])
        unknown = np.sort(numbers[self._state[numbers] == _UNKNOWN])
        if not len(unknown):
            return
        data, digest = self._file.raw, xxhash.xxh3_64_intdigest
        starts, stops = self.spans
        for piece in _pieces(unknown):
            # Neighbours in number lie one behind the other in the file, but for gaps.
            self._file.populate(int(starts[piece[0]]), int(stops[piece[-1]]))
            for number in piece.tolist():
                if digest(data[int(starts[number]) : int(stops[number])]) == int(self._checksum[number]):
                    self._state[number] = _GOOD
        wrong = unknown[self._state[unknown] == _UNKNOWN]
        if len(wrong):
            self.source.mark(wrong, there=False)
            fetch([self._wanted(wrong)])

    def _by_shape(self, sites: Iterable[str]) -> dict[Shape, list[str]]:
        """Sites whose blocks hold the same rows, which they do in most segments: what they touch is found once."""
        found: dict[Shape, list[str]] = {}
        for site in sites:
            found.setdefault(self._shape[site], []).append(site)
        return found

    def missing(self, sites: Sequence[str], starts: Ints, stops: Ints) -> tuple[Wanted | None, bool]:
        """`absent`, and whether an answer can be made of that alone: nothing is here, and little more is read."""
        if self.source is None or self.all_good(sites):
            return None, False
        starts, stops = _joined(starts, stops)
        which = self._numbers(sites, starts, stops)
        found = self._absent(which)
        count = which.stop - which.start if isinstance(which, slice) else len(which)
        if found is None or found.count < count:
            return found, False
        width = 0
        for site in sites:
            (first, *others) = self._shape[site]
            if others:
                return found, False
            width += first[0]
        # Rows that somebody keeps keep all that came with them.
        rows = stops.item() - starts.item() if len(starts) == 1 else int((stops - starts).sum())
        return found, 2 * rows * width >= found.nbytes

    def _groups(self, sites: tuple[str, ...]) -> list[BlockGroup]:
        """`_by_shape`, and what is known of each; kept for whoever asks for the same sites again."""
        found = self._grouped.get(sites)
        if found is None:
            by_shape = self._by_shape(sites).items()
            found = [BlockGroup(shape, alike, [self._first[s] for s in alike], BLOCK) for shape, alike in by_shape]
            if len(self._grouped) < _MOST_KEPT:
                self._grouped[sites] = found
        return found

    def _touched(self, shape: Shape, starts: Ints, stops: Ints) -> Ranges:
        """The blocks that hold these rows, and those that hold their scales: first and one behind the last of each."""
        ranges, before = [], 0
        rows = starts, stops
        for width, count in shape:
            low = rows[0] * width // BLOCK
            high = np.maximum(-(-(rows[1] * width) // BLOCK), low)
            ranges.append((before + low, before + high))
            before += count
            if len(shape) > 1:
                first = np.searchsorted(self._block_offset, starts, "right") - 1
                rows = first, np.maximum(np.searchsorted(self._block_offset, stops, "left"), first)
        return ranges

    def _check(self, site: str, blocks: Ints) -> npt.NDArray[np.uint8]:
        """What is known of the blocks of `site` once those of `blocks` that were not known have been hashed."""
        for tensor, mine, before in self._unknown(site, blocks):
            first = self._first[site] + before
            every = slice(first, first + blocks_of(tensor))
            pieces = _pieces(mine)
            for i, piece in enumerate(pieces):
                for coming in pieces[i + _AHEAD - 1 : i + _AHEAD] if i else pieces[:_AHEAD]:
                    self._ask(tensor, coming)
                self._hash(tensor, piece, self._checksum[every], self._state[every])
        return self._state_of(site)

    def _state_of(self, site: str) -> npt.NDArray[np.uint8]:
        first = self._first[site]
        return self._state[first : first + sum(count for _, count in self._shape[site])]

    def _unknown(self, site: str, blocks: Ints) -> Iterator[tuple[Tensor, Ints, int]]:
        """Those of `blocks` of `site` that have not been hashed: each tensor, its own, and how many come before it."""
        wanted = blocks[self._state_of(site)[blocks] == _UNKNOWN]
        before = 0
        for tensor in self._parts[site] if len(wanted) else ():
            count = blocks_of(tensor)
            yield tensor, wanted[(wanted >= before) & (wanted < before + count)] - before, before
            before += count

    def _hash(
        self, tensor: Tensor, blocks: Ints, expected: npt.NDArray[np.uint64], state: npt.NDArray[np.uint8]
    ) -> None:
        """Hash neighbouring `blocks` of `tensor`, and note in `state` how they are."""
        self._file.populate(*_span(tensor, blocks))
        data, digest = self._file.raw, xxhash.xxh3_64_intdigest
        for block, checksum in zip(blocks.tolist(), expected[blocks].tolist(), strict=True):
            start = tensor.start + block * BLOCK
            right = digest(data[start : min(start + BLOCK, tensor.stop)]) == checksum
            state[block] = _GOOD if right else _DAMAGED


def _numbers_of(which: Ints | slice) -> Ints:
    """Blocks by their numbers, of neighbours that may be given as a slice."""
    return np.arange(which.start, which.stop) if isinstance(which, slice) else which


def _joined(starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """Rows ``starts[i]:stops[i]``; as one range where each begins at the end of the one before it."""
    # As the prompts of a layer usually do: they touch what the first and the last touch.
    if len(starts) > 1 and (starts[1:] == stops[:-1]).all():
        return starts[:1], stops[-1:]
    return starts, stops


def blocks_of(tensor: Tensor) -> int:
    """How many blocks a tensor has."""
    return -(-tensor.nbytes // BLOCK)


def _pieces(blocks: Ints) -> list[Ints]:
    """Ascending `blocks` in runs of neighbours, none longer than `_PIECE`."""
    runs = np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1)
    return [run[i : i + _PIECE] for run in runs for i in range(0, len(run), _PIECE)]


def _span(tensor: Tensor, blocks: Ints) -> tuple[int, int]:
    """Where in the file neighbouring blocks of `tensor` begin and end."""
    return tensor.start + int(blocks[0]) * BLOCK, min(tensor.start + (int(blocks[-1]) + 1) * BLOCK, tensor.stop)

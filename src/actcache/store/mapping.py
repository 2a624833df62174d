"""A segment as a reader sees it: mapped, checked, its rows as views."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.errors import FormatError
from actcache.store import container
from actcache.store.mapped import MappedFile
from actcache.store.prompts import CHAT, PromptTable
from actcache.store.records import BLOCK, FORMAT, INDEX_TENSORS, TOKENS, VERSION, SegmentInfo, is_layout
from actcache.store.statistics import Moments, is_float

Ints = npt.NDArray[np.int64]

_FEW = 16
_UNKNOWN, _GOOD, _DAMAGED = 0, 1, 2
_INDEX_DTYPES = {
    "digest": "<u8", "row_offset": "<i8", "token_offset": "<i8", "text_offset": "<i8", "checksum": "<u8",
    "moments": "<f8", "prompt_key": "u1", "text_key": "u1", "token_ids": "<i4", "kind": "u1", "text": "u1",
}  # fmt: skip


class Segment:
    """A mapped segment. What was mapped stays readable after the file is renamed or unlinked.

    `info`, `prompts` (a `PromptTable` of views), `row_offset` int64 ``[n + 1]``; `matrix(site)` is a read-only
    view ``[rows, D]`` of data that `verify` has checked or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = os.fstat(fd).st_size
            head = _read(fd, container.header_size(os.pread(fd, 8, 0), size))
            self.metadata, self._tensors = container.parse(head, size)
            self._check_metadata()
            self._file = MappedFile(fd, size)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        except OverflowError as error:
            raise FormatError(f"{path}: {error}") from None
        finally:
            os.close(fd)
        self._raw, self._bytes = self._file.raw, self._file.array
        try:
            self._read_index(head)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        self._state: dict[str, npt.NDArray[np.uint8]] = {}
        self._clean: set[str] = set()

    def _check_metadata(self) -> None:
        meta = self.metadata
        if meta.get("format") != FORMAT:
            raise FormatError("not a segment of actcache (no format in its metadata)")
        if meta.get("version", "").split(".")[0] != VERSION.split(".")[0]:
            raise FormatError(
                f"format version {meta.get('version')!r}, this actcache reads {VERSION}: install a newer actcache"
            )
        created = re.fullmatch(r"[0-9]{1,19}", meta.get("created_ns", ""))
        if not is_layout(meta.get("layout", "")) or not created or int(created[0]) >= 1 << 63:
            raise FormatError("layout or creation time missing")
        for name in INDEX_TENSORS:
            tensor = self._tensors.get(name)
            if tensor is None or tensor.dtype != np.dtype(_INDEX_DTYPES[name]):
                raise FormatError(f"index tensor {name!r} is missing or has the wrong dtype")
            if len(tensor.shape) != (2 if name.endswith("_key") else 1):
                raise FormatError(f"index tensor {name!r} has the wrong shape {tensor.shape}")

    def _read_index(self, head: bytes) -> None:
        prefix = "" if self.layout == TOKENS else f"{self.layout}/"
        data: dict[str, container.Tensor] = {}
        for tensor in sorted(self._tensors.values(), key=lambda t: t.start):
            if tensor.name in INDEX_TENSORS or tensor.name.startswith("pad."):
                continue
            site = tensor.name.removeprefix(prefix)
            if not tensor.name.startswith(prefix) or not site or "/" in site or len(tensor.shape) != 2:
                raise FormatError(f"tensor {tensor.name!r} does not belong to layout {self.layout!r}")
            data[site] = tensor
        if not data:
            raise FormatError("no data tensor")
        start = min(t.start for t in data.values())
        digest = self._tensors["digest"]
        if (
            digest.start != len(head)
            or digest.shape != (2,)
            or self._tensors["text"].stop > start
            or start % container.ALIGN
        ):
            raise FormatError("index tensors do not come first")
        stored = self._array("digest")
        if int(stored[0]) != xxhash.xxh3_64_intdigest(head):
            raise FormatError("header is damaged (its digest does not match)")
        if int(stored[1]) != xxhash.xxh3_64_intdigest(self._raw[digest.stop : start]):
            raise FormatError("index is damaged (its digest does not match)")
        self._data = data
        self._check_index()
        columns = tuple((site, container.code_of(t.dtype), t.shape[1]) for site, t in data.items())
        meta = self.metadata
        self.info = SegmentInfo(
            self.path.name[:32], meta.get("space", ""), self.layout, columns, len(self.prompts),
            int(self.row_offset[-1]), len(self._bytes), int(meta["created_ns"]), self.prompts.text_context,
            _replaces(meta.get("replaces", "{}")), self.prompts.token_key, self.prompts.text_key,
        )  # fmt: skip

    def _check_index(self) -> None:
        offsets = {name: self._array(name) for name in ("row_offset", "token_offset", "text_offset")}
        n = len(offsets["row_offset"]) - 1
        kind, token_key, text_key = self._array("kind"), self._array("prompt_key"), self._array("text_key")
        token_ids, text = self._array("token_ids"), self._array("text")
        rows = int(offsets["row_offset"][-1]) if n >= 0 else -1
        for name, ends in (("row_offset", rows), ("token_offset", len(token_ids)), ("text_offset", len(text))):
            offset = offsets[name]
            # Compared, not subtracted: differences of hostile numbers may overflow to something sensible.
            falls = (offset[1:] < offset[:-1]).any()
            if n < 1 or len(offset) != n + 1 or falls or offset[0] != 0 or offset[-1] != ends:
                raise FormatError(f"{name} does not describe {n} prompts")
        if len(kind) != n or token_key.shape != (n, 16) or text_key.shape != (n, 16) or int(kind.max()) > CHAT:
            raise FormatError("keys or kinds do not match the number of prompts")
        expected = offsets["token_offset"] if self.layout == TOKENS else np.arange(n + 1)
        if not np.array_equal(offsets["row_offset"], expected):
            raise FormatError(f"row_offset does not fit layout {self.layout!r}")
        blocks = moments = 0
        self._first_block: dict[str, int] = {}
        self._first_moment: dict[str, int] = {}
        for site, tensor in self._data.items():
            if tensor.shape[0] != rows:
                raise FormatError(f"{site}: {tensor.shape[0]} rows, expected {rows}")
            self._first_block[site] = blocks
            blocks += -(-tensor.nbytes // BLOCK)
            if is_float(tensor.dtype):
                self._first_moment[site] = moments
                moments += 2 * tensor.shape[1]
        self._checksum, self._moments = self._array("checksum"), self._array("moments")
        if len(self._checksum) != blocks or len(self._moments) != moments:
            raise FormatError("checksum or moments do not match the data")
        self.row_offset: Ints = offsets["row_offset"]
        self.prompts = PromptTable(
            token_ids, offsets["token_offset"], kind, text, offsets["text_offset"],
            self.metadata.get("text_context", ""), token_key, text_key,
        )  # fmt: skip

    @property
    def layout(self) -> str:
        return self.metadata["layout"]

    def _array(self, name: str) -> npt.NDArray[Any]:
        return self._view(self._tensors[name])

    def _view(self, tensor: container.Tensor) -> npt.NDArray[Any]:
        return self._bytes[tensor.start : tensor.stop].view(tensor.dtype).reshape(tensor.shape)

    def matrix(self, site: str) -> npt.NDArray[Any]:
        """The rows of `site`, a read-only view ``[rows, D]``."""
        return self._view(self._data[site])

    def column(self, site: str) -> tuple[np.dtype[Any], int]:
        """Dtype and width of the matrix of `site`."""
        tensor = self._data[site]
        return tensor.dtype, tensor.shape[1]

    def is_verified(self, sites: Sequence[str]) -> bool:
        """Whether every block of all `sites` has been checked and is good."""
        return self._clean.issuperset(sites)

    def start_of(self, site: str) -> int:
        """Where in the file the matrix of `site` begins."""
        return self._data[site].start

    def moments(self, site: str) -> Moments | None:
        """The recorded moments of all rows of `site`; None for integers."""
        first = self._first_moment.get(site)
        if first is None:
            return None
        dim = self._data[site].shape[1]
        both = self._moments[first : first + 2 * dim]
        return Moments(self.info.rows, both[:dim].copy(), both[dim:].copy())

    def holds(self, what: str, prompts: Ints, content: list[bytes]) -> npt.NDArray[np.bool_]:
        """Whether the "token" ids or the "text" of `prompts` are exactly `content`, bool ``[len(prompts)]``."""
        offset, name = (
            (self.prompts.token_offset, "token_ids") if what == "token" else (self.prompts.text_offset, "text")
        )
        tensor = self._tensors[name]
        width = tensor.dtype.itemsize
        starts = offset[prompts] * width + tensor.start
        stops = offset[prompts + 1] * width + tensor.start
        data = self._file.bytes
        if len(prompts) > _FEW and self._holds_runs(prompts, starts, stops, content):
            return np.ones(len(prompts), bool)
        pieces = zip(starts.tolist(), stops.tolist(), content, strict=True)
        return np.fromiter((data(a, b) == c for a, b, c in pieces), bool, len(prompts))

    def _holds_runs(self, prompts: Ints, starts: Ints, stops: Ints, content: list[bytes]) -> bool:
        """Whether all is equal, with one comparison for each run of neighbours, the usual case; False: look closer."""
        order = np.argsort(prompts, kind="stable")
        cuts = np.flatnonzero(np.diff(prompts[order]) != 1) + 1
        lengths = np.fromiter(map(len, content), np.int64, len(content))
        if len(cuts) * 8 >= len(prompts) or not np.array_equal(stops - starts, lengths):
            return False
        joined = [content[i] for i in order.tolist()]
        first, last = starts[order].tolist(), stops[order].tolist()
        edges = [0, *cuts.tolist(), len(prompts)]
        data = self._file.bytes
        return all(data(first[a], last[b - 1]) == b"".join(joined[a:b]) for a, b in pairwise(edges))

    def verify(self, site: str, starts: Ints, stops: Ints) -> npt.NDArray[np.bool_]:
        """Whether the rows ``starts[i]:stops[i]`` of `site` are intact, bool ``[len(starts)]``.

        Each block is read and hashed once per process, whoever asks.
        """
        good = np.ones(len(starts), bool)
        if site in self._clean or not len(starts):
            return good
        tensor = self._data[site]
        width = tensor.shape[1] * tensor.dtype.itemsize
        low = starts * width // BLOCK
        high = np.maximum(-(-(stops * width) // BLOCK), low)
        state = self._verify_blocks(site, low, high)
        if (state == _DAMAGED).any():
            before = np.zeros(len(state) + 1, np.int64)
            np.cumsum(state == _DAMAGED, out=before[1:])
            good = before[high] == before[low]
        elif (state == _GOOD).all():
            self._clean.add(site)
        return good

    def damaged_blocks(self, site: str) -> Ints:
        """Numbers of the blocks of `site` that fail their checksum; reads all of it."""
        rows = self.info.rows
        self.verify(site, np.array([0]), np.array([rows]))
        return np.flatnonzero(self._blocks(site) == _DAMAGED)

    def _blocks(self, site: str) -> npt.NDArray[np.uint8]:
        if site not in self._state:
            self._state[site] = np.zeros(-(-self._data[site].nbytes // BLOCK), np.uint8)
        return self._state[site]

    def _verify_blocks(self, site: str, low: Ints, high: Ints) -> npt.NDArray[np.uint8]:
        state = self._blocks(site)
        change = np.zeros(len(state) + 1, np.int64)
        np.add.at(change, low, 1)
        np.add.at(change, high, -1)
        wanted = np.flatnonzero((np.cumsum(change[:-1]) > 0) & (state == _UNKNOWN))
        if not len(wanted):
            return state
        tensor, first = self._data[site], self._first_block[site]
        self._populate(tensor, wanted)
        data, digest = self._raw, xxhash.xxh3_64_intdigest
        expected = self._checksum[first + wanted].tolist()
        for block, checksum in zip(wanted.tolist(), expected, strict=True):
            start = tensor.start + block * BLOCK
            right = digest(data[start : min(start + BLOCK, tensor.stop)]) == checksum
            state[block] = _GOOD if right else _DAMAGED
        return state

    def _populate(self, tensor: container.Tensor, blocks: Ints) -> None:
        breaks = np.flatnonzero(np.diff(blocks) > 1) + 1
        for run in np.split(blocks, breaks):
            start = tensor.start + int(run[0]) * BLOCK
            self._file.populate(start, min(tensor.start + (int(run[-1]) + 1) * BLOCK, tensor.stop))


def _read(fd: int, size: int) -> bytes:
    data = os.pread(fd, size, 0)
    if len(data) != size:
        raise FormatError("file is shorter than its header says")
    return data


def _replaces(text: str) -> dict[str, tuple[str, ...]]:
    try:
        table = json.loads(text)
        return {str(k): tuple(str(x) for x in v) for k, v in table.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise FormatError("replaces is not a table of tombs per segment") from None

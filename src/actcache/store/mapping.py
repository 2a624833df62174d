"""A segment as a reader sees it: mapped, checked, its rows as views."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.errors import FormatError, NotCachedError
from actcache.store import container
from actcache.store.casting import CastError
from actcache.store.checks import BlockChecks, blocks_of
from actcache.store.contents import Contents
from actcache.store.dtypes import SCALED, is_quantised, value_dtype
from actcache.store.fetcher import Fetcher
from actcache.store.files import open_plain
from actcache.store.lazy import lazy
from actcache.store.mapped import MappedFile
from actcache.store.prompts import CHAT, PromptTable
from actcache.store.quantize import BLOCK_ROWS, decode_run
from actcache.store.records import (
    FORMAT,
    INDEX_TENSORS,
    JOURNAL,
    SCALE,
    SPARSE,
    TOKENS,
    SegmentInfo,
    check_index_tensors,
    check_version,
    is_layout,
    read_replaces,
)
from actcache.store.statistics import Moments, is_float

if TYPE_CHECKING:
    from actcache.store.working_copy import WorkingCopy

Ints = npt.NDArray[np.int64]
Reader = Callable[[int, int], npt.NDArray[Any]]

_MOST_KEPT = 64


class Segment:
    """A mapped segment. What was mapped stays readable after the file is renamed or unlinked.

    `info`, `prompts` (a `PromptTable` of views), `row_offset` int64 ``[n + 1]``; `matrix(site)` is a read-only
    view ``[rows, D]`` of data that `checks` has verified or not, and `values(site, start, stop)` what it stands for.
    `copy`: the working copy in which the file may be a mirror. Of a mirror (`source`) nothing is read but through
    `values` and `reader`, or after `require`: what else is mapped of it may be holes.
    """

    source: Fetcher | None = None
    """Where the rows of a mirror come from; None for a file that is whole."""

    def __init__(self, path: Path, copy: WorkingCopy | None = None) -> None:
        self.path = path
        fd = open_plain(path)
        try:
            size = os.fstat(fd).st_size
            head = _read(fd, container.header_size(os.pread(fd, 8, 0), size))
            self.metadata, self._tensors = container.parse(head, size)
            self._check_metadata()
            self._file = MappedFile(fd, size)
            if copy is not None:
                self.source = copy.fetcher(path, fd)
        except FormatError as error:
            raise type(error)(f"{path}: {error}") from None
        except OverflowError as error:
            raise FormatError(f"{path}: {error}") from None
        finally:
            os.close(fd)
        self._raw, self._bytes = self._file.raw, self._file.array
        try:
            self._read_index(head)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None

    def _check_metadata(self) -> None:
        meta = self.metadata
        if meta.get("format") != FORMAT:
            raise FormatError("not a segment of actcache (no format in its metadata)")
        check_version(meta.get("version", ""))
        created = re.fullmatch(r"[0-9]{1,19}", meta.get("created_ns", ""))
        if not is_layout(meta.get("layout", "")) or not created or int(created[0]) >= 1 << 63:
            raise FormatError("layout or creation time missing")
        check_index_tensors(self._tensors, INDEX_TENSORS)

    def _read_index(self, head: bytes) -> None:
        prefix = "" if self.layout == TOKENS else f"{self.layout}/"
        data: dict[str, container.Tensor] = {}
        scales: dict[str, container.Tensor] = {}
        last = ""
        for tensor in sorted(self._tensors.values(), key=lambda t: t.start):
            if tensor.name in INDEX_TENSORS or tensor.name.startswith("pad."):
                continue
            site = tensor.name.removeprefix(prefix)
            if tensor.name.endswith(SCALE):
                if tensor.name != f"{prefix}{last}{SCALE}" or last not in data:
                    raise FormatError(f"tensor {tensor.name!r} does not follow what it scales")
                scales[last] = tensor
                continue
            last = site
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
            or max(self._tensors[name].stop for name in INDEX_TENSORS) > start
            or start % container.ALIGN
        ):
            raise FormatError("index tensors do not come first")
        for advise in (self._file.will_need, self._file.populate):
            advise(digest.start, start)
        stored = self._array("digest")
        if int(stored[0]) != xxhash.xxh3_64_intdigest(head):
            raise FormatError("header is damaged (its digest does not match)")
        if int(stored[1]) != xxhash.xxh3_64_intdigest(self._raw[digest.stop : start]):
            raise FormatError("index is damaged (its digest does not match)")
        self._data, self._scales = data, scales
        self._check_index()
        columns = tuple((site, self._code(site), t.shape[1]) for site, t in data.items())
        meta = self.metadata
        self.info = SegmentInfo(
            self.path.name[:32], meta.get("space", ""), self.layout, columns, len(self.prompts),
            int(self.row_offset[-1]), len(self._bytes), int(meta["created_ns"]), self.prompts.text_context,
            read_replaces(meta.get("replaces", "{}")), self.prompts.token_key, self.prompts.text_key,
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
        if self.layout != SPARSE and not np.array_equal(offsets["row_offset"], expected):
            raise FormatError(f"row_offset does not fit layout {self.layout!r}")
        self.block_offset: Ints = self._array("block_offset")
        self._check_scales(rows)
        blocks = moments = 0
        self._first_moment: dict[str, int] = {}
        parts = {site: self.parts(site) for site in self._data}
        for site, tensor in self._data.items():
            if tensor.shape[0] != rows:
                raise FormatError(f"{site}: {tensor.shape[0]} rows, expected {rows}")
            blocks += sum(map(blocks_of, parts[site]))
            if is_float(value_dtype(self._code(site))):
                self._first_moment[site] = moments
                moments += 2 * tensor.shape[1] + 1
        checksum, self._errors = self._array("checksum"), self._array("errors")
        if len(checksum) != blocks:
            raise FormatError("checksum does not match the data")
        self._read_moments(moments)
        if self._errors.shape != (len(self._data), len(CastError().numbers)):
            raise FormatError("errors do not match the data")
        self.checks = BlockChecks(self._file, parts, checksum, self.block_offset, self.source)
        self.row_offset: Ints = offsets["row_offset"]
        self.kind_of_all = int(kind[0]) if (kind == kind[0]).all() else None
        """The kind of its prompts, where all have the same."""
        self.prompts = PromptTable(
            token_ids, offsets["token_offset"], kind, text, offsets["text_offset"],
            self.metadata.get("text_context", ""), token_key, text_key,
        )  # fmt: skip

    def _read_moments(self, numbers: int) -> None:
        self._moments = self._array("moments")
        if len(self._moments) != numbers:
            raise FormatError("moments do not match the data")

    def _check_scales(self, rows: int) -> None:
        offset = self.block_offset
        for site, scale in self._scales.items():
            tensor = self._data[site]
            if not is_quantised(tensor.dtype) or scale.dtype != np.dtype("<f4"):
                raise FormatError(f"{site}: a matrix of {tensor.dtype} has scales of {scale.dtype}")
            if scale.shape != (len(offset) - 1, *tensor.shape[1:]):
                raise FormatError(f"{site}: scales of shape {scale.shape} for {len(offset) - 1} blocks")
        # Each compared with a bound first: differences of hostile numbers may overflow to something sensible.
        inside = len(offset) and not (offset < 0).any() and not (offset > rows).any()
        steps = np.diff(offset) if inside else np.zeros(1)
        wrong = (steps < 1).any() or (steps > BLOCK_ROWS).any()
        if not inside or offset[0] != 0 or wrong or offset[-1] != (rows if self._scales else 0):
            raise FormatError("block_offset does not describe blocks of at most 64 rows")

    def _code(self, site: str) -> str:
        return container.code_of(self._data[site].dtype) + (SCALED if site in self._scales else "")

    def parts(self, site: str) -> list[container.Tensor]:
        """The tensors that hold a site: its matrix, and its scales."""
        return [self._data[site], *([self._scales[site]] if site in self._scales else [])]

    @property
    def layout(self) -> str:
        return self.metadata["layout"]

    def _array(self, name: str) -> npt.NDArray[Any]:
        return self._view(self._tensors[name])

    def _view(self, tensor: container.Tensor) -> npt.NDArray[Any]:
        return self._bytes[tensor.start : tensor.stop].view(tensor.dtype).reshape(tensor.shape)

    @property
    def raw(self) -> memoryview:
        """The bytes of the file; of a mirror only the head is sure to be there."""
        return self._raw

    def matrix(self, site: str) -> npt.NDArray[Any]:
        """The rows of `site` as they are in the file (codes, where it has `scales`), a read-only view ``[rows, D]``."""
        return self._view(self._data[site])

    def grid(self, sites: Sequence[str]) -> tuple[npt.NDArray[Any], Ints] | None:
        """A matrix that reaches over those of all `sites`, and at which of its rows each begins.

        None where they do not lie on one grid of rows, as sites of different widths in one segment may not, and where
        values must be decoded.
        """
        asked = tuple(sites)
        if asked not in self._grids:
            found = self._grid(asked)
            if len(self._grids) >= _MOST_KEPT:
                return found
            self._grids[asked] = found
        return self._grids[asked]

    @lazy
    def _grids(self) -> dict[tuple[str, ...], tuple[npt.NDArray[Any], Ints] | None]:
        """What was asked for before, which takes as long to find as a few rows to copy."""
        return {}

    def _grid(self, sites: Sequence[str]) -> tuple[npt.NDArray[Any], Ints] | None:
        tensors = [self._data[site] for site in sites]
        one = tensors[0]
        if any(
            t.shape != one.shape or t.dtype != one.dtype or site in self._scales
            for site, t in zip(sites, tensors, strict=True)
        ):
            return None
        start, width = min(t.start for t in tensors), one.shape[1] * one.dtype.itemsize
        steps = [t.start - start for t in tensors]
        if any(step % width for step in steps):
            return None
        region = self._bytes[start : start + max(steps) + one.nbytes].view(one.dtype).reshape(-1, one.shape[1])
        return region, np.array(steps) // width

    def pads(self) -> list[str]:
        """Names of the tensors between others that are not zeros, as they should be."""
        pads = [t for t in self._tensors.values() if t.name.startswith("pad.") and t.name != JOURNAL]
        return [t.name for t in pads if self._bytes[t.start : t.stop].any()]

    def scales(self, site: str) -> npt.NDArray[np.float32] | None:
        """The scales of `site`, float32 ``[blocks, D]``, a read-only view; None where the matrix holds the values."""
        return self._view(self._scales[site]) if site in self._scales else None

    def values(self, site: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop` of `site`: a read-only view, or a new float32 array where they must be decoded."""
        return self.readers([site], np.array([start]), np.array([stop]))[0](start, stop)

    def readers(self, sites: Sequence[str], starts: Ints, stops: Ints) -> list[Reader]:
        """For each of `sites` what gives `values`, for many calls: for the rows ``starts[i]:stops[i]`` and no others.

        What of them is not here yet is fetched together.
        """
        if len(starts) and (starts.min() < 0 or stops.max() > self.info.rows):
            raise NotCachedError(f"{self.path} is shorter than its index says")
        if self.source is not None:
            self.require(sites, starts, stops)
        return [self.reader(site) for site in sites]

    def reader(self, site: str) -> Reader:
        """What gives `values` of `site`, which of a mirror must be here."""
        matrix, scales, length = self.matrix(site), self.scales(site), self.info.rows

        def read(start: int, stop: int) -> npt.NDArray[Any]:
            if not 0 <= start <= stop <= length:
                raise NotCachedError(f"{self.path} is shorter than its index says")
            return matrix[start:stop] if scales is None else decode_run(matrix, scales, self.block_offset, start, stop)

        return read

    def require(self, sites: Sequence[str], starts: Ints, stops: Ints) -> None:
        """See to it that the rows ``starts[i]:stops[i]`` of a mirror are here, and right.

        Raises NotCachedError where they are gone or damaged; as the backend does where it cannot be reached.
        """
        if self.checks.all_good(sites) or self.checks.good(sites, starts, stops):
            return
        try:
            intact = self.checks.verify(sites, starts, stops)
        except FileNotFoundError:
            raise NotCachedError(f"{self.path} has gone since it was looked for: ask again") from None
        if not intact.all():
            site = sites[int(np.flatnonzero(~intact.all(axis=1))[0])]
            raise NotCachedError(f"{self.path}: {site} is damaged (checksum), and not read")

    def knows(self, sites: Sequence[str], prompts: Ints) -> bool:
        """Whether the rows of `prompts` at all `sites` have been checked and are good; reads nothing."""
        if self.layout in (TOKENS, SPARSE):
            return self.checks.good(sites, self.row_offset[prompts], self.row_offset[prompts + 1])
        return self.checks.good(sites, prompts)

    def column(self, site: str) -> tuple[np.dtype[Any], int]:
        """Dtype of the values and width of `site`."""
        return value_dtype(self._code(site)), self._data[site].shape[1]

    @lazy
    def widths(self) -> frozenset[int]:
        """The widths of all its sites."""
        return frozenset(dim for _, _, dim in self.info.columns)

    def error(self, site: str) -> CastError:
        """What storing `site` changed: of every row that was written, those included that merging has dropped."""
        rows, *numbers = self._errors[list(self._data).index(site)].tolist()
        return CastError(int(rows), *numbers)

    def start_of(self, site: str) -> int:
        """Where in the file the matrix of `site` begins."""
        return self._data[site].start

    def moments(self, site: str) -> Moments | None:
        """The recorded moments of all rows of `site`; None for integers."""
        first = self._first_moment.get(site)
        if first is None:
            return None
        dim = self._data[site].shape[1]
        mean, m2 = self._moments[first : first + 2 * dim].reshape(2, dim).copy()
        return Moments(self.info.rows, mean, m2, float(self._moments[first + 2 * dim]))

    @lazy
    def contents(self) -> dict[str, Contents]:
        """The "token" ids and the "text" of its prompts, to compare."""
        tensors, prompts = self._tensors, self.prompts
        return {
            "token": Contents(self._file, tensors["token_ids"], prompts.token_offset),
            "text": Contents(self._file, tensors["text"], prompts.text_offset),
        }


def _read(fd: int, size: int) -> bytes:
    data = os.pread(fd, size, 0)
    if len(data) != size:
        raise FormatError("file is shorter than its header says")
    return data

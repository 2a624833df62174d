"""What is remembered of checked blocks, against a plain set of those that were checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash

from actcache.store import checks as module
from actcache.store.checks import BlockChecks
from actcache.store.container import Tensor
from actcache.store.mapped import MappedFile

BLOCK, ROWS, SCALED_TOGETHER = 96, 61, 7


@pytest.mark.parametrize("width", [32, 40, 250])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_rows_are_good_once_all_of_their_blocks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, scaled: bool, damaged: bool
) -> None:
    monkeypatch.setattr(module, "BLOCK", BLOCK)
    rng = np.random.default_rng(width)
    scale_blocks = np.append(np.arange(0, ROWS, SCALED_TOGETHER), ROWS)
    tensors: dict[str, list[Tensor]] = {}
    end = 0
    for site in "abc":
        tensors[site] = []
        for rows, dtype in ((ROWS, np.dtype(np.uint8)), (len(scale_blocks) - 1, np.dtype("<f4")))[: 1 + scaled]:
            shape = (rows, width // dtype.itemsize)
            size = rows * shape[1] * dtype.itemsize
            tensors[site].append(Tensor(f"{site}{rows}", dtype, shape, end, end + size))
            end += size
    data = rng.integers(0, 256, end, np.uint8)
    sums = [
        xxhash.xxh3_64_intdigest(data[at : min(at + BLOCK, t.stop)].tobytes())
        for parts in tensors.values()
        for t in parts
        for at in range(t.start, t.stop, BLOCK)
    ]
    wrong = set()
    if damaged:
        first = tensors["b"][0]
        data[first.start + 20 * BLOCK] ^= 1
        wrong = {(first.name, 20)}
    path = tmp_path / "file"
    path.write_bytes(data.tobytes())
    fd = os.open(path, os.O_RDONLY)
    try:
        checks = BlockChecks(MappedFile(fd, end), tensors, np.array(sums, np.uint64), scale_blocks)
    finally:
        os.close(fd)

    def touched(sites: Sequence[str], starts: Sequence[int], stops: Sequence[int]) -> set[tuple[str, int]]:
        found = set()
        for start, stop in zip(starts, stops, strict=True):
            for site in sites:
                matrix, *scales = tensors[site]
                size = matrix.shape[1] * matrix.dtype.itemsize
                found |= {(matrix.name, byte // BLOCK) for byte in range(start * size, stop * size)}
                for scale in scales:
                    size = scale.shape[1] * scale.dtype.itemsize
                    for row in {row // SCALED_TOGETHER for row in range(start, stop)}:
                        found |= {(scale.name, byte // BLOCK) for byte in range(row * size, (row + 1) * size)}
        return found

    right: set[tuple[str, int]] = set()
    answers = []
    for _ in range(120):
        sites = ["abc", "ab", "c"][rng.integers(3)]
        starts = rng.integers(0, ROWS, rng.integers(1, 6))
        stops = np.minimum(starts + rng.integers(1, 7, len(starts)), ROWS)
        blocks = touched(sites, starts.tolist(), stops.tolist())
        answers.append(checks.good(list(sites), starts, stops))
        assert answers[-1] == (blocks <= right)
        alone = touched(sites, starts.tolist(), (starts + 1).tolist())
        assert checks.good(list(sites), starts) == (alone <= right)
        if rng.random() < 0.3:
            intact = checks.verify(list(sites), starts, stops)
            right |= blocks - wrong
            assert intact.all() == (not blocks & wrong)
    assert {True, False} == set(answers)
    every = [np.array([0]), np.array([ROWS])]
    assert checks.verify(list("abc"), *every).all() == (not damaged)
    assert checks.good(list("abc"), *every) == (not damaged)
    assert checks.all_good("abc") == (not damaged)
    assert checks.good(list("abc"), np.array([ROWS]), np.array([ROWS])) or damaged

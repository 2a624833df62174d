"""What makes a change another one, so that nothing made for one is taken for the other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from actcache.share.change import digest_of
from actcache.share.format import HIDDEN, HIDDEN_FILES, HIDDEN_KEYS, Shard, TensorGroup
from actcache.share.rows import Runs
from actcache.share.split import Split, SplitLayer

# Two prompts of 3 and 4 tokens, the tokens of each in two places.
RUNS = Runs(*(np.array(a) for a in ([0, 2, 4], [0, 1, 0, 1], [0, 0, 10, 10], [1, 2, 2, 2])))
GROUP = TensorGroup(HIDDEN, (0, 1), 4, None, (Shard(1, 20), Shard(1, 20)), 0, HIDDEN_FILES, HIDDEN_KEYS)
USED = {"tensors/a": "1", "tensors/b": "2"}


def digest(runs=RUNS, group=GROUP, used=USED, layers=(0, 1), dtype="f4"):
    split = Split(runs, row_bytes=16, shard_max_bytes=1000)
    reader = SimpleNamespace(group=group)
    return digest_of([SplitLayer(reader, split, layer, 4, np.dtype(dtype)) for layer in layers], used)


def test_the_same_again():
    again = Runs(*(np.array(a) for a in (RUNS.offset, RUNS.shard, RUNS.start, RUNS.length)))
    assert digest(again, replace(GROUP), dict(reversed(USED.items()))) == digest()


@pytest.mark.parametrize(
    "other",
    [
        # As many tokens of each prompt, cut elsewhere.
        {"runs": replace(RUNS, length=np.array([2, 1, 2, 2]))},
        {"runs": replace(RUNS, length=np.array([1, 2, 1, 3]))},
        {"runs": replace(RUNS, start=np.array([0, 1, 10, 10]))},
        {"runs": replace(RUNS, shard=np.array([1, 1, 0, 1]))},
        {"runs": replace(RUNS, offset=np.array([0, 1, 4]))},
        {"group": replace(GROUP, key_pattern="other.layer_{layer}")},
        {"group": replace(GROUP, shards=(Shard(1, 20, "tensors/b"), Shard(1, 20, "tensors/a")))},
        {"group": replace(GROUP, shards=(Shard(1, 19), Shard(1, 21)))},
        {"group": replace(GROUP, file_pattern="tensors/{layer:02d}_{shard}.safetensors")},
        {"used": USED | {"tensors/a": "3"}},
        {"layers": (0,)},
        {"layers": (0, 2)},
        {"dtype": "i4"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_decides_a_file(other):
    assert digest(**other) != digest()

"""Which of many prompts lie in which segment, against the plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from actcache.store.by_segment import by_segment, used_in


@pytest.mark.parametrize("n", [0, 1, 30, 900, 5000])
@pytest.mark.parametrize("segments", [1, 5, 60])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_each_part_is_one_segments(n: int, segments: int, absent: bool, ordered: bool) -> None:
    rng = np.random.default_rng(n + segments)
    segment = rng.integers(-1 if absent else 0, segments, n, np.int32)
    if ordered:
        segment.sort()
    numbers = sorted(set(segment.tolist()) - {-1})
    right = [(number, [i for i in range(n) if segment[i] == number]) for number in numbers]
    some = np.flatnonzero(segment >= 0)
    for found in (by_segment(segment), by_segment(segment, some)):
        assert [(number, members.tolist()) for number, members in found] == right
    backwards = [(number, members[::-1]) for number, members in right]
    assert [(number, members.tolist()) for number, members in by_segment(segment, some[::-1])] == backwards
    assert used_in(segment) == numbers

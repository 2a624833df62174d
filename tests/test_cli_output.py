"""What verbs print: JSON, sizes, durations, prompts on one line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from actcache.cli.output import duration, one_line, print_json, size
from actcache.model.site_list import ranges
from actcache.wording import age


@dataclass
class Report:
    place: Path
    rows: tuple[int, ...]
    best: float


def test_json_holds_dataclasses_paths_and_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    value = {
        "r": Report(Path("/a/b"), (1, 2), float("inf")),
        "n": np.float32(0.5),
        "a": np.arange(2),
        "t": "é",
        "f": True,
    }
    print_json(value)
    text = capsys.readouterr().out
    assert json.loads(text) == {
        "r": {"place": "/a/b", "rows": [1, 2], "best": None},
        "n": 0.5,
        "a": [0, 1],
        "t": "é",
        "f": True,
    }
    assert "é" in text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KB"),
        (5 * 2**20, "5.0 MB"),
        (3 * 2**40, "3072.0 GB"),
        (None, "unknown"),
    ],
)
def test_sizes(nbytes: int | None, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.012 s"),
        (1.25, "1.2 s"),
        (59.94, "59.9 s"),
        (250, "4 min 10 s"),
        (11100, "3 h 05 min"),
        (None, "unknown"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "less than a minute ago"),
        (0.55, "less than a minute ago"),
        (60, "1 min ago"),
        (3599.9, "59 min ago"),
        (3600, "1 h ago"),
        (47.9 * 3600, "47 h ago"),
        (48 * 3600, "2 days ago"),
        (1e9, "11,574 days ago"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_a_prompt_stays_on_one_line() -> None:
    assert one_line("a\nb\tc\\n") == "a\\nb\\tc\\\\n"
    assert one_line("abcdef", 4) == "abc…"


def test_runs_of_blocks_are_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"

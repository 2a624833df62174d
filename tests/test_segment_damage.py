"""Segments that are damaged, hostile or none at all are refused, or cost no more than the rows that are damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from actcache.errors import FormatError
from actcache.store import segment
from actcache.store.casting import CastError, Piece
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, Records
from actcache.store.statistics import Moments
from actcache.store.writing import Column, write_columns
from segment_helpers import HOSTILE, SPACE, hostile, write
from store_helpers import CONTEXT, flip, make_table, pooled


def test_every_flipped_byte_is_detected_or_harmless(tmp_path: Path) -> None:
    records = pooled([3, 4], sites=["resid_post.0"], dim=4)
    path = write(tmp_path, records)
    original = path.read_bytes()
    victim = tmp_path / ("f" * 32 + ".safetensors")
    detected = 0
    for at in range(len(original)):
        broken = bytearray(original)
        broken[at] ^= 0x41
        victim.write_bytes(broken)
        problems = segment.validate(victim)
        if problems:
            detected += 1
            continue
        found = segment.open(victim)
        assert found.matrix("resid_post.0").tobytes() == records.data["resid_post.0"].tobytes()
        assert found.prompts.tokens(1).tolist() == records.prompts.tokens(1).tolist()
        assert found.info.sites == ("resid_post.0",)
    # Nothing but padding behind the last index tensor is unprotected, and that is inside the index digest.
    assert detected == len(original)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path, pooled(range(3)))
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[:keep])
    with pytest.raises(FormatError, match=path.name):
        segment.open(path)


def test_damage_is_found_in_the_rows_it_touches_only(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((100, 4096)).astype(np.float32)
    path = write(tmp_path, Records.pooled(make_table(range(100)), "mean", {"x": matrix}))
    at = segment.open(path).start_of("x") + 50 * 4096 * 4
    flip(path, at)
    found = segment.open(path)
    starts = np.arange(100)
    bad = np.flatnonzero(~found.checks.verify(["x"], starts, starts + 1)[0])
    rows = BLOCK // (4096 * 4)
    assert bad.tolist() == list(range(50 // rows * rows, 50 // rows * rows + rows))
    assert segment.validate(path) == [f"x: checksum of block {50 // rows} does not match"]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / ("a" * 32 + ".safetensors")
    path.write_bytes(hostile(HOSTILE[case]))
    with pytest.raises(FormatError, match=path.name):
        segment.open(path)
    assert segment.validate(path)


def test_offsets_whose_differences_overflow_are_refused(tmp_path: Path) -> None:
    """Each is less than 2**63 above the one before it in 64-bit arithmetic, and they lie far outside the file."""
    path = write(tmp_path, pooled(range(4), sites=["x"], dim=4))
    raw = bytearray(path.read_bytes())
    found = segment.open(path)
    head = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:head])
    at = head + entries["text_offset"]["data_offsets"][0]
    last = int(found.prompts.text_offset[-1])
    raw[at : at + 40] = np.array([0, 2**63 - 1, -(2**63), -1, last], np.int64).tobytes()
    start = head + entries["last_token/x"]["data_offsets"][0]
    raw[head + 8 : head + 16] = xxhash.xxh3_64_digest(bytes(raw[head + 16 : start]))[::-1]
    hostile_path = tmp_path / ("b" * 32 + ".safetensors")
    hostile_path.write_bytes(raw)
    with pytest.raises(FormatError, match="text_offset"):
        segment.open(hostile_path)


def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 32 + ".safetensors")
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(FormatError, match="does not fit"):
        segment.open(path)


def test_untouched_hostile_frame_is_accepted(tmp_path: Path) -> None:
    """The cases above fail for their own reason, not because of how they are made."""
    path = tmp_path / ("a" * 32 + ".safetensors")
    path.write_bytes(hostile(lambda e: None))
    assert segment.open(path).info.sites == ("x",)


def test_rows_that_nobody_has_are_refused(tmp_path: Path) -> None:
    """All else fits: how long the file is, its blocks, its moments."""

    def longer(entries: dict[str, Any]) -> None:
        data = entries["last_token/x"]
        data["shape"] = [3, 4]
        data["data_offsets"][1] += 16

    path = tmp_path / ("a" * 32 + ".safetensors")
    path.write_bytes(hostile(longer) + bytes(16))
    with pytest.raises(FormatError, match="3 rows, expected 2"):
        segment.open(path)


def test_other_files_are_not_segments(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    foreign = tmp_path / ("b" * 32 + ".safetensors")
    save_file({"x": np.ones(3)}, foreign)
    assert "not a segment of actcache" in segment.validate(foreign)[0]
    assert "is not 32 hexadecimal digits" in segment.validate(tmp_path / "x.safetensors")[0]
    target = write(tmp_path, pooled([1]))
    link = tmp_path / ("c" * 32 + ".safetensors")
    os.symlink(target, link)
    assert segment.validate(link)


def test_validate_holds_keys_against_their_prompts(tmp_path: Path) -> None:
    table = make_table(range(3))
    wrong = PromptTable(
        table.token_ids, table.token_offset, table.kind, table.text, table.text_offset, CONTEXT,
        table.token_key[::-1].copy(), table.text_key,
    )  # fmt: skip
    path = write(tmp_path, Records.pooled(wrong, "mean", {"x": np.ones((3, 2), np.float32)}))
    assert any("token_key" in p for p in segment.validate(path))


@pytest.mark.parametrize(("shift", "spread"), [(0, 1), (1, 1), (0, 2)])
def test_validate_holds_moments_against_their_rows(tmp_path: Path, shift: float, spread: float) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    said = Moments.empty(3)
    said.update(rows * np.float32(spread) + np.float32([0, shift, 0]))
    info = write_columns(
        tmp_path,
        make_table(range(5)),
        "mean",
        [Column("x", "F32", 3, [Piece(rows, None, None, CastError())])],
        row_offset=np.arange(6),
        space=SPACE,
        created_ns=None,
        block_offset=np.zeros(1, np.int64),
        measured=lambda: {"x": (said, CastError())},
    )
    problems = segment.validate(tmp_path / f"{info.name}.safetensors")
    wrong = bool(shift) or spread != 1
    assert [("moments" in p, "x" in p) for p in problems] == [(True, True)] * wrong

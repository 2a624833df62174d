"""The segment format: what is written is read back, by the document and by the safetensors library too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from actcache.errors import FormatError
from actcache.store import container, segment
from actcache.store.prompts import PromptTable
from actcache.store.records import BLOCK, Records
from actcache.store.statistics import Moments
from actcache.store.writing import BlockHasher
from segment_helpers import SPACE, ragged, write
from store_helpers import CONTEXT, DTYPES, every_token, make_table, pooled


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_write_read_validate_any_records(tmp_path: Path, data: st.DataObject) -> None:
    ids = data.draw(ragged)
    layout = data.draw(st.sampled_from(["tokens", "last_token", "function:m.f:12"]))
    rows = sum(map(len, ids)) if layout == "tokens" else len(ids)
    table = PromptTable.build(ids, [f"t{i}" if i % 2 else None for i in range(len(ids))], text_context="c")
    matrices: dict[str, np.ndarray] = {}
    for site in data.draw(
        st.lists(st.sampled_from(["embed", "resid_post.5", "q.0", "decoder.mlp_out.3"]), min_size=1, unique=True)
    ):
        dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
        shape = (rows, data.draw(st.integers(0, 5)))
        raw = np.frombuffer(data.draw(st.binary(min_size=1, max_size=8)) * (rows * 5 * 8 + 8), np.uint8)
        need = shape[0] * shape[1] * dtype.itemsize
        matrices[site] = (raw[:need] & (1 if dtype == np.bool_ else 255)).view(dtype).reshape(shape)
    make = Records.tokens if layout == "tokens" else None
    records = make(table, matrices) if make else Records.pooled(table, layout, matrices)
    path = write(tmp_path, records)

    assert segment.validate(path) == []
    found = segment.open(path)
    assert found.info.sites == tuple(matrices)
    for site, matrix in matrices.items():
        assert found.matrix(site).dtype == matrix.dtype
        assert found.matrix(site).tobytes() == matrix.tobytes()
        assert not found.matrix(site).flags.writeable
    for i in range(len(ids)):
        assert found.prompts.tokens(i).tolist() == ids[i]
        assert found.prompts.text_of(i) == (f"t{i}" if i % 2 else None)
    prefix = "" if layout == "tokens" else f"{layout}/"
    with safe_open(path, "np") as other:
        assert {prefix + s for s in matrices} <= set(other.keys())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_the_safetensors_library_reads_it(tmp_path: Path, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    records = pooled(range(5), dim=3, dtype=dtype)
    path = write(tmp_path, records)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "actcache-segment"
        for site, matrix in records.data.items():
            tensor = file.get_tensor(f"last_token/{site}")
            view = tensor.view(torch.int16).numpy().view(dtype) if dtype == ml_dtypes.bfloat16 else tensor.numpy()
            assert view.tobytes() == matrix.tobytes()


def test_index_comes_first_and_everything_is_aligned(tmp_path: Path) -> None:
    path = write(tmp_path, every_token(range(7), sites=["resid_post.1", "embed", "resid_post.0"], dim=5))
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:size])
    meta = entries.pop("__metadata__")
    starts = {n: size + e["data_offsets"][0] for n, e in entries.items() if not n.startswith("pad.")}
    assert all(start % 64 == 0 for start in starts.values())
    order = sorted(starts, key=starts.__getitem__)
    assert order[0] == "digest"
    assert order[-3:] == ["resid_post.1", "embed", "resid_post.0"]
    assert meta["text_context"] == CONTEXT
    assert meta["layout"] == "tokens"
    assert entries["row_offset"]["shape"] == [8]


def test_checksums_are_those_of_the_documented_blocks(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((3, 30_000)).astype(np.float32)
    small = np.ones((3, 2), np.float32)
    parts = [pooled([i], sites=["a"]) for i in range(3)]
    for i, part in enumerate(parts):
        part.data = {"big": matrix[i : i + 1], "small": small[i : i + 1]}
    path = write(tmp_path, parts)
    with safe_open(path, "np") as file:
        stored = file.get_tensor("checksum").tolist()
    raw = matrix.tobytes()
    expected = [xxhash.xxh3_64_intdigest(raw[a : a + BLOCK]) for a in range(0, len(raw), BLOCK)]
    assert stored == [*expected, xxhash.xxh3_64_intdigest(small.tobytes())]


def test_moments_are_exact_even_for_outlier_dimensions(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    matrix = (rng.standard_normal((3000, 6)) * [1, 1, 10, 0, 1e-3, 1] + [0, 3000, -500, 7, 1e4, 0]).astype(np.float32)
    table = PromptTable.build([[i] for i in range(3000)])
    path = write(tmp_path, Records.pooled(table, "mean", {"x": matrix, "ids": np.ones((3000, 1), np.int32)}))
    moments = segment.open(path).moments("x")
    exact = matrix.astype(np.float64)
    assert moments is not None
    assert moments.count == 3000
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moments.std, exact.std(0), rtol=1e-4)
    assert moments.mean_norm == pytest.approx(np.linalg.norm(exact, axis=1).mean())
    assert segment.open(path).moments("ids") is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 4))
def test_moments_merge_to_the_moments_of_everything(sizes: list[int], dim: int) -> None:
    rng = np.random.default_rng(sum(sizes))
    parts = [rng.standard_normal((n, dim)) * 5 + 2 for n in sizes]
    total = Moments.empty(dim)
    for part in parts:
        one = Moments.empty(dim)
        one.update(part)
        total.merge(one)
    everything = np.concatenate(parts)
    assert total.count == len(everything)
    if len(everything):
        np.testing.assert_allclose(total.mean, everything.mean(0), atol=1e-9)
        np.testing.assert_allclose(total.variance, everything.var(0), atol=1e-9)


def test_records_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    table = make_table(range(3))
    good = np.zeros((3, 2), np.float32)
    for bad in (
        Records.pooled(table, "last_token", {"x": good[:2]}),
        Records.pooled(table, "last/token", {"x": good}),
        Records.pooled(table, "last_token", {"x/y": good}),
        Records.pooled(table, "last_token", {"x": np.zeros(3, np.float32)}),
        Records.pooled(table, "last_token", {}),
        Records(table, "tokens", np.arange(4), {"x": good}),
    ):
        with pytest.raises(ValueError):
            segment.write(tmp_path, bad, space=SPACE)
    with pytest.raises(FormatError, match="complex"):
        segment.write(tmp_path, Records.pooled(table, "mean", {"x": good.astype(np.complex64)}), space=SPACE)
    with pytest.raises(ValueError, match="cannot share"):
        segment.write(tmp_path, [pooled([1]), pooled([2], dim=4)], space=SPACE)
    assert not list(tmp_path.iterdir())


def test_header_encoding_covers_gaps_with_pads() -> None:
    head, placed = container.encode({}, [("a", np.dtype("u1"), (3,)), ("b", np.dtype("<f4"), (2,))])
    assert placed["a"].start == len(head)
    assert placed["b"].start % 64 == 0
    metadata, tensors = container.parse(head, placed["b"].stop)
    assert metadata == {}
    assert set(tensors) == {"a", "b", "pad.0"}


def test_the_document_is_enough_to_read_a_segment(tmp_path: Path) -> None:
    """docs/format.md, followed word by word with nothing of ours."""
    records = every_token([3, 9], dim=5)
    path = write(tmp_path, records)
    raw = path.read_bytes()
    base = 8 + int.from_bytes(raw[:8], "little")
    assert raw[8:].startswith(b'{"__metadata__":{"format":"actcache-')
    assert raw[:base].endswith((b"}", b" "))
    entries = json.loads(raw[8:base])
    meta = entries.pop("__metadata__")
    assert (meta["format"], meta["version"], meta["layout"], meta["space"]) == (
        "actcache-segment",
        "1.0",
        "tokens",
        SPACE,
    )
    kinds = {"I64": "<i8", "I32": "<i4", "U64": "<u8", "F64": "<f8", "F32": "<f4", "U8": "u1"}

    def tensor(name: str) -> np.ndarray:
        start, stop = entries[name]["data_offsets"]
        return np.frombuffer(raw[base + start : base + stop], kinds[entries[name]["dtype"]]).reshape(
            entries[name]["shape"]
        )

    first = min(entries[s]["data_offsets"][0] for s in records.data)
    digests = [xxhash.xxh3_64_intdigest(raw[:base]), xxhash.xxh3_64_intdigest(raw[base + 16 : base + first])]
    assert tensor("digest").tolist() == digests
    for i, number in enumerate([3, 9]):
        ids = tensor("token_ids")[tensor("token_offset")[i] : tensor("token_offset")[i + 1]]
        text = bytes(tensor("text")[tensor("text_offset")[i] : tensor("text_offset")[i + 1]])
        assert ids.tolist() == [number, *range(number % 7)]
        assert tensor("prompt_key")[i].tobytes() == xxhash.xxh3_128_digest(b"t" + ids.astype("<i4").tobytes())
        context = xxhash.xxh3_128_digest(meta["text_context"].encode())
        assert tensor("text_key")[i].tobytes() == xxhash.xxh3_128_digest(context + b"\x01" + text)
    at = 0
    for site, matrix in records.data.items():
        np.testing.assert_array_equal(tensor(site), matrix)
        both = tensor("moments")[at : at + 11]
        np.testing.assert_allclose(both[:5], matrix.mean(0), rtol=1e-5)
        np.testing.assert_allclose(both[5:10], ((matrix - matrix.mean(0)) ** 2).sum(0), rtol=1e-4)
        assert both[10] == pytest.approx(np.linalg.norm(matrix.astype(np.float64), axis=1).sum())
        assert tensor("errors")[list(records.data).index(site)].tolist()[:3] == [len(matrix), 0, 0]
        at += 11
    sums = [xxhash.xxh3_64_intdigest(m.tobytes()) for m in records.data.values()]
    assert tensor("checksum").tolist() == sums


@settings(deadline=None)
@given(
    before=st.sampled_from([0, 1, BLOCK - 3, BLOCK, 2 * BLOCK]),
    pieces=st.lists(st.sampled_from([0, 5, BLOCK - 5, BLOCK, 2 * BLOCK + 1, 3 * BLOCK]), max_size=4),
)
def test_two_streams_are_hashed_together(before: int, pieces: list[int]) -> None:
    """Whether or not blocks of both begin at the same places."""
    data = np.random.default_rng(before).bytes(before + sum(pieces))
    one, other = BlockHasher(), BlockHasher()
    other.update(memoryview(data)[:before])
    at = before
    for size in pieces:
        one.update_both(other, memoryview(data)[at : at + size])
        at += size
    for found, start in ((one, before), (other, 0)):
        expected = [xxhash.xxh3_64_intdigest(data[i : i + BLOCK]) for i in range(start, len(data), BLOCK)]
        assert found.finish() == expected

"""The segment format: what is written is read back, what is damaged or hostile is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from actcache.errors import FormatError
from actcache.store import container, segment
from actcache.store.casting import CastError, Piece
from actcache.store.prompts import PromptTable, canonical_chat, gather_ragged, text_keys, token_keys
from actcache.store.records import BLOCK, Records
from actcache.store.statistics import Moments
from actcache.store.tensors import stand_in
from actcache.store.writing import BlockHasher, Column, write_columns
from store_helpers import CONTEXT, DTYPES, every_token, make_table, pooled

SPACE = "0" * 32


def write(folder: Path, records: Any) -> Path:
    info = segment.write(folder, records, space=SPACE)
    return folder / f"{info.name}.safetensors"


# -- prompts -------------------------------------------------------------------------------------------

ragged = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(ragged, st.data())
def test_packing_and_selecting_prompts_keeps_each_one(ids: list[list[int]], data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.none() | st.text(max_size=8), min_size=len(ids), max_size=len(ids)))
    table = PromptTable.build(ids, texts, text_context="c")
    assert [table.tokens(i).tolist() for i in range(len(ids))] == ids
    assert [table.text_of(i) for i in range(len(ids))] == texts
    chosen = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=10))
    part = table.select(chosen)
    assert [part.tokens(i).tolist() for i in range(len(part))] == [ids[c] for c in chosen]
    assert [part.text_of(i) for i in range(len(part))] == [texts[c] for c in chosen]
    fresh = PromptTable.build([ids[c] for c in chosen], [texts[c] for c in chosen], text_context="c")
    np.testing.assert_array_equal(part.token_key, fresh.token_key)
    np.testing.assert_array_equal(part.text_key, fresh.text_key)
    joined = PromptTable.concatenate([table, part])
    assert [joined.tokens(i).tolist() for i in range(len(joined))] == ids + [ids[c] for c in chosen]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=1, min_side=0, max_side=5)), min_size=1),
    st.data(),
)
def test_gathering_ragged_pieces(parts: list[np.ndarray], data: st.DataObject) -> None:
    offset = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    index = np.array(data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=8)), np.int64)
    flat, ends = gather_ragged(np.concatenate(parts), offset, index)
    for i, k in enumerate(index):
        np.testing.assert_array_equal(flat[ends[i] : ends[i + 1]], parts[k])


def test_token_keys_are_the_documented_digest() -> None:
    keys = token_keys(np.array([5, 6, 7], np.int32), np.array([0, 2, 2, 3]))
    assert keys[0].tobytes() == xxhash.xxh3_128_digest(b"t" + np.array([5, 6], "<i4").tobytes())
    assert keys[1].tobytes() == xxhash.xxh3_128_digest(b"t")
    assert keys[2].tobytes() == xxhash.xxh3_128_digest(b"t" + np.array([7], "<i4").tobytes())


def test_few_stand_ins_do_not_make_one_prompt_of_two_texts(tmp_path: Path) -> None:
    alike = ["word 17675", "word 126757"]
    ids = [stand_in(1, text, 1) for text in alike]
    assert ids[0].tolist() == ids[1].tolist(), "31 bits of their digests agree"
    table = PromptTable.build([*ids, stand_in(1, "a", 4), [5]], [*alike, "a", "b"], text_context="c")
    number = np.array(ids[0], "<i4").tobytes()
    for i, text in enumerate(alike):
        assert table.token_key[i].tobytes() == xxhash.xxh3_128_digest(b"s" + number + b"\x01" + text.encode())
    assert table.token_key[2].tobytes() == xxhash.xxh3_128_digest(b"t" + table.tokens(2).astype("<i4").tobytes())
    assert table.token_key[3].tobytes() == xxhash.xxh3_128_digest(b"t" + np.array([5], "<i4").tobytes())
    bare = table.by_ids()
    assert bare.texts == [*alike, None, None]
    np.testing.assert_array_equal(bare.token_key, table.token_key)
    np.testing.assert_array_equal(table.select([1, 0]).by_ids().token_key, table.token_key[[1, 0]])
    rows = np.arange(14, dtype=np.float32).reshape(7, 2)
    new = segment.write(tmp_path, Records.tokens(table, {"embed": rows}), space=SPACE)
    assert segment.validate(tmp_path / f"{new.name}.safetensors") == []
    # As it was written before the text counted.
    plain = replace(table, _token_key=token_keys(table.token_ids, table.token_offset))
    old = segment.write(tmp_path, Records.tokens(plain, {"embed": rows}), space=SPACE)
    assert segment.validate(tmp_path / f"{old.name}.safetensors") == []
    other = replace(table, _token_key=plain.token_key[[3, 1, 2, 3]])
    wrong = segment.write(tmp_path, Records.tokens(other, {"embed": rows}), space=SPACE)
    assert segment.validate(tmp_path / f"{wrong.name}.safetensors") == [
        "token_key of prompt 0 is not the digest of what is stored"
    ]


def test_text_keys_depend_on_text_kind_and_context() -> None:
    chat = canonical_chat([{"role": "user", "content": "hi"}])
    keys = [
        text_keys([t], k, c) for t, k, c in [("a", 1, "x"), ("a", 2, "x"), ("a", 1, "y"), ("b", 1, "x"), (chat, 2, "x")]
    ]
    assert len({k.tobytes() for k in keys}) == len(keys)
    np.testing.assert_array_equal(text_keys(["a", chat], [1, 2], "x"), np.concatenate([keys[0], keys[4]]))
    assert text_keys(["\ud800"], 1, "x").shape == (1, 16)


def test_no_prompts_at_all() -> None:
    table = PromptTable.build([])
    assert len(table) == 0
    assert table.token_key.shape == table.text_key.shape == (0, 16)


# -- writing and reading -------------------------------------------------------------------------------


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


# -- damage --------------------------------------------------------------------------------------------


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
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    found = segment.open(path)
    starts = np.arange(100)
    bad = np.flatnonzero(~found.checks.verify(["x"], starts, starts + 1)[0])
    rows = BLOCK // (4096 * 4)
    assert bad.tolist() == list(range(50 // rows * rows, 50 // rows * rows + rows))
    assert segment.validate(path) == [f"x: checksum of block {50 // rows} does not match"]


def hostile(edit: Any) -> bytes:
    """A header changed by `edit(entries)`, with the body of a good file and its own digest set right."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        raw = write(Path(folder), pooled([1, 2], sites=["x"], dim=4)).read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:size])
    text = edit(entries)
    text = text if isinstance(text, bytes) else json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    head = len(text).to_bytes(8, "little") + text
    body = bytearray(raw[size:])
    body[:8] = xxhash.xxh3_64_digest(head)[::-1]
    return head + bytes(body)


def entry(name: str, **changes: Any) -> Any:
    return lambda e: e[name].update(changes)


HOSTILE: dict[str, Any] = {
    "not JSON": lambda e: b"{" * 100,
    "deep JSON": lambda e: b"[" * 100_000,
    "not an object": lambda e: b"[]",
    "name twice": lambda e: b'{"a":1,"a":2}',
    "other format": lambda e: e["__metadata__"].update(format="pt"),
    "newer version": lambda e: e["__metadata__"].update(version="2.0"),
    "metadata of numbers": lambda e: e["__metadata__"].update(version=1),
    "no layout": lambda e: e["__metadata__"].pop("layout"),
    "layout with a path": lambda e: e["__metadata__"].update(layout="../x"),
    "created beyond 64 bits": lambda e: e["__metadata__"].update(created_ns="9" * 19),
    "created in other digits": lambda e: e["__metadata__"].update(created_ns="١٢٣"),
    "replaces nonsense": lambda e: e["__metadata__"].update(replaces="[1]"),
    "wrong dtype": entry("token_ids", dtype="U32"),
    "unknown dtype": entry("token_ids", dtype="Q4"),
    "overlap": entry("last_token/x", data_offsets=[0, 32]),
    "huge shape": entry("last_token/x", shape=[2**40, 2**40]),
    "huge offsets": entry("last_token/x", data_offsets=[2**63, 2**63 + 32]),
    "negative offsets": entry("last_token/x", data_offsets=[-32, 0]),
    "shape of floats": entry("last_token/x", shape=[2.0, 4.0]),
    "shape does not fit": entry("last_token/x", shape=[4, 4]),
    "rows do not fit": entry("last_token/x", shape=[4, 2]),
    "missing index": lambda e: e.update(kinds=e.pop("kind")),
    "other layout's data": lambda e: e.update({"mean/x": e.pop("last_token/x")}),
    "keys of another width": entry("prompt_key", shape=[4, 8]),
    "entry of another form": lambda e: e.update({"last_token/x": 5}),
}


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

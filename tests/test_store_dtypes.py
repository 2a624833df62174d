"""Storage dtypes through a store: what is read, from where it is asked, and that merging never rounds again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open

import actcache as ac
from actcache import config
from actcache.errors import FormatError, OptionError, ValueOverflowError
from actcache.store import default, segment
from actcache.store.dtypes import is_scaled
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.store import Store
from store_helpers import CONTEXT, make_table, segment_files, text

SMALL = ["int8", "float8_e4m3"]
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 0.0, "int8": 0.008, "float8_e4m3": 0.03}
SITES = ["resid_post.0", "resid_post.1"]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_chosen", {})
    monkeypatch.setattr(default, "_chosen", None)
    monkeypatch.delenv("ACTCACHE_DTYPE", raising=False)


def with_outliers(rows: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((rows, dim)).astype(np.float32)
    found[:, 5] *= 1000
    found[:, 9] += 300
    return found


def store_with(folder: Path, dtype: str | None) -> tuple[Store, str]:
    store = Store(folder / "store", dtype=dtype, index_dir=folder / "index")
    return store, store.open_space({"weights": "abc"}, {"model_name": "org/model"})


def pooled_rows(numbers: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """The same vectors for the same prompts, whoever asks."""
    return {s: np.stack([with_outliers(1, seed=1000 * j + i)[0] for i in numbers]) for j, s in enumerate(SITES)}


def taken(store: Store, space: str, numbers: Any) -> np.ndarray:
    place = store.locate(
        space, texts=[text(i) for i in numbers], text_context=CONTEXT, sites=SITES, layout="last_token"
    )
    return place.take()


@pytest.mark.parametrize("dtype", config.STORAGE_DTYPES)
def test_pooled_and_full_sequences_come_back_within_the_error_of_the_dtype(tmp_path: Path, dtype: str) -> None:
    store, space = store_with(tmp_path, dtype)
    numbers = list(range(150))
    data = pooled_rows(numbers)
    store.append(space, Records.pooled(make_table(numbers), "last_token", data))
    found = taken(store, space, numbers)
    for j, site in enumerate(SITES):
        spread = data[site].std(axis=0) + np.abs(data[site].mean(axis=0))
        away = np.sqrt(((found[:, j].astype(np.float64) - data[site]) ** 2).mean(axis=0))
        assert (away <= TOLERANCE[dtype] * spread).all(), (site, (away / spread).max())
        assert dtype == "float32" or away.max() > 0
    table = make_table(numbers)
    rows = with_outliers(int(table.token_offset[-1]))
    store.append(space, Records.tokens(table, {"resid_post.0": rows}))
    place = store.locate(space, table=table, sites=["resid_post.0"], layout="tokens")
    whole = np.concatenate([place.rows(i)[0] for i in range(len(numbers))]).astype(np.float64)
    scale = rows.std(axis=0) + np.abs(rows.mean(axis=0))
    assert (np.sqrt(((whole - rows) ** 2).mean(axis=0)) <= TOLERANCE[dtype] * scale).all()
    padded, mask = place.take_padded()
    np.testing.assert_array_equal(padded[mask], whole.astype(padded.dtype))
    assert not padded[~mask].any()


@pytest.mark.parametrize("dtype", SMALL)
def test_reading_in_any_order_in_part_and_into_what_is_given_agrees(tmp_path: Path, dtype: str) -> None:
    store, space = store_with(tmp_path, dtype)
    numbers = list(range(200))
    for start in range(0, 200, 50):
        part = numbers[start : start + 50]
        store.append(space, Records.pooled(make_table(part), "last_token", pooled_rows(part)))
    place = store.locate(
        space, texts=[text(i) for i in numbers], text_context=CONTEXT, sites=SITES, layout="last_token"
    )
    assert place.dtype == np.float32
    whole = place.take()
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(place.take(index=order), whole[order])
    np.testing.assert_array_equal(taken(store, space, order), whole[order])
    for kind in (np.float16, np.float64):
        out = np.empty(whole.shape, kind)
        np.testing.assert_array_equal(place.take(out), whole.astype(kind))
    for i in (0, 63, 64, 199):
        np.testing.assert_array_equal(np.stack([r[0] for r in place.rows(i)]), whole[i])


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("layout", ["last_token", "tokens"])
def test_merging_changes_no_value_however_often_and_whatever_is_dropped(
    tmp_path: Path, dtype: str, layout: str
) -> None:
    store, space = store_with(tmp_path, dtype)
    rng = np.random.default_rng(0)
    first: dict[int, np.ndarray] = {}
    alive: list[int] = []
    number = blocks = 0

    def read(i: int) -> np.ndarray:
        table = make_table([i])
        place = store.locate(space, table=table, sites=SITES, layout=layout)
        assert place.found.all(), i
        return np.stack(place.rows(0))

    for count in (1, 7, 64, 100, 3, 130, 20):
        numbers = list(range(number, number + count))
        number += count
        table = make_table(numbers)
        rows = len(table) if layout == "last_token" else int(table.token_offset[-1])
        data = {s: with_outliers(rows, seed=number + j) for j, s in enumerate(SITES)}
        make = Records.tokens(table, data) if layout == "tokens" else Records.pooled(table, layout, data)
        info = store.append(space, make)
        blocks += len(segment.open(store.root / space / f"{info.name}.safetensors").block_offset) - 1
        first.update({i: read(i) for i in numbers})
        # Whole blocks, and some of the rows of others.
        gone = numbers[:70] if count == 130 else rng.choice(numbers, count // 3, replace=False).tolist()
        alive += [i for i in numbers if i not in gone]
        if gone:
            store.invalidate(space, make_table(gone))
        store.merge(space)
        for i in alive:
            np.testing.assert_array_equal(read(i), first[i])
    (path,) = segment_files(store, space)
    assert segment.validate(path) == []
    merged = segment.open(path)
    everything = np.concatenate([first[i] for i in alive], axis=1)
    for j, site in enumerate(SITES):
        moments, error = merged.moments(site), merged.error(site)
        assert moments is not None
        assert moments.count == everything.shape[1]
        np.testing.assert_allclose(moments.mean, everything[j].mean(axis=0, dtype=np.float64), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(moments.variance, everything[j].var(axis=0, dtype=np.float64), rtol=1e-5)
        # Errors are of all that was written: what was dropped cannot be taken out again.
        assert error.rows >= moments.count
        assert 0.001 < error.relative < TOLERANCE[dtype]
    # Blocks that lost rows to tombs are short, and no new ones came into being.
    assert 1 < len(merged.block_offset) - 1 <= blocks


@pytest.mark.parametrize("dtype", SMALL)
def test_a_small_dtype_takes_a_byte_and_a_sixteenth_for_each_value(tmp_path: Path, dtype: str) -> None:
    store, space = store_with(tmp_path, dtype)
    table = PromptTable.build([[i] for i in range(1024)])
    data = {"x": with_outliers(1024, 512)}
    info = store.append(space, Records.pooled(table, "mean", data))
    vectors = 1024 * 512
    assert vectors * 1.0625 < info.size < vectors * 1.0625 + 1024 * 80 + 20_000
    (path,) = segment_files(store, space)
    with safe_open(path, "np") as other:
        scale = other.get_tensor("mean/x.scale")
        assert scale.shape == (16, 512)
        assert scale.dtype == np.float32
        codes = other.get_slice("mean/x")
        assert codes.get_dtype() == ("I8" if dtype == "int8" else "F8_E4M3")
    with safe_open(path, "pt") as other:
        # Whoever has only the safetensors library and the document multiplies.
        by_hand = other.get_tensor("mean/x").to(torch.float32).reshape(16, 64, 512)
        by_hand = by_hand * other.get_tensor("mean/x.scale")[:, None]
    np.testing.assert_array_equal(store.read(space, table, "x", pooling="mean").numpy(), by_hand.reshape(1024, 512))


@pytest.mark.parametrize("dtype", SMALL)
def test_a_flipped_bit_in_codes_or_scales_is_a_miss_of_the_rows_it_touches(tmp_path: Path, dtype: str) -> None:
    rows = 2048
    for where in ("matrix", "scales"):
        store, space = store_with(tmp_path / where, dtype)
        table = PromptTable.build([[i] for i in range(rows)])
        store.append(space, Records.pooled(table, "mean", {"x": with_outliers(rows, 1024)}))
        store.close()
        (path,) = segment_files(store, space)
        found = segment.open(path)
        tensor = found._data["x"] if where == "matrix" else found._scales["x"]
        raw = bytearray(path.read_bytes())
        raw[tensor.stop - 5] ^= 1
        path.write_bytes(raw)
        store, space = store_with(tmp_path / where, dtype)
        place = store.locate(space, table=table, sites=["x"], layout="mean")
        # The last 128 KiB: of codes 128 rows, of scales 32 blocks of 64 rows: here all of them.
        assert place.found.sum() == (rows - 128 if where == "matrix" else 0)
        assert len(segment.validate(path)) == 1


def test_a_call_wins_over_the_variable_and_the_store_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ac.new_space("m")

    def stored_as(store: Store) -> str:
        store.write(space, ["a"], {"x": [np.ones(4, np.float32)]}, pooling="mean")
        return str(store.read(space, ["a"], "x", pooling="mean").dtype).removeprefix("torch.")

    def fresh(name: str, dtype: str | None = None) -> Store:
        return Store(tmp_path / name, dtype=dtype, index_dir=tmp_path / f"index-{name}")

    plain, others = fresh("a"), fresh("c")
    ac.set_cache_backend(plain)
    assert stored_as(plain) == "float32"
    monkeypatch.setenv("ACTCACHE_DTYPE", "float16")
    assert stored_as(plain) == "float16"
    ac.set_cache_dtype("bfloat16")
    assert stored_as(plain) == "bfloat16"
    assert stored_as(fresh("b", "float16")) == "float16"
    # It is the default store's, as the limit is; also of what takes its place for a request.
    assert stored_as(others) == "float32"
    assert stored_as(plain.beside(tmp_path / "beside")) == "bfloat16"
    ac.set_cache_dtype(None)
    assert stored_as(plain) == "float32"
    with pytest.raises(OptionError, match="int8"):
        ac.set_cache_dtype("int4")
    with pytest.raises(OptionError, match="float16"):
        Store(tmp_path, dtype="half")


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8_e4m3"])
def test_what_would_become_inf_is_refused_whole_and_named(tmp_path: Path, dtype: str) -> None:
    store, space = store_with(tmp_path, dtype)
    values = [torch.ones(3, dtype=torch.float64), torch.tensor([1.0, -1e39, 2.0], dtype=torch.float64)]
    with pytest.raises(ValueOverflowError, match=r"prompt 1, resid_post.3: the value -1e\+39 .* bfloat16"):
        store.write(space, ["a", "b"], {"resid_post.3": values}, pooling="mean")
    assert not store.contains(space, ["a", "b"]).any()
    assert store.write(space, ["a", "b"], {"resid_post.3": values}, pooling="mean", allow_inf=True) == 2
    found = store.read(space, ["a", "b"], "resid_post.3", pooling="mean").double()
    torch.testing.assert_close(found[0], values[0], rtol=0.02, atol=0)
    bad = found[1, 1]
    assert bad == -torch.inf if dtype == "float16" else bad.isnan()
    assert found[1, [0, 2]].tolist() == pytest.approx([1, 2], rel=0.02)


def test_reading_as_another_dtype(tmp_path: Path) -> None:
    store, space = store_with(tmp_path, "int8")
    rows = [torch.from_numpy(with_outliers(3 + i)) for i in range(4)]
    names = ["a", "b", "c", "d"]
    store.write(space, names, {"x": rows})
    store.write(space, names, {"big": [torch.full((2,), 1e5)] * 4, "ids": [torch.tensor([1, 2])] * 4}, pooling="mean")
    whole = store.read(space, names, "x")
    for dtype in ("float16", torch.bfloat16, "float64"):
        for got, right in zip(store.read(space, names, "x", dtype=dtype), whole, strict=True):
            wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            assert got.dtype == wanted
            assert torch.equal(got, right.to(wanted))
    out = torch.zeros(4, 2, dtype=torch.float64)
    store.read(space, names, "big", pooling="mean", out=out)
    assert out.flatten().tolist() == pytest.approx([1e5] * 8)
    with pytest.raises(ValueOverflowError, match="100000"):
        store.read(space, names, "big", pooling="mean", dtype="float16")
    with pytest.raises(OptionError, match="int8"):
        store.read(space, names, "x", dtype="int8")
    assert store.read(space, names, "ids", pooling="mean", dtype="float32").tolist() == [[1, 2]] * 4


def test_float8_and_int8_tensors_that_are_given_as_such_stay_what_they_are(tmp_path: Path) -> None:
    store, space = store_with(tmp_path, None)
    codes = torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn)
    store.write(space, ["a"], {"f": [codes], "i": [torch.arange(8, dtype=torch.int8)]}, pooling="mean")
    assert torch.equal(store.read(space, ["a"], "f", pooling="mean")[0].view(torch.uint8), codes.view(torch.uint8))
    assert store.read(space, ["a"], "i", pooling="mean")[0].tolist() == list(range(8))
    assert not any(is_scaled(code) for p in segment_files(store, space) for _, code, _ in segment.read_info(p).columns)


def test_dtypes_live_side_by_side_and_the_newest_copy_is_read(tmp_path: Path) -> None:
    vector = with_outliers(1, seed=3)[0]
    for dtype in ("int8", "float16", "float8_e4m3", None):
        store, space = store_with(tmp_path, dtype)
        store.write(space, ["a", "b"], {"x": [vector, vector]}, pooling="mean")
        store.write(space, [f"only {dtype}"], {"x": [vector]}, pooling="mean")
    store.merge(space)
    assert torch.equal(store.read(space, ["a"], "x", pooling="mean")[0], torch.from_numpy(vector))
    mixed = store.read(space, ["b", "only int8", "only float16", "only float8_e4m3"], "x", pooling="mean")
    assert mixed.dtype == torch.float32
    for row, limit in zip(mixed, (0, 0.005, 0.001, 0.04), strict=True):
        assert (row - torch.from_numpy(vector)).norm() <= limit * np.linalg.norm(vector)


def test_a_site_may_not_be_named_like_scales(tmp_path: Path) -> None:
    store, space = store_with(tmp_path, None)
    with pytest.raises(ValueError, match="scale"):
        store.write(space, ["a"], {"x.scale": [np.ones(2, np.float32)]}, pooling="mean")


@pytest.mark.parametrize("dtype", SMALL)
def test_repair_drops_the_rows_whose_scales_are_damaged_and_keeps_the_others(tmp_path: Path, dtype: str) -> None:
    rows = 6144
    table = PromptTable.build([[i] for i in range(rows)])
    store, space = store_with(tmp_path, dtype)
    store.append(space, Records.pooled(table, "mean", {"x": with_outliers(rows, 1024)}))
    before = store.locate(space, table=table, sites=["x"], layout="mean").take()
    store.close()
    (path,) = segment_files(store, space)
    scales = segment.open(path)._scales["x"]
    raw = bytearray(path.read_bytes())
    # 384 KiB of scales in three blocks of 32 x 64 rows; the middle one.
    raw[scales.start + (200 << 10)] ^= 4
    path.write_bytes(raw)
    store, space = store_with(tmp_path, dtype)
    report = store.verify(repair=True)
    (damage,) = report.damaged
    assert (damage.site, list(damage.rows)) == ("x", list(range(2048, 4096)))
    assert store.verify().ok
    place = store.locate(space, table=table, sites=["x"], layout="mean")
    kept = np.flatnonzero(place.found)
    assert kept.tolist() == [*range(2048), *range(4096, rows)]
    np.testing.assert_array_equal(place.take(index=kept), before[kept])


def broken(edit: Any, folder: Path) -> Path:
    """A quantised segment whose index tensors `edit` has changed, with digests that are right again."""
    store, space = store_with(folder, "int8")
    store.append(space, Records.pooled(make_table(range(100)), "mean", {"x": with_outliers(100, 16)}))
    (path,) = segment_files(store, space)
    raw = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:head])
    first = head + entries["mean/x"]["data_offsets"][0]
    edit(entries, raw, head)
    text = json.dumps(entries, separators=(",", ":")).encode()
    assert len(text) <= head - 8
    raw[8:head] = text + b" " * (head - 8 - len(text))
    raw[head : head + 8] = xxhash.xxh3_64_intdigest(bytes(raw[:head])).to_bytes(8, "little")
    raw[head + 8 : head + 16] = xxhash.xxh3_64_intdigest(bytes(raw[head + 16 : first])).to_bytes(8, "little")
    path.write_bytes(raw)
    return path


def put_offsets(*numbers: int) -> Any:
    def edit(entries: dict[str, Any], raw: bytearray, head: int) -> None:
        start = head + entries["block_offset"]["data_offsets"][0]
        raw[start : start + 24] = np.array(numbers, "<i8").tobytes()

    return edit


HOSTILE: dict[str, Any] = {
    "blocks of more than 64 rows": put_offsets(0, 65, 100),
    "an empty block": put_offsets(0, 0, 100),
    "blocks that fall": put_offsets(0, 100, 64),
    "blocks that do not begin at 0": put_offsets(1, 64, 100),
    "blocks that end early": put_offsets(0, 64, 99),
    "offsets that overflow": put_offsets(0, -(2**63), 100),
    "scales of another shape": lambda e, *_: e["mean/x.scale"].update(shape=[4, 8]),
    "scales of another dtype": lambda e, *_: e["mean/x.scale"].update(dtype="I32"),
    "scales of nothing": lambda e, *_: e.update({"mean/y.scale": e.pop("mean/x.scale")}),
    "scales of a wide dtype": lambda e, *_: e["mean/x"].update(dtype="F32", shape=[100, 4]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_scales_and_blocks_are_refused(tmp_path: Path, case: str) -> None:
    path = broken(HOSTILE[case], tmp_path)
    with pytest.raises(FormatError, match=path.name):
        segment.open(path)


def test_the_hostile_frame_itself_is_accepted(tmp_path: Path) -> None:
    assert segment.validate(broken(lambda *_: None, tmp_path)) == []

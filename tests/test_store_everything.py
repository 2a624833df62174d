"""Reading all of a site, and into tensors of the caller: rows in the order of the prompts, the newest copy of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actcache.errors import NotCachedError, ValueOverflowError
from actcache.store import lookup, places
from actcache.store.records import Records
from actcache.store.store import Store
from store_helpers import SITES, every_token, make_store, make_table, pooled, segment_files, text, vector

LAYOUT = "last_token"


def numbered(numbers: list[int], version: int) -> Records:
    """Vectors that tell the prompt and which write they are of."""
    data = {site: np.array([[n, version, k] for n in numbers], np.float32) for k, site in enumerate(SITES)}
    return Records.pooled(make_table(numbers), LAYOUT, data)


def numbers_of(store: Store, space: str, site: str) -> list[int]:
    table = store.prompts(space, site=site, layout=LAYOUT)
    return [int(table.tokens(i)[0]) for i in range(len(table))]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_those_of_the_listed_prompts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever was written again, invalidated, merged, or seen by another process, and read in between."""
    folder = tmp_path_factory.mktemp("s")
    store, space = make_store(folder)
    newest: dict[int, int] = {}

    def check() -> None:
        for k, site in enumerate(SITES):
            if not newest:
                with pytest.raises(NotCachedError, match=site):
                    store.read(space, None, site, pooling=LAYOUT)
                continue
            with mock.patch.object(places, "_LONG_RUN", data.draw(st.sampled_from([1, 2, places._LONG_RUN]))):
                found = store.read(space, None, site, pooling=LAYOUT)
            listed = numbers_of(store, space, site)
            assert sorted(listed) == sorted(newest)
            assert found.tolist() == [[n, newest[n], k] for n in listed]

    for version in range(data.draw(st.integers(1, 5))):
        batch = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True))
        store.append(space, numbered(batch, version))
        newest.update(dict.fromkeys(batch, version))
        gone = data.draw(st.lists(st.integers(0, 12), max_size=2, unique=True))
        if gone:
            store.invalidate(space, make_table(gone))
            newest = {n: v for n, v in newest.items() if n not in gone}
        if data.draw(st.booleans()):
            store.merge(space)
        if data.draw(st.booleans()):
            check()
    if data.draw(st.booleans()):
        store = Store(store.location, index_dir=folder / "another host")
    check()


def test_every_token_of_everything(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for numbers in ([4, 2], [9], [1, 7]):
        store.append(space, every_token(numbers))
    for found, n in zip(store.read(space, None, SITES[1]), [4, 2, 9, 1, 7], strict=True):
        expected = vector(n, SITES[1]) + np.arange(1 + n % 7, dtype=np.float32)[:, None]
        np.testing.assert_array_equal(found.numpy(), expected)


def test_damage_is_no_answer_and_leaves_no_row_out(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    # Wide enough for blocks of their own.
    wide = {"x": np.arange(4 * 70_000, dtype=np.float32).reshape(4, -1)}
    store.append(space, Records.pooled(make_table(range(4)), LAYOUT, wide))
    store.append(space, Records.pooled(make_table(range(4, 8)), LAYOUT, {"x": -wide["x"]}))
    path = segment_files(store, space)[0]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    fresh = Store(store.location, index_dir=tmp_path / "other")
    with pytest.raises(NotCachedError, match="1 of 8 prompts"):
        fresh.read(space, None, "x", pooling=LAYOUT)
    # From now on it counts as absent, and is not listed either.
    assert fresh.read(space, None, "x", pooling=LAYOUT)[:, 0].tolist() == [
        float(sign * (n % 4) * 70_000) for n in numbers_of(fresh, space, "x") for sign in [1 if n < 4 else -1]
    ]


def test_checking_side_by_side_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    for start in range(0, 40, 8):
        store.append(space, pooled(range(start, start + 8), dim=3000))
    path = segment_files(store, space)[2]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    answers = []
    for threads in (1, 4):
        monkeypatch.setattr(lookup, "allowed_threads", lambda threads=threads: threads)
        monkeypatch.setattr(lookup, "THREAD_BYTES", 1)
        fresh = Store(store.location, index_dir=tmp_path / f"index {threads}")
        texts = [text(i) for i in range(39, -1, -1)]
        answers.append(fresh.contains(space, texts, SITES[0], pooling=LAYOUT).tolist())
        place = fresh.locate(space, table=make_table(range(40)), sites=SITES, layout=LAYOUT)
        answers.append(place.found.tolist())
    assert answers[0] == answers[2] and answers[1] == answers[3]
    assert 0 < answers[1].count(False) < 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", ["whole", "strided"])
def test_any_tensor_takes_the_values(tmp_path: Path, stored: str, dtype: torch.dtype, shape: str) -> None:
    store = Store(tmp_path / "store", dtype=stored, index_dir=tmp_path / "index")
    space = store.open_space({"a": 1}, {})
    store.append(space, pooled(range(6)))
    store.append(space, pooled(range(6, 9)))
    exact = store.read(space, None, SITES[0], pooling=LAYOUT)
    assert exact.dtype == getattr(torch, stored)
    out = torch.empty(9, 8, dtype=dtype) if shape == "whole" else torch.empty(9, 16, dtype=dtype)[:, ::2]
    assert store.read(space, None, SITES[0], pooling=LAYOUT, out=out) is out
    assert torch.equal(out, exact.to(dtype))
    order = [text(i) for i in (8, 0, 3)]
    few = torch.empty(3, 8, dtype=dtype)
    assert torch.equal(store.read(space, order, SITES[0], pooling=LAYOUT, out=few), exact[[8, 0, 3]].to(dtype))


@pytest.mark.parametrize("out", [torch.empty(2, 8), torch.empty(3, 7), np.empty((3, 8), np.float32), "here"])
def test_what_cannot_take_the_values_is_refused(tmp_path: Path, out: Any) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(3)))
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[(3, 8|B, D)\]"):
        store.read(space, None, SITES[0], pooling=LAYOUT, out=out)


def test_dtypes_that_differ_are_read_in_one_that_holds_both(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    large, small = np.full((1, 4), 60_000, np.float16), np.full((1, 4), 1e-30, np.float32)
    store.append(space, Records.pooled(make_table([1]), LAYOUT, {"x": large}))
    for number, dtype in ((2, "bfloat16"), (3, "int8")):
        other = Store(store.location, dtype=dtype, index_dir=tmp_path / dtype)
        other.open_space({"weights": "abc"}, {})
        other.append(space, Records.pooled(make_table([number]), LAYOUT, {"x": small}))
    store.refresh()
    found = store.read(space, None, "x", pooling=LAYOUT)
    assert found.dtype == torch.float32
    assert found[0].tolist() == [60_000] * 4
    assert torch.allclose(found[1:], torch.tensor(1e-30), rtol=0.01)
    big = Records.pooled(make_table([4]), LAYOUT, {"y": np.full((1, 4), 1e9, np.float32)})
    store.append(space, big)
    with pytest.raises(ValueOverflowError, match="becomes inf"):
        store.read(space, None, "y", pooling=LAYOUT, out=torch.empty(1, 4, dtype=torch.float16))

"""What was put is found and read back: by text, by ids, per layout, across segments."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actcache.errors import NotCachedError
from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.store import Store
from store_helpers import (
    CONTEXT,
    DTYPES,
    SITES,
    check_pooled,
    every_token,
    make_store,
    make_table,
    pooled,
    segment_files,
    text,
    vector,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_into_segments_reads_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random batches, overlapping, some merged; random questions in random order with duplicates."""
    store, space = make_store(tmp_path_factory.mktemp("s"))
    stored: set[int] = set()
    for _ in range(data.draw(st.integers(1, 5))):
        batch = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True))
        store.append(space, pooled(batch))
        stored |= set(batch)
        if data.draw(st.booleans()):
            store.merge(space)
    asked = data.draw(st.lists(st.integers(0, 40), max_size=20))
    if data.draw(st.booleans()):
        store = Store(store.location, index_dir=tmp_path_factory.mktemp("i"))
    assert check_pooled(store, space, asked).tolist() == [i in stored for i in asked]
    place = store.locate(space, table=make_table(asked), sites=SITES[::-1], layout="last_token")
    assert place.found.tolist() == [i in stored for i in asked]
    assert place.num_tokens.tolist() == [1 + i % 7 if i in stored else -1 for i in asked]


def test_full_sequences(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(10)))
    store.append(space, every_token(range(10, 20)))
    asked = [13, 6, 0, 14, 6]
    place = store.locate(space, texts=[text(i) for i in asked], text_context=CONTEXT, sites=SITES, layout="tokens")
    expected = [[vector(i, s) + np.arange(1 + i % 7, dtype=np.float32)[:, None] for s in SITES] for i in asked]
    for k in range(len(asked)):
        for found, right in zip(place.rows(k), expected[k], strict=True):
            np.testing.assert_array_equal(found, right)
            assert not found.flags.writeable
    out, mask = place.take_padded()
    assert out.shape == (5, 7, 16)
    assert mask.sum(axis=1).tolist() == [1 + i % 7 for i in asked]
    for k, right in enumerate(expected):
        np.testing.assert_array_equal(out[k, mask[k]], np.concatenate(right, axis=1))
        assert not out[k, ~mask[k]].any()
    given_out = np.full((2, 7, 16), 9, np.float32)
    again, _ = place.take_padded(given_out, index=[1, 3])
    assert again is given_out
    np.testing.assert_array_equal(again[:, :], out[[1, 3]])


def test_rows_one_by_one_are_those_of_all_together(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    for site, batches in {SITES[0]: (range(8), range(8, 12)), SITES[1]: (range(5), range(5, 12))}.items():
        for batch in batches:
            records = every_token(batch)
            store.append(space, Records.tokens(records.prompts, {site: records.data[site]}))
    asked = [11, 3, 40, 7, 0, 3]
    place = store.locate(space, table=make_table(asked), sites=SITES[::-1], layout="tokens")
    for k in (0, 3, 5, -2, 1, 4, 0):
        for site, one, found in zip(SITES[::-1], place.rows(k), place.all_rows([k])[0], strict=True):
            right = vector(asked[k], site) + np.arange(1 + asked[k] % 7, dtype=np.float32)[:, None]
            np.testing.assert_array_equal(one, right)
            np.testing.assert_array_equal(found, right)
            assert not one.flags.writeable
    with pytest.raises(NotCachedError, match="prompt 2"):
        place.rows(2)
    with pytest.raises(IndexError):
        place.rows(6)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_every_dtype_comes_back_as_it_was(tmp_path: Path, dtype: Any) -> None:
    store, space = make_store(tmp_path)
    records = pooled(range(40), dtype=dtype)
    store.append(space, records)
    order = np.random.default_rng(0).permutation(40)
    place = store.locate(space, table=make_table(order.tolist()), sites=SITES, layout="last_token")
    assert place.dtype == np.dtype(dtype)
    for j, site in enumerate(SITES):
        assert place.take()[:, j].tobytes() == records.data[site][order].tobytes()
    if np.dtype(dtype).kind == "f" or dtype is ml_dtypes.bfloat16:
        wide = place.take(np.empty((40, 2, 8), np.float32))
        np.testing.assert_array_equal(wide[:, 0], records.data[SITES[0]][order].astype(np.float32))


@pytest.mark.parametrize("order", [list(range(20)), [7, 3, 19, 0, 4, 11]])
def test_sites_of_different_dtypes_in_one_segment(tmp_path: Path, order: list[int]) -> None:
    store, space = make_store(tmp_path)
    kinds = {
        "resid_post.0": np.float32,
        "resid_post.1": np.float16,
        "resid_post.2": ml_dtypes.bfloat16,
        "ids": np.int32,
    }
    records = pooled(range(20), sites=list(kinds))
    records.data = {site: (records.data[site] * 100).astype(dtype) for site, dtype in kinds.items()}
    store.append(space, records)
    place = store.locate(space, table=make_table(order), sites=list(kinds), layout="last_token")
    assert place.dtype == np.float32
    for out in (place.take(), place.take(np.empty((len(order), 4, 8), np.float64))):
        for j, site in enumerate(kinds):
            np.testing.assert_array_equal(out[:, j], records.data[site][order].astype(np.float32))
    ids = store.locate(space, table=make_table(order), sites=["ids"], layout="last_token")
    records.data["ids"][:] = 0
    assert ids.take(np.empty((len(order), 1, 8), np.int64)).dtype == np.int64


def test_sites_written_at_different_times_are_read_together(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(6), sites=["resid_post.0"]))
    store.append(space, pooled(range(3, 9), sites=["resid_post.1", "resid_post.2"]))
    sites = ["resid_post.2", "resid_post.0"]
    asked = list(range(10))
    place = store.locate(space, table=make_table(asked), sites=sites, layout="last_token")
    assert place.found.tolist() == [3 <= i < 6 for i in asked]
    assert place.found_each[:, 0].tolist() == [3 <= i < 9 for i in asked]
    assert place.found_each[:, 1].tolist() == [i < 6 for i in asked]
    taken = place.take(index=[4, 3])
    for k, i in enumerate([4, 3]):
        for j, site in enumerate(sites):
            np.testing.assert_array_equal(taken[k, j], vector(i, site))


def test_the_newest_copy_is_read(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    table = make_table([1, 2])
    for value in (1.0, 2.0, 3.0):
        data = np.full((2, 4), value, np.float32)
        store.append(space, Records.pooled(table, "mean", {"x": data}))
    assert (store.locate(space, table=table, sites=["x"], layout="mean").take() == 3).all()
    store.merge(space)
    assert len(segment_files(store, space)) == 1
    assert (store.locate(space, table=table, sites=["x"], layout="mean").take() == 3).all()


def test_layouts_kinds_and_contexts_are_kept_apart(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))

    def found(**question: Any) -> bool:
        options = {"texts": [text(1)], "text_context": CONTEXT, "sites": SITES, "layout": "last_token"} | question
        return bool(store.locate(space, **options).found[0])

    assert found()
    assert not found(layout="mean")
    assert not found(layout="tokens")
    assert not found(kinds=2)
    assert not found(text_context="other")
    assert not found(sites=["resid_post.7"])
    assert not found(texts=[text(1) + " "])
    assert not bool(store.locate("f" * 32, texts=["a"], sites=SITES, layout="mean").found[0])


def test_equal_keys_are_not_enough(tmp_path: Path) -> None:
    """A prompt whose key collides with a stored one is a miss: ids are compared by ids, text by text."""
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    stored = make_table([1])
    other = make_table([2])
    forged = PromptTable(
        other.token_ids, other.token_offset, other.kind, other.text, other.text_offset, CONTEXT,
        stored.token_key, stored.text_key,
    )  # fmt: skip
    assert not store.locate(space, table=forged, sites=SITES, layout="last_token").found.any()
    wrong_text = PromptTable(
        stored.token_ids, stored.token_offset, stored.kind, other.text, other.text_offset, CONTEXT,
        stored.token_key, other.text_key,
    )  # fmt: skip
    store2, space2 = make_store(tmp_path / "2")
    store2.append(space2, Records.pooled(wrong_text, "last_token", pooled([1]).data))
    index = store2._index(space2)
    index.refresh()
    next(iter(index._infos)).text_key[:] = stored.text_key  # type: ignore[union-attr]
    place = store2.locate(space2, texts=[text(1)], text_context=CONTEXT, sites=SITES, layout="last_token")
    assert not place.found.any()


def test_what_was_not_found_is_never_handed_out(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    place = store.locate(space, table=make_table([1, 2]), sites=SITES, layout="last_token")
    with pytest.raises(NotCachedError, match=r"1 of 2 prompts .* prompt 1"):
        place.take()
    with pytest.raises(NotCachedError):
        place.rows(1)
    with pytest.raises(ValueError, match="expected"):
        place.take(np.empty((3, 2, 8), np.float32), index=[0])
    empty = store.locate(space, texts=[], sites=SITES, layout="last_token")
    assert empty.found.shape == (0,)
    assert empty.take().shape[:2] == (0, 2)


def test_a_damaged_row_is_a_miss_and_an_older_copy_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    info = store.append(space, pooled([1, 2]))
    file = store.root / space / f"{info.name}.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    fresh, _ = make_store(tmp_path)
    with caplog.at_level(logging.WARNING, "actcache.store"):
        assert check_pooled(fresh, space, [1, 2]).tolist() == [True, False]
    assert f"{info.name}.safetensors: resid_post.1 of 2 prompts is damaged" in caplog.text
    assert [fresh.contains(space, [text(2)], site, pooling="last_token")[0] for site in SITES] == [True, False]
    fresh.append(space, pooled([2]))
    assert check_pooled(fresh, space, [1, 2]).all()


def test_what_was_located_stays_readable(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    store.append(space, pooled([2]))
    other = Store(store.location, index_dir=tmp_path / "i2")
    place = store.locate(space, table=make_table([1, 2]), sites=SITES, layout="last_token")
    other.merge(space)
    other.clear()
    assert not segment_files(store, space)
    np.testing.assert_array_equal(place.take()[:, 0], [vector(1, SITES[0]), vector(2, SITES[0])])
    store.close()
    np.testing.assert_array_equal(place.take()[1, 1], vector(2, SITES[1]))


def test_prompts_come_back_in_order(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([5, 3]))
    store.append(space, pooled([8, 3]))
    place = store.locate(space, table=make_table([8, 5, 3]), sites=SITES, layout="last_token")
    prompts = place.prompts()
    assert [prompts.text_of(i) for i in range(3)] == [text(8), text(5), text(3)]
    everything = store.prompts(space)
    assert [everything.text_of(i) for i in range(len(everything))] == [text(5), text(3), text(8)]
    assert everything.tokens(2).tolist() == make_table([8]).tokens(0).tolist()


def test_the_same_prompt_as_ids_and_as_text_is_one_entry(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with_text = pooled([1])
    ids_only = PromptTable.build([with_text.prompts.tokens(0)])
    store.append(space, Records.pooled(ids_only, "last_token", with_text.data))
    assert store.locate(space, table=make_table([1]), sites=SITES, layout="last_token").found.all()
    store.append(space, with_text)
    assert store.spaces()[0].num_prompts == 1
    assert store.prompts(space).text_of(0) == text(1)


def test_thousands_of_segments_need_no_file_descriptors(tmp_path: Path) -> None:
    import resource

    store, space = make_store(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Other tests of this process may have left some open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 90, hard))
    try:
        for i in range(150):
            store.append(space, pooled([i]))
        assert check_pooled(store, space, range(150)).all()
        fresh = Store(store.location, index_dir=tmp_path / "i2")
        assert check_pooled(fresh, space, range(150)).all()
        assert store.merge(space) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert check_pooled(fresh, space, range(150)).all()


def test_maps_are_given_back(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(5)))
    place = store.locate(space, table=make_table(range(5)), sites=SITES, layout="last_token")
    view = place.rows(2)[0]
    store.close()
    del place, store
    gc.collect()
    np.testing.assert_array_equal(view[0], vector(2, SITES[0]))
    assert ".safetensors" in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert f"{tmp_path}" not in Path("/proc/self/maps").read_text()

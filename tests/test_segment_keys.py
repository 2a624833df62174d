"""Tables of prompts in segments: packing, selecting, and the keys of ids and texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actcache.store import segment
from actcache.store.prompts import PromptTable, canonical_chat, gather_ragged, text_keys, token_keys
from actcache.store.records import Records
from actcache.store.tensors import stand_in
from segment_helpers import SPACE, ragged


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

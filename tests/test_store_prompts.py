"""What `Store.prompts` gives, and stores in ``with`` blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.store.prompts import PromptTable
from actcache.store.store import Store
from store_helpers import check_pooled, make_store, make_table, pooled, text


def test_texts_and_ids_of_every_kind_of_prompt(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hé"}]
    with Store(tmp_path / "store", index_dir=tmp_path / "index") as store:
        space = ac.new_space("m")
        given = ["text \ud800", [7, 8, 9], chat, "é" * 5]
        store.write(space, given, {"x": [np.ones(2, np.float32)] * 4}, pooling="mean")
        table = store.prompts(space)
    assert table.texts == ["text \ud800", None, '[{"content":"hé","role":"user"}]', "é" * 5]
    assert table.texts == [table.text_of(i) for i in range(4)]
    # Without a tokenizer nobody knows the ids of a text.
    assert [None if ids is None else ids.tolist() for ids in table.ids] == [None, [7, 8, 9], None, None]


def test_texts_and_ids_of_tokenized_prompts(tmp_path: Path) -> None:
    table = make_table([3, 0, 12])
    assert table.texts == [text(3), text(0), text(12)]
    assert [ids.tolist() for ids in table.ids if ids is not None] == [[3, 0, 1, 2], [0], [12, 0, 1, 2, 3, 4]]
    assert PromptTable.build([]).texts == PromptTable.build([]).ids == []
    assert [None if ids is None else ids.tolist() for ids in PromptTable.build([[], [5]]).ids] == [[], [5]]


def test_a_with_block_closes_and_lets_errors_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    close = Store.close
    monkeypatch.setattr(Store, "close", lambda self: (closed.append(self), close(self)))
    store, space = make_store(tmp_path)
    with store as same:
        assert same is store
        store.append(space, pooled([1, 2]))
        assert closed == []
    assert closed == [store]

    def fail() -> None:
        with store:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert closed == [store, store]
    # What was closed opens again when it is used.
    assert check_pooled(store, space, [1, 2]).all()

"""A hit is compared with what is stored: its ids or its text, its kind, its context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.store.prompts import CHAT, TEXT, PromptTable
from actcache.store.queries import Query
from actcache.store.records import Records
from store_helpers import CONTEXT, make_store, make_table, pooled, text


@pytest.mark.parametrize("what", ["token", "text"])
@pytest.mark.parametrize("some", ["few", "all in order", "all in disorder", "half", "here and there", "one again"])
def test_what_is_compared_is_each_prompts_own(tmp_path: Path, what: str, some: str) -> None:
    """One comparison for many prompts, or one for each: none of them may stand for another."""
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(400)))
    index = store._index(space)
    ((number, _),) = index.segments()
    segment = index.open(number)
    assert segment is not None
    rng = np.random.default_rng(0)
    chosen = {
        "few": np.array([5, 300, 7]),
        "all in order": np.arange(400),
        "all in disorder": rng.permutation(400),
        "half": rng.permutation(400)[:200],
        "here and there": rng.permutation(400)[:30],
        "one again": np.full(40, 17),
    }[some]
    table = make_table(range(400))
    content = [
        text(i).encode() if what == "text" else np.array(table.tokens(i), "<i4").tobytes() for i in chosen.tolist()
    ]
    contents = segment.contents[what]
    assert [contents.of(i) for i in chosen.tolist()] == content

    def differing(asked: list[bytes]) -> list[int]:
        """The same, whether they are all that is asked for, or lie among what other segments hold."""
        n = len(asked)
        alone = contents.equal(chosen, asked, np.arange(n))
        others = [part for one in asked for part in (b"?", one)]
        among = contents.equal(chosen, others, np.arange(1, 2 * n, 2))
        found = [[] if equal is None else np.flatnonzero(~equal).tolist() for equal in (alone, among)]
        assert found[0] == found[1]
        return found[0]

    assert contents.equal(chosen, content, np.arange(len(chosen))) is None
    assert differing(content) == []
    for k in (0, len(chosen) // 2, len(chosen) - 1):
        for other in (content[k][:-1] + b"?", content[k][:-1], b"", content[k] + content[k]):
            changed = [*content[:k], other, *content[k + 1 :]]
            assert differing(changed) == [k]
    swapped = [content[1], content[0], *content[2:]]
    expected = [] if some == "one again" else [0, 1]
    assert differing(swapped) == expected


@pytest.mark.parametrize("n", [3, 40])
def test_a_text_is_found_under_its_own_kind(tmp_path: Path, n: int) -> None:
    """In segments of one kind and of several, asked for by one kind and by one for each."""
    store, space = make_store(tmp_path)
    texts = [text(i) for i in range(3 * n)]
    kinds = np.array([TEXT] * n + [CHAT] * n + [TEXT, CHAT, CHAT] * (n // 3) + [TEXT] * (n % 3), np.uint8)
    ids = [[i, 1] for i in range(3 * n)]
    for some in (slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)):
        table = PromptTable.build(ids[some], texts[some], kinds[some], CONTEXT)
        store.append(space, Records.pooled(table, "last_token", {"x": np.arange(3 * n, dtype=np.float32)[some, None]}))

    def found(kinds: Any) -> list[bool]:
        place = store.locate(space, texts=texts, kinds=kinds, text_context=CONTEXT, sites=["x"], layout="last_token")
        there = np.flatnonzero(place.found)
        assert place.take(index=there).reshape(-1).tolist() == there.tolist()
        each: list[bool] = place.found.tolist()
        return each

    assert found(TEXT) == found(np.full(3 * n, TEXT)) == (kinds == TEXT).tolist()
    assert found(CHAT) == found([CHAT] * 3 * n) == (kinds == CHAT).tolist()
    assert all(found(kinds)) and all(found(kinds.tolist()))
    assert not any(found(TEXT + CHAT - kinds))
    with pytest.raises(ValueError):
        found([TEXT] * n)


@pytest.mark.parametrize("stored", [[TEXT] * 40, [CHAT] * 40, [TEXT, CHAT] * 20])
@pytest.mark.parametrize("asked", [TEXT, CHAT, [TEXT] * 39 + [CHAT], [CHAT, TEXT] * 20])
def test_a_key_that_agrees_by_chance_is_no_hit(tmp_path: Path, stored: list[int], asked: int | list[int]) -> None:
    """Text, kind and context must all be the same."""
    store, space = make_store(tmp_path)
    texts = [text(i) for i in range(40)]
    table = PromptTable.build([[i] for i in range(40)], texts, stored, CONTEXT)
    store.append(space, Records.pooled(table, "last_token", {"x": np.zeros((40, 1), np.float32)}))
    index = store._index(space)
    ((number, _),) = index.segments()
    segment = index.open(number)
    assert segment is not None
    every = np.arange(40)
    for changed in ([], [0], [3, 39]):
        given = ["?" if i in changed else one for i, one in enumerate(texts)]
        same = (np.array(stored) == asked) & ~np.isin(every, changed)
        for context, right in ((CONTEXT, same), ("another", np.zeros(40, bool))):
            found = Query.by_text(given, asked, context).matches(segment, every, every)
            np.testing.assert_array_equal(np.ones(40, bool) if found is None else found, right)

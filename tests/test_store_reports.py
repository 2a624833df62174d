"""Info, discovery and spaces."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from actcache.errors import NotCachedError
from actcache.store import container
from actcache.store import segment as segments
from actcache.store.prompts import PromptTable, canonical_chat
from actcache.store.records import Records
from actcache.store.reports import layers_of
from actcache.store.store import Store
from store_helpers import every_token, make_store, make_table, pooled, segment_files, text


def test_info_counts_prompts_layers_and_bytes(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    start = time.time()
    assert store.info().models == []
    store.append(space, pooled(range(4), sites=["resid_post.0", "attn_out.3"]))
    store.append(space, every_token(range(2, 6), sites=["resid_post.0"]))
    info = store.info()
    (model,) = info.models
    assert (model.model_name, model.revision, model.dtype) == ("org/model", "r1", "float32")
    assert (model.num_prompts, model.num_layers) == (6, 2)
    assert (model.has_pooled, model.has_perplexity, model.has_logits) == (True, False, False)
    store.invalidate(space, [text(1)])
    files = [p.stat().st_size for p in (store.root / space).iterdir()]
    assert len(files) == 4
    # What the limit is held against, descriptions and tombs included.
    assert store.info().total_size_bytes == store.info().models[0].size_bytes == sum(files) == store.evict(1).bytes_kept
    assert info.cache_dir == store.location
    assert info.oldest_mtime is not None
    assert info.newest_mtime is not None
    assert start - 1 <= info.oldest_mtime <= info.newest_mtime <= time.time() + 1
    assert info.cache_limit_bytes is None


def test_discover_by_text_ids_and_chat(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token([1, 2], sites=["resid_post.3", "resid_post.1", "attn_out.0"]))
    store.append(space, pooled([2], sites=["resid_post.4"]))
    chat = [{"role": "user", "content": "hi"}]
    table = PromptTable.build([[9, 9]], [canonical_chat(chat)], [2], "chat context")
    store.append(space, Records.pooled(table, "mean", {"embed": np.ones((1, 2), np.float32)}))

    found = store.discover("org/model", text(2))
    assert found is not None
    assert found.raw_layers == [1, 3]
    assert found.pooled == {"last_token": [4]}
    assert found.sites == {"tokens": ["attn_out.0", "resid_post.1", "resid_post.3"], "last_token": ["resid_post.4"]}
    assert found.num_tokens == 3
    assert [v.space for v in found.variants] == [space]
    assert not found.has_logits
    assert found.router_layers == []
    assert store.discover("org/model", make_table([1]).tokens(0).tolist()) is not None
    assert store.discover("org/model", make_table([1]).tokens(0)) is not None
    assert store.discover("org/model", chat).sites == {"mean": ["embed"]}  # type: ignore[union-attr]
    assert store.discover("org/model", [{"role": "user", "content": "ho"}]) is None
    assert store.discover("org/model", "nothing") is None
    assert store.discover("another", text(2)) is None


def test_the_number_of_tokens_is_told_only_where_it_is_known(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.write(space, ["a text without a tokenizer"], {"embed": [np.ones(3, np.float32)]}, pooling="mean")
    found = store.discover("org/model", "a text without a tokenizer")
    assert found is not None and found.num_tokens is None
    store.write(space, ["a text without a tokenizer"], {"embed": [np.ones((7, 3), np.float32)]})
    found = store.discover("org/model", "a text without a tokenizer")
    assert found is not None and found.num_tokens == 7
    store.append(space, pooled([6]))
    found = store.discover("org/model", text(6))
    assert found is not None and found.num_tokens == 7


def test_discover_describes_the_newest_variant_and_lists_all(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1], sites=["resid_post.0"]))
    newer = store.open_space({"weights": "new"}, {"model_name": "org/model", "dtype": "bfloat16"})
    time.sleep(0.01)
    store.append(newer, pooled([1], sites=["resid_post.7"]))
    found = store.discover("org/model", text(1))
    assert found is not None
    assert found.pooled == {"last_token": [7]}
    assert [v.dtype for v in found.variants] == ["bfloat16", "float32"]


def test_a_space_is_its_identity(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    assert store.open_space({"b": 1, "a": [2]}, {"x": 1}) == store.open_space({"a": [2], "b": 1}, {"y": 2})
    assert store.open_space({"a": 1}, {}) != store.open_space({"a": 2}, {})
    store.append(space, pooled([1]))
    document = json.loads((store.root / space / "space.json").read_text())
    assert document["identity"] == {"weights": "abc"}
    assert document["label"]["model_name"] == "org/model"
    (found,) = Store(store.location, index_dir=tmp_path / "i").spaces()
    assert (found.space, found.identity, found.num_prompts) == (space, {"weights": "abc"}, 1)
    with pytest.raises(NotCachedError, match="open_space"):
        Store(store.location).append("f" * 32, pooled([1]))


def test_a_damaged_description_hides_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, space = make_store(tmp_path)
    other = store.open_space({"weights": "x"}, {"model_name": "other"})
    store.append(space, pooled([1]))
    store.append(other, pooled([1]))
    file = store.root / other / "space.json"
    infinite = re.sub(rb'"created_ns": \d+', b'"created_ns": 1e999', file.read_bytes())
    # A segment written where there is no description has none of its own.
    file.unlink()
    (described,) = segment_files(store, other)
    segments.write(store.root / other, pooled([1]), space=other)
    described.unlink()
    for content in (b"", b"[]", b"\xff", b'{"__metadata__":{"format":"actcache-space"}}', b"[" * 99999, infinite):
        file.write_bytes(content)
        assert [s.space for s in store.spaces()] == [space]
    file.unlink()
    os.mkfifo(file)
    opened = threading.Timer(20, lambda: os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK)))
    opened.start()
    started = time.monotonic()
    assert [s.space for s in store.spaces()] == [space]
    assert time.monotonic() - started < 15, "it waited for somebody to write into a pipe"
    opened.cancel()
    file.unlink()
    file.write_bytes(b"")
    assert "ignoring a space" in caplog.text
    assert store.contains(other, [text(1)]).all()


@pytest.mark.parametrize("left", [None, 0, 60])
def test_segments_know_their_space_when_its_description_is_lost(tmp_path: Path, left: int | None) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    store.append(space, pooled([2]))
    store.merge(space)
    before = store.spaces()
    file = store.root / space / "space.json"
    content = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(content[:left])
    stranger = Store(store.location, index_dir=tmp_path / "elsewhere")
    (found,) = stranger.spaces()
    assert (found.space, found.identity, found.label) == (space, before[0].identity, before[0].label)
    assert found.num_prompts == 2
    assert stranger.discover("org/model", text(1)) is not None
    if left == 0:
        # It does not begin as one of ours, so it stays as it is.
        assert not stranger.verify(repair=True).ok
        assert file.read_bytes() == b""
        return
    assert stranger.verify(repair=True).ok
    assert json.loads(file.read_text())["identity"] == {"weights": "abc"}
    assert stranger.verify().damaged == []


def test_a_description_that_is_not_of_its_space_is_not_believed(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    (path,) = segment_files(store, space)
    raw = path.read_bytes()
    size = container.header_size(raw[:8], len(raw))
    assert raw[:size].count(b"abc") == 1
    changed = raw[:size].replace(b"abc", b"abd")
    # The digest of the header is the first thing behind it.
    path.write_bytes(changed + xxhash.xxh3_64_intdigest(changed).to_bytes(8, "little") + raw[size + 8 :])
    (store.root / space / "space.json").unlink()
    stranger = Store(store.location, index_dir=tmp_path / "elsewhere")
    assert stranger.spaces() == []
    assert stranger.contains(space, [text(1)]).all()
    assert segments.validate(path) == ["its description is not one of its space"]


def test_contains_anything(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    store.append(space, every_token([2], sites=["embed"]))
    assert store.contains(space, [text(1), text(2), text(3)]).tolist() == [True, True, False]
    assert store.contains(space, [text(1), text(2)], "embed").tolist() == [False, True]
    assert store.contains(space, make_table([2, 3])).tolist() == [True, False]


def test_statistics_of_what_is_not_there(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with pytest.raises(NotCachedError, match="embed"):
        store.statistics(space, "embed")


def test_layers_of_site_names() -> None:
    assert layers_of(["resid_post.5", "attn_out.3", "embed", "pattern.7.2", "decoder.resid_post.1"]) == [1, 3, 5, 7]
    assert layers_of(["resid_post.5", "resid_pre.2"], "resid_post") == [5]

"""Spaces, sites and poolings that are not there are told from those that are, with the nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actcache.errors import NotCachedError, OptionError
from actcache.store.spaces import new_space
from actcache.store.store import Store
from store_helpers import SITES, every_token, make_store, pooled, text


def test_reading_everything_of_a_site_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    store, space = make_store(tmp_path)
    store.append(space, pooled([1]))
    assert store.read(space, None, SITES[0], pooling="last_token").shape == (1, 8)
    for site, pooling in (("resid_posst.0", "last_token"), (SITES[0], None)):
        with pytest.raises(NotCachedError, match=site):
            store.read(space, None, site, pooling=pooling)


def test_a_space_that_is_not_there_is_refused_whatever_is_done_with_it(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(3)))
    fresh = Store(store.location, index_dir=tmp_path / "other")
    wrong = space[:-2] + "zz"
    for do in (
        lambda s: fresh.read(s, None, SITES[0], pooling="last_token"),
        lambda s: fresh.contains(s, ["a"]),
        lambda s: fresh.write(s, ["a"], {"x": [np.ones(3)]}, pooling="mean"),
        lambda s: fresh.writer(s),
        lambda s: fresh.prompts(s),
        lambda s: fresh.statistics(s, SITES[0]),
        lambda s: fresh.summaries(s),
        lambda s: fresh.invalidate(s),
        lambda s: fresh.invalidate(s, ["a"]),
        lambda s: fresh.compact(s),
        lambda s: fresh.merge(s),
    ):
        with pytest.raises(NotCachedError, match=f"has no space '{wrong}'. Did you mean '{space}'"):
            do(wrong)
        with pytest.raises(NotCachedError, match=f"That is a model, stored as space='{space}'"):
            do("org/model")
        with pytest.raises(NotCachedError, match=rf"has no space '\.\./v1'\. Stored: {space} \(org/model\)"):
            do("../v1")
    assert fresh.read(space, None, SITES[0], pooling="last_token").shape == (3, 8)
    assert sorted(path.name for path in store.root.iterdir()) == [space]
    # One that is described, and to which nothing was written yet, is none of these.
    assert not fresh.contains(new_space("another"), ["a"]).any()
    made = fresh.open_space({"weights": "new"}, {"model_name": "new"})
    assert not fresh.contains(made, ["a"]).any()


def test_a_site_or_pooling_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    with pytest.raises(NotCachedError, match=r"there is no 'resid_post.0', since nothing is stored"):
        store.read(space, None, "resid_post.0")
    store.append(space, pooled(range(3), sites=["resid_post.1", "resid_post.10"]))
    store.append(space, every_token(range(3), sites=["mlp_out.0"]))
    for ask in (
        lambda site, pooling: store.read(space, None, site, pooling=pooling),
        lambda site, pooling: store.read(space, [text(0)], site, pooling=pooling),
        lambda site, pooling: store.statistics(space, site, pooling=pooling),
    ):
        with pytest.raises(NotCachedError, match=r"no 'resid_pst\.1' is stored with .* Did you mean 'resid_post\.1'"):
            ask("resid_pst.1", "last_token")
        with pytest.raises(NotCachedError, match=r"with pooling='las_token' .* Did you mean with pooling='last_token'"):
            ask("attn_out.1", "las_token")
        with pytest.raises(NotCachedError, match=r"is stored .* with pooling='last_token', not for every token"):
            ask("resid_post.1", None)
        with pytest.raises(NotCachedError, match=r"every token \(pooling=None\), not with pooling='mean'"):
            ask("mlp_out.0", "mean")
    with pytest.raises(NotCachedError, match=r"1 of 2 prompts have no 'resid_post.1'"):
        store.read(space, [text(0), text(7)], "resid_post.1", pooling="last_token")


def test_who_asks_for_a_name_that_nothing_has_is_told(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    asked = [text(0), text(7)]
    # Any name may be meant where nothing is stored yet.
    assert not store.contains(space, asked, "resid_pst.1", pooling="las_token").any()
    store.append(space, pooled(range(3), sites=["resid_post.1", "probe_3"]))
    assert store.contains(space, asked, "resid_post.1", pooling="last_token").tolist() == [True, False]
    for site, pooling in (
        ("resid_post.2", "last_token"), ("resid_post.1", None), ("resid_post.1", "mean"), ("probe_4", "last_token"),
        ("perplexity", "derived"), ("logits.top5.values", "last_token"), ("decoder.mlp_out.1", None),
    ):  # fmt: skip
        assert not store.contains(space, asked, site, pooling=pooling).any(), (site, pooling)
    for site, near in (
        ("resid_pst.1", "resid_post.1"), ("blocks.1.hook_resid_post", "resid_post.1"), ("resid_post", "resid_post.1"),
        ("resid_post.-1", "resid_post.1"), ("prob", "probe_3"), ("embd", "embed"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=rf"{site!r} is not how .* Did you mean '{near}'"):
            store.contains(space, asked, site, pooling="last_token")
    with pytest.raises(OptionError, match=r"Stored: probe_3, resid_post.1"):
        store.contains(space, asked, "my vectors")
    for site in ("resid_post.1", None):
        with pytest.raises(OptionError, match=r"'las_token', which is none.* Did you mean 'last_token'"):
            store.contains(space, asked, site, pooling="las_token")
    assert store.contains(space, asked, pooling="last_token").tolist() == [True, False]
    assert not store.contains(space, asked, pooling="mean").any()


def test_where_all_prompts_are_gone_nothing_is_read(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(3)))
    store.invalidate(space)
    with pytest.raises(NotCachedError, match="are gone"):
        store.read(space, None, SITES[0], pooling="last_token")

"""Batches of one form join in memory they share on the way; what is joined tells nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.capture import like_batches
from actcache.errors import JoinError, UnknownSiteError
from actcache.model.sites import Site


def batches(count: int, *, rows: int = 2, seed: int = 0) -> list[ac.ActivationCache]:
    """Values of three forms under five keys."""
    draw = torch.Generator().manual_seed(seed)
    return [
        ac.ActivationCache(
            {
                "resid_post.0": torch.randn(rows, 3, 4, generator=draw),
                "mlp_act.0": torch.randn(rows, 3, 7, generator=draw),
                "resid_post.1": torch.randn(rows, 3, 4, generator=draw),
                "counts": torch.randint(9, (rows,), generator=draw),
                "mlp_act.1": torch.randn(rows, 3, 7, generator=draw),
            }
        )
        for _ in range(count)
    ]


def catted(caches: list[ac.ActivationCache], **options: Any) -> ac.ActivationCache:
    joined = ac.ActivationCache()
    for cache in caches:
        joined.cat(cache, **options)
    return joined


def whole(caches: list[ac.ActivationCache], key: str) -> Tensor:
    return torch.cat([cache[key] for cache in caches])


@pytest.fixture(params=[1, 200, 1 << 20])
def slab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for a part of a batch, for a few and for all."""
    monkeypatch.setattr(like_batches, "SLAB_BYTES", request.param)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 40])
def test_every_key_gets_its_own_values(slab: None, count: int) -> None:
    caches = batches(count)
    for joined in (catted(caches), ac.ActivationCache.concatenate(caches)):
        for key in caches[0]:
            assert torch.equal(joined[key], whole(caches, key)), key
            assert joined[key].is_contiguous()
            # Nothing of the memory on the way is kept alive.
            assert joined[key].untyped_storage().nbytes() == joined[key].nbytes, key


def test_what_is_added_is_as_it_was_then(slab: None) -> None:
    caches = batches(6)
    wanted = {key: whole(caches, key) for key in caches[0]}
    joined = ac.ActivationCache()
    for cache in caches:
        joined.cat(cache)
        for value in cache.values():
            value.zero_()
    assert all(torch.equal(joined[key], wanted[key]) for key in wanted)
    joined["counts"].fill_(5)
    assert not any(bool(cache["counts"].any()) for cache in caches)


def test_other_forms_in_between_keep_their_place(slab: None) -> None:
    caches = [*batches(4), *batches(3, rows=1, seed=1), *batches(3, seed=2)]
    caches[8] = ac.ActivationCache(dict(reversed(list(caches[8].items()))))
    for joined in (catted(caches), ac.ActivationCache.concatenate(caches)):
        assert all(torch.equal(joined[key], whole(caches, key)) for key in caches[0])
    longer = ac.ActivationCache({key: torch.ones(2, *value.shape[1:]) for key, value in caches[0].items()})
    longer["resid_post.0"] = torch.ones(2, 5, 4)
    longer["counts"] = torch.ones(2, dtype=torch.long)
    joined = catted([*caches[:4], longer, *caches[7:8]])
    assert joined["resid_post.0"].shape == (12, 5, 4)
    assert torch.equal(joined["resid_post.0"][:8, :3], whole(caches[:4], "resid_post.0"))
    assert not joined["resid_post.0"][:8, 3:].any()
    assert torch.equal(joined["resid_post.0"][10:, :3], caches[7]["resid_post.0"])


def test_masks_of_batches_of_one_form_stay_theirs(slab: None) -> None:
    from actcache.testing.tiny import tiny_model

    model = tiny_model("gpt2")
    prompts = [[[5, 6, 7], [8, 9]], [[3, 4], [1, 2, 3]], [[9, 9, 9], [7]], [[1], [4, 5, 6]]]
    caches = [ac.run_with_cache(model, part, sites=["resid_post", "q"])[1] for part in prompts]
    joined = catted(caches)
    assert joined.attention_mask.sum(1).tolist() == [3, 2, 2, 3, 3, 1, 1, 3]
    for key in ("resid_post.1", "q.0"):
        rows = [row for cache in caches for row in cache.rows(key)]
        assert all(torch.equal(mine, row) for mine, row in zip(joined.rows(key), rows, strict=True))


def test_without_padding_each_batch_has_memory_of_its_own(slab: None) -> None:
    caches = [*batches(5), batches(1, rows=1)[0]]
    joined = catted(caches, pad=False)
    for key in caches[0]:
        parts = joined[key]
        assert isinstance(parts, list)
        assert all(torch.equal(mine, cache[key]) for mine, cache in zip(parts, caches, strict=True))
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
        assert all(part.data_ptr() != cache[key].data_ptr() for part, cache in zip(parts, caches, strict=True))


def test_graphs_go_on_through_a_join(slab: None) -> None:
    plain, weight = batches(2), torch.ones((), requires_grad=True)
    grown = [
        ac.ActivationCache({k: v * weight if v.is_floating_point() else v for k, v in cache.items()})
        for cache in batches(3, seed=1)
    ]
    joined = catted([*plain, *grown, *plain])
    assert torch.equal(joined["resid_post.0"], whole([*plain, *grown, *plain], "resid_post.0"))
    joined["resid_post.0"].sum().backward()
    torch.testing.assert_close(weight.grad, whole(grown, "resid_post.0").sum().detach())
    with torch.no_grad():
        assert not catted(grown)["resid_post.0"].requires_grad


def test_batches_may_come_in_and_out_of_inference_mode(slab: None) -> None:
    with torch.inference_mode():
        caches = batches(3)
        joined = catted(caches)
    caches += batches(3, seed=1)
    for cache in caches[3:]:
        joined.cat(cache)
    assert torch.equal(joined["mlp_act.1"], whole(caches, "mlp_act.1"))


def test_a_batch_of_another_dtype_is_refused_and_changes_nothing(slab: None) -> None:
    caches = batches(4)
    joined = catted(caches)
    with pytest.raises(JoinError, match=r"resid_post\.0"):
        joined.cat(batches(1)[0].to(torch.float64))
    assert joined == ac.ActivationCache.concatenate(caches)


@pytest.mark.parametrize("dense", [1, 2, 5])
def test_a_batch_of_another_layout_is_refused_and_changes_nothing(slab: None, dense: int) -> None:
    eye = torch.eye(3)
    for some, other in ((eye, eye.to_sparse()), (eye.to_sparse(), eye)):
        joined = catted([ac.ActivationCache({"x": some})] * dense)
        with pytest.raises(JoinError, match=r"'x' cannot be joined: it is .*sparse_coo"):
            joined.cat(ac.ActivationCache({"x": other}))
        assert joined["x"].layout is some.layout
        assert torch.equal(joined["x"].to_dense(), eye.repeat(dense, 1))


def test_numbers_without_rows_become_rows(slab: None) -> None:
    caches = [ac.ActivationCache({"x": torch.tensor(float(i)), "y": torch.ones(1, 2) * i}) for i in range(4)]
    joined = catted(caches)
    assert joined["x"].tolist() == [0, 1, 2, 3]
    assert joined["y"].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_reading_a_site_again_gives_the_same_errors() -> None:
    for _ in range(2):
        assert Site.parse("blocks.3.hook_resid_post") == Site("resid_post", 3)
        assert not Site.looks_like("logits.3")
        assert not Site.looks_like("transformer.h.0")
        with pytest.raises(UnknownSiteError, match="takes no layer"):
            Site.parse("logits.3")
        with pytest.raises(UnknownSiteError, match="no single heads"):
            Site.parse("resid_post.3.1")
        with pytest.raises(UnknownSiteError, match="Did you mean"):
            Site.parse("resid_pst.3")

"""Capture of sites: generation, several passes, positions."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import LayerRangeError, MissedModuleError, OptionError
from actcache.testing.tiny import EOS, tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])
SITES = ["embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final_norm"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def close(one: Tensor, other: Tensor) -> None:
    # Other shapes take other kernels: a few float32 roundings of values near 1.
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def full_pass(model: Any, ids: Tensor, **kwargs: Any) -> ac.ActivationCache:
    with ac.capture(model, sites=[*SITES, "logits"]) as cache:
        model(ids, **kwargs)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_the_full_pass(model: Any, use_cache: bool) -> None:
    with ac.capture(model, ["", "model"], sites=[*SITES, "logits"]) as cache:
        made = model.generate(
            IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
    reference = full_pass(model, made[:, :-1])
    assert len(cache[""]) == 5
    for key in reference:
        if key == "logits":
            close(cache[key], reference[key][:, -5:])
        else:
            assert cache[key].shape == (2, 10, 32)
            close(cache[key], reference[key])
    assert torch.equal(cache.input_ids, made[:, :-1])
    assert bool(cache.attention_mask.all())
    assert torch.equal(cache["logits"].argmax(-1)[:, -1], made[:, -1])


@torch.no_grad()
def test_generation_one_visit_per_step(model: Any) -> None:
    last = [info.path for info in ac.sites(model) if str(info.site) == "resid_post.3"]
    with ac.capture(model, last) as cache:
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [tuple(v.hidden.shape) for v in cache[last[0]]] == [(2, 6, 32), (2, 1, 32), (2, 1, 32)]


@torch.no_grad()
def test_generation_from_left_padded_prompts(model: Any) -> None:
    ids = torch.tensor([[0, 0, 0, 5, 9, 100], [8, 8, 4, 200, 31, 6]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    with ac.capture(model, sites="resid_post") as cache:
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )
    for row, start in enumerate((3, 0)):
        alone = full_pass(model, made[row : row + 1, start:-1])
        got = cache.rows("resid_post.2")[row]
        close(got, alone["resid_post.2"][0])
        close(cache.get_position(2, -1)[row], alone["resid_post.2"][0, -1])
    assert cache.attention_mask.tolist() == [[False] * 3 + [True] * 6, [True] * 9]


@torch.no_grad()
def test_what_follows_the_end_of_a_sequence_is_masked(model: Any) -> None:
    """Steps as generate makes them: a finished row is fed its end, then padding, behind a mask of ones."""
    prompt = torch.tensor([[5, EOS, 7], [8, 8, 4]])
    steps = [torch.tensor([[9], [6]]), torch.tensor([[EOS], [6]]), torch.tensor([[0], [6]])]
    with ac.capture(model, sites="resid_post", layers=1) as cache:
        out = model(prompt, use_cache=True)
        mask = torch.ones(2, 3, dtype=torch.long)
        for step in steps:
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            out = model(step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
    assert cache.attention_mask.tolist() == [[True] * 5 + [False], [True] * 6]
    assert [len(r) for r in cache.rows("resid_post.1")] == [5, 6]


@torch.no_grad()
def test_a_cut_back_cache_takes_values_back(model: Any) -> None:
    final = torch.tensor([[5, 9, 100, 7, 31, 6]])
    with ac.capture(model, sites="resid_post") as cache:
        out = model(final[:, :4], use_cache=True)
        out = model(torch.tensor([[77, 78]]), past_key_values=out.past_key_values, use_cache=True)
        out.past_key_values.crop(-2)
        model(final[:, 4:], past_key_values=out.past_key_values, use_cache=True)
    reference = full_pass(model, final)
    for layer in range(4):
        close(cache[f"resid_post.{layer}"], reference[f"resid_post.{layer}"])
    assert torch.equal(cache.input_ids, final)


@torch.no_grad()
def test_independent_passes_are_rows(model: Any) -> None:
    with ac.capture(model, sites=["resid_post", "logits"]) as cache:
        model(IDS)
        model(IDS[:1, :4])
        model(IDS[1:])
    assert cache["resid_post.0"].shape == (4, 6, 32)
    assert cache["logits"].shape[:2] == (4, 6)
    assert cache.attention_mask.sum(1).tolist() == [6, 6, 4, 6]
    for row, ids in enumerate([IDS[:1], IDS[1:], IDS[:1, :4], IDS[1:]]):
        close(cache.rows("resid_post.3")[row], full_pass(model, ids)["resid_post.3"][0])
    assert cache.input_ids[2].tolist() == [*IDS[0, :4].tolist(), 0, 0]


@torch.no_grad()
def test_sites_and_modules_together_in_the_order_asked(model: Any) -> None:
    with ac.capture(model, [""], sites=["resid_post", "logits"], layers=[-1, 0]) as cache:
        model(IDS)
    assert list(cache) == ["", "resid_post.3", "resid_post.0", "logits"]
    assert torch.equal(cache[""].output.logits, cache["logits"])
    with ac.capture(model, sites="blocks.2.hook_resid_post") as aliased:
        model(IDS)
    assert list(aliased) == ["resid_post.2"]


def test_gradients_flow_through_sites(model: Any) -> None:
    with ac.capture(model, sites="resid_post.1", detach=False, copy=False) as cache:
        out = model(IDS)
    (gradient,) = torch.autograd.grad(out.logits.sum(), cache["resid_post.1"])
    assert gradient.shape == (2, 6, 32)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        ("last", [[2], [4], [0]]),
        ("first", [[0], [0], [0]]),
        (-1, [[2], [4], [0]]),
        ([[0, 2], [(1, 4)], [0]], [[0, 2], [1, 2, 3], [0]]),
        ([0, -1], [[0, 2], [0, 4], [0, 0]]),
    ],
)
def test_positions_count_real_tokens(model: Any, side: str, positions: Any, kept: list[list[int]]) -> None:
    prompts = [[5, 9, 100], [8, 8, 4, 200, 31], [7]]
    width = 5
    ids, mask = torch.full((3, width), 9), torch.zeros(3, width, dtype=torch.long)
    for i, p in enumerate(prompts):
        at = slice(width - len(p), width) if side == "left" else slice(0, len(p))
        ids[i, at], mask[i, at] = torch.tensor(p), 1
    where = (mask.cumsum(1) - 1).clamp_min(0)
    block = next(info.path for info in ac.sites(model) if str(info.site) == "resid_post.2")
    with ac.capture(
        model, [block], sites=["resid_post", "resid_mid"], positions=positions, include_inputs=True
    ) as cache:
        model(input_ids=ids, attention_mask=mask, position_ids=where)
    n = max(map(len, kept))
    assert cache["resid_post.2"].shape == (3, n, 32)
    for i, p in enumerate(prompts):
        alone = full_pass(model, torch.tensor([p]))
        rows = cache.rows("resid_post.2")[i]
        close(rows, alone["resid_post.2"][0, kept[i]])
        close(cache.rows("resid_mid.2")[i], alone["resid_mid.2"][0, kept[i]])
        assert cache.input_ids[i, : len(kept[i])].tolist() == [p[k] for k in kept[i]]
        assert not cache["resid_post.2"][i, len(kept[i]) :].any()
    assert torch.equal(cache[block].hidden, cache["resid_post.2"])
    assert cache[block].input.shape == (3, n, 32)


@torch.no_grad()
def test_positions_copy_only_what_they_keep(model: Any) -> None:
    with ac.capture(model, sites="resid_post", positions="last") as cache:
        model(IDS)
    assert cache.nbytes == 4 * 2 * 1 * 32 * 4
    with ac.capture(model, sites="resid_post", positions="last", copy=False) as shared:
        model(IDS)
    assert shared.nbytes == cache.nbytes


@torch.no_grad()
def test_positions_outside_a_prompt(model: Any) -> None:
    with pytest.raises(LayerRangeError, match="6 tokens"), ac.capture(model, sites="resid_post", positions=6):
        model(IDS)
    with pytest.raises(OptionError, match="2 prompts"), ac.capture(model, sites="resid_post", positions=[[0]]):
        model(IDS)
    assert model(IDS).logits.shape[:2] == (2, 6)


@torch.no_grad()
def test_generation_keeps_the_last_position_of_each_step(model: Any) -> None:
    with ac.capture(model, sites="resid_post.3", positions="last") as cache:
        made = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    close(cache["resid_post.3"], full_pass(model, made[:, :-1])["resid_post.3"][:, -3:])


@torch.no_grad()
def test_embeddings_in_place_of_ids(model: Any) -> None:
    embeddings = model.get_input_embeddings()(IDS)
    with ac.capture(model, sites="resid_post") as cache:
        model(inputs_embeds=embeddings)
    close(cache["resid_post.3"], full_pass(model, IDS)["resid_post.3"])
    assert cache.input_ids is None
    assert cache.attention_mask.shape == (2, 6)


@torch.no_grad()
def test_running_only_the_backbone(model: Any) -> None:
    backbone = model.base_model
    with ac.capture(model, sites="resid_post", layers=[0]) as cache:
        backbone(IDS)
    close(cache["resid_post.0"], full_pass(model, IDS)["resid_post.0"])
    with pytest.raises(MissedModuleError, match="logits"), ac.capture(model, sites="logits"):
        backbone(IDS)


@torch.no_grad()
def test_tuples_in_place_of_model_outputs(model: Any) -> None:
    reference = full_pass(model, IDS)
    with ac.capture(model, sites=["logits", "resid_post"]) as cache:
        model(IDS, labels=IDS, return_dict=False)
    assert torch.equal(cache["logits"], reference["logits"])


def test_a_module_that_was_replaced_between_captures_is_read_where_it_is_now() -> None:
    model = tiny_model("gpt2")
    ids = torch.tensor([[5, 6, 7]])
    sites = ["mlp_out", "attn_out", "resid_post"]
    first = ac.run_with_cache(model, ids, sites=sites)[1]
    model.transformer.h[1].mlp = tiny_model("gpt2", seed=1).transformer.h[1].mlp
    seen: list[torch.Tensor] = []
    with model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.detach())):
        second = ac.run_with_cache(model, ids, sites=sites)[1]
    assert torch.equal(second["mlp_out.1"], seen[0])
    assert not torch.equal(second["mlp_out.1"], first["mlp_out.1"])
    assert torch.equal(second["resid_post.0"], first["resid_post.0"])


def test_nothing_that_is_remembered_of_a_model_keeps_it_alive() -> None:
    model = tiny_model("gpt2")
    for _ in range(2):
        ac.run_with_cache(model, torch.tensor([[5, 6, 7]]), sites=["resid_post", "mlp_out", "logits", "final_norm"])
    gone = [weakref.ref(model), weakref.ref(model.transformer.h[1].mlp)]
    replaced = weakref.ref(model.transformer.h[0].mlp)
    model.transformer.h[0].mlp = tiny_model("gpt2", seed=1).transformer.h[0].mlp
    gc.collect()
    assert replaced() is None
    del model
    gc.collect()
    assert all(ref() is None for ref in gone)

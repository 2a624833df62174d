"""What nnsight's tests of its cache assert, asked of captures here: case by case.

Where a case is pinned elsewhere in these tests:

    A5 A6     test_capture.py            test_selection
    A8        test_capture_lifetime.py   test_captures_may_close_in_any_order
    B1        test_edits_lifetime.py     test_captures_see_the_edited_value_whatever_the_order
    C3 C4 C5  test_capture.py            test_several_visits
    C4        test_capture_visits.py     test_none_is_an_output
    C1 C2     test_capture_visits.py     test_a_visit_for_each_step
    C6        test_capture_visits.py     test_steps_of_the_callers_own
    D1        test_capture.py            test_only_keyword_arguments
    D2        test_capture.py            test_several_visits
    H4        test_capture_lifetime.py   test_a_capture_does_not_see_later_runs

F is held with names= (more of it in test_names.py), and with sites, which need no names: they mean the same on every
architecture. I, J and K need several devices, vLLM or a remote service; C7 a diffusion model.
"""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.errors import LayerRangeError, UnknownKeyError
from actcache.testing.tiny import PAD, tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 31], [8, 3, 4, 50, 6]])
BLOCKS = [f"transformer.h.{i}" for i in range(12)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2", n_layer=12)


def blocks_of(model: Any) -> list[Any]:
    return list(model.transformer.h)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(3, 4)
        self.l2 = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.l2(self.l1(x))
        return out


# -- A: selection and content


@torch.no_grad()
def test_a1_a2_a3_a7_sides(model: Any) -> None:
    with (
        ac.capture(model) as outputs,
        ac.capture(model, include_inputs=True) as both,
        ac.capture(model, include_inputs=True, include_output=False) as inputs,
    ):
        model(IDS)
    ran = {path for path, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    # Attention that is computed in one piece runs no dropout of its own.
    assert ran - set(outputs) == {f"{block}.attn.attn_dropout" for block in BLOCKS}
    for entry in outputs.values():
        assert entry.output is not None
        assert entry.inputs is None and entry.input is None
    assert torch.equal(both[BLOCKS[0]].hidden, both[BLOCKS[1]].inputs[0][0])
    assert inputs[BLOCKS[0]].output is None
    assert torch.equal(inputs[BLOCKS[1]].input, both[BLOCKS[1]].input)


@torch.no_grad()
def test_a4_a6_modules_by_reference(model: Any) -> None:
    with (
        ac.capture(model, blocks_of(model)[0]) as one,
        ac.capture(model, blocks_of(model), include_inputs=True) as all_,
    ):
        model(IDS)
    assert list(one) == [BLOCKS[0]]
    assert BLOCKS[1] not in one and "lm_head" not in one
    assert list(all_) == BLOCKS
    for before, after in pairwise(BLOCKS):
        assert torch.equal(all_[before].hidden, all_[after].input)


@torch.no_grad()
def test_a8_a9_two_captures_in_one_run(model: Any) -> None:
    with ac.capture(model, "**.attn") as attention, ac.capture(model, "**.mlp", device="cpu") as mlp:
        model(IDS)
    assert len(attention) == len(mlp) == 12
    assert not set(attention) & set(mlp)
    assert all(entry.output.device.type == "cpu" for entry in mlp.values())


# -- B: order against interventions


@torch.no_grad()
def test_b1_b2_what_takes_the_place_of_an_output_is_recorded(model: Any) -> None:
    ran: list[int] = []
    block = model.transformer.h[2]

    class Skipped(nn.Module):
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            replaced = hidden * 0 + 5
            return (replaced,) if version_returns_tuples else replaced

    version_returns_tuples = isinstance(block(torch.zeros(1, 2, 32)), tuple)
    handle = block.mlp.register_forward_hook(lambda *_: ran.append(1))
    with ac.edit(model, {"resid_post.0": torch.zeros_like}), ac.capture(model, BLOCKS[0]) as zeros:
        model(IDS)
    ran.clear()
    model.transformer.h[2] = Skipped()
    try:
        with ac.capture(model, BLOCKS[1:4], include_inputs=True) as skipped:
            model(IDS)
    finally:
        model.transformer.h[2] = block
        handle.remove()
    assert not zeros[BLOCKS[0]].hidden.any()
    assert ran == []
    assert bool((skipped[BLOCKS[2]].hidden == 5).all())
    assert bool((skipped[BLOCKS[3]].input == 5).all())


@torch.no_grad()
def test_b3_a_capture_that_begins_in_the_middle_of_a_pass(model: Any) -> None:
    block = ac.capture(model, [*BLOCKS[:4], ""], include_inputs=True)
    opened: list[Any] = []
    handle = model.transformer.h[1].register_forward_hook(lambda *_: opened.append(block.__enter__()) or None)
    model(IDS)
    handle.remove()
    with pytest.raises(ac.errors.MissedModuleError, match=r"'transformer\.h\.0', 'transformer\.h\.1', ''"):
        block.__exit__(None, None, None)
    cache = opened[0]
    # What had begun before is named as missed; what came later is complete.
    assert list(cache) == BLOCKS[2:4]
    assert torch.equal(cache[BLOCKS[2]].hidden, cache[BLOCKS[3]].input)


@torch.no_grad()
def test_b4_a_pass_that_is_stopped(model: Any) -> None:
    with ac.capture(model, BLOCKS[:6], stop_after_last=True) as stopped:
        assert model(IDS) is None
    assert list(stopped) == BLOCKS[:6]

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped by the caller")

    handle = model.transformer.h[6].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped by"), ac.capture(model) as by_hand:
        model(IDS)
    handle.remove()
    assert torch.equal(by_hand[BLOCKS[5]].hidden, stopped[BLOCKS[5]].hidden)
    assert BLOCKS[6] not in by_hand


# -- C: repeated visits


@torch.no_grad()
def test_c1_c2_generation(model: Any) -> None:
    options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with ac.capture(model, BLOCKS[:3]) as cache:
        model.generate(IDS, max_new_tokens=2, **options)
    assert [len(entry) for entry in cache.values()] == [2, 2, 2]
    with ac.capture(model, "lm_head") as cache:
        model.generate(IDS, max_new_tokens=3, **options)
    assert len(cache["lm_head"]) == 3
    assert len(cache["lm_head"].output) == 3


# -- E: access


@torch.no_grad()
def test_e1_to_e5_access(model: Any) -> None:
    with ac.capture(model, [*BLOCKS, "lm_head"]) as cache:
        model(IDS)
    assert len(cache) == 13
    wanted = cache[BLOCKS[0]].output
    for found in (
        cache.transformer.h[0].output,
        cache.model.transformer.h[0].output,
        cache["model.transformer.h.0"].output,
        cache.transformer["h.0"].output,
        cache.transformer.h["0"].output,
        cache.transformer.h[-12].output,
    ):
        assert torch.equal(found, wanted) if isinstance(found, Tensor) else torch.equal(found[0], wanted[0])
    assert len(cache.transformer.h) == len(list(cache.transformer.h)) == 12
    assert len(cache.transformer.h[0]) == 1
    with pytest.raises(LayerRangeError) as past:
        cache.transformer.h[12]
    assert isinstance(past.value, IndexError)
    with pytest.raises(AttributeError, match="was not captured"):
        _ = cache.transformer.wte
    with pytest.raises(KeyError):
        cache["transformer.wte"]
    with pytest.raises(UnknownKeyError):
        cache.lm_head["nothing"]
    flat = Flat()
    with ac.capture(flat, "l1") as one:
        flat(torch.ones(2, 3))
    assert list(one.keys()) == ["l1"]
    assert "l2" not in one
    assert torch.equal(one.l1.output, one["model.l1"].output)
    assert torch.equal(one.model.l1.output, one["l1"].output)


# -- F: names


@torch.no_grad()
def test_f1_f2_names_of_the_callers_own(model: Any) -> None:
    names = {"transformer": "model", "h.0": "first_layer", "1": "second_layer", "mlp": "my_mlp"}
    direct: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, path=path: direct.update({path: out}))
        for path, module in model.named_modules()
        if path in (*BLOCKS[:2], *(f"{block}.mlp" for block in BLOCKS))
    ]
    with ac.capture(model, names=names) as cache:
        model(IDS)
    for handle in handles:
        handle.remove()
    first, second = cache[BLOCKS[0]].hidden, cache[BLOCKS[1]].hidden
    for path, found in ((BLOCKS[0], first), (BLOCKS[1], second)):
        wanted = direct[path][0] if isinstance(direct[path], tuple) else direct[path]
        assert torch.equal(found, wanted)
    assert not torch.equal(first, second)
    for node in (
        cache["model.model.first_layer"],
        cache["model.first_layer"],
        cache["transformer.first_layer"],
        cache.model.model.first_layer,
        cache.model.first_layer,
        cache.model.h["first_layer"],
        cache.model.transformer.h[0],
    ):
        assert torch.equal(node.hidden, first)
    for node in (
        cache["model.model.h.second_layer"],
        cache.model.model.h["second_layer"],
        cache.model.transformer.h[1],
        cache.transformer["h.second_layer"],
    ):
        assert torch.equal(node.hidden, second)
    for i, block in enumerate(BLOCKS):
        assert torch.equal(cache.transformer.h[i].my_mlp.output, direct[f"{block}.mlp"])
        assert torch.equal(cache[f"model.h.{i}.my_mlp"].output, direct[f"{block}.mlp"])


@torch.no_grad()
def test_f1_f2_names_that_mean_the_same_on_every_model(model: Any) -> None:
    with ac.capture(model, sites=["resid_post", "mlp_out"]) as cache:
        model(IDS)
    for name in ("resid_post.3", "blocks.3.hook_resid_post", "resid_out_3", "layer_3", "resid_post.-9"):
        assert torch.equal(cache[name], cache["resid_post.3"])
    assert torch.equal(cache["blocks.5.hook_mlp_out"], cache["mlp_out_5"])


# -- G: several inputs


@torch.no_grad()
def test_g1_g2_each_input_has_its_own_rows(model: Any) -> None:
    # Of prompts of several lengths, a cache holds each one's rows, without padding and as they are alone.
    prompts = [[5, 9, 100, 7, 31], [8, 3]]
    _, together = ac.run_with_cache(model, prompts, sites="resid_post")
    _, second = ac.run_with_cache(model, [prompts[1]], sites="resid_post")
    assert together.select(prompts=1)["resid_post.3"].shape[0] == 1
    assert [len(row) for row in together.rows("resid_post.3")] == [5, 2]
    torch.testing.assert_close(together.rows("resid_post.3")[1], second.rows("resid_post.3")[0], rtol=1e-5, atol=1e-5)
    flat, one, two = Flat(), torch.randn(2, 3), torch.randn(3, 3)
    with ac.capture(flat) as both:
        with ac.capture(flat) as first:
            flat(one)
        with ac.capture(flat) as other:
            flat(two)
    assert (len(first["l1"].output), len(other["l1"].output)) == (2, 3)
    assert torch.equal(other["l1"].output, flat.l1(two))
    assert [len(visit.output) for visit in both["l1"]] == [2, 3]


# -- H: lifetime


@torch.no_grad()
def test_h1_h2_h3_reference_counting_alone_frees_model_and_cache() -> None:
    gc.collect()
    gc.disable()
    try:
        own = tiny_model("gpt2", seed=2)
        with ac.capture(own, include_inputs=True) as cache:
            own(IDS, use_cache=False)
        dropped = weakref.ref(cache)
        walked = [cache.transformer.h[1].output, *cache.transformer.h, cache.transformer.h[-1]]
        del cache, walked
        assert dropped() is None
        with ac.capture(own, sites="resid_post") as kept, ac.edit(own, {"resid_post.0": torch.zeros_like}):
            own(IDS)
        gone = weakref.ref(own)
        del own
        # A cache keeps no model; what it holds is read as before.
        assert gone() is None
        assert kept["resid_post.3"].shape == (2, 5, 32)
    finally:
        gc.enable()


@torch.no_grad()
def test_h4_h5_other_runs_and_other_modules(model: Any) -> None:
    with ac.capture(model, BLOCKS[0]) as first:
        model(IDS)
        # Nothing stands on a module that nobody selected.
        tapped = [path for path, module in model.named_modules() if "_call_impl" in vars(module)]
        assert tapped == [BLOCKS[0]]
    with ac.capture(model, BLOCKS[1]) as second:
        model(IDS)
    assert (list(first), list(second)) == ([BLOCKS[0]], [BLOCKS[1]])
    assert len(first[BLOCKS[0]]) == 1
    assert not any("_call_impl" in vars(module) for module in model.modules())

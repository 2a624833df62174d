"""`ac.knockout`, held against masks written by hand into a plain eager forward."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import actcache as ac
from actcache.testing.tiny import FAMILIES, WINDOW, tiny_model
from edit_helpers import state
from knockout_helpers import IDS, attention_of, by_hand, cut_of, masked_by_hand, run

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
NO_ATTENTION = ("mamba", "mamba2")
ATTENTIVE = [family for family in FAMILIES if family not in NO_ATTENTION]


@pytest.mark.parametrize("family", ATTENTIVE)
def test_it_is_a_mask_written_by_hand(family: str) -> None:
    if family == "distilbert" and TRANSFORMERS_4:
        pytest.skip("its mask in transformers 4 is one of keys alone")
    model = tiny_model(family, attn_implementation="eager")
    stacks = ["encoder", "decoder"] if model.config.is_encoder_decoder else [None]
    for stack in stacks:
        layer = 1 if not family.startswith("t5") else len(getattr(model, str(stack)).block) - 1
        attention = attention_of(model, family, layer, stack)
        prefix = f"{stack}." if stack else ""
        sites = [f"{prefix}resid_post", "logits"]
        with masked_by_hand(attention, cut_of([0, 3], [2, 3, 4], [0, 1])):
            expected = run(model, sites=sites)
        edit = ac.knockout(layer, [0, 3], from_positions=(2, 5), to_positions=[0, 1], stack=stack)
        cache = run(model, edit, sites=[*sites, f"{prefix}pattern.{layer}"])
        plain = run(model, sites=sites)
        for key in expected:
            # Sinks are taken into the greatest score, which is taken away before the softmax.
            tolerance = 1e-6 if family == "gpt_oss" else 0
            torch.testing.assert_close(cache[key], expected[key], rtol=0, atol=tolerance)
        assert torch.equal(cache[f"{prefix}resid_post.0"], expected[f"{prefix}resid_post.0"])
        assert not torch.allclose(cache["logits"], plain["logits"], atol=1e-3)
        pattern = cache[f"{prefix}pattern.{layer}"]
        assert not bool(pattern[:, [0, 3], 2:5, :2].any())
        assert bool((pattern[:, [1, 2], 2:5, :2] > 0).any())
        if family != "gpt_oss":
            torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 6))


@pytest.fixture
def model() -> Any:
    return tiny_model("llama", attn_implementation="eager")


def test_other_implementations_of_attention() -> None:
    """Without eager attention the numbers are those of eager attention to within rounding, and blocks before the one
    that is cut are exactly as before."""
    edit = ac.knockout(2, from_positions=[1, "last"], to_positions=0)
    cut = cut_of([0, 1, 2, 3], [1, 5], [0])
    expected = by_hand(tiny_model("llama", attn_implementation="eager"), 2, cut)
    model = tiny_model("llama", attn_implementation="sdpa")
    sites = ["logits", "resid_post"]
    cache, plain = run(model, edit, sites=sites), run(model, sites=sites)
    torch.testing.assert_close(cache["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
    assert torch.equal(cache["resid_post.1"], plain["resid_post.1"])
    assert model.config._attn_implementation == "sdpa"


def test_layers_heads_and_positions(model: Any) -> None:
    everything = [0, 1, 2, 3]
    cut = cut_of(everything, [5], [1, 2, 4])
    for edit in (
        ac.knockout(-1, from_positions="last", to_positions=[(1, 3), -2]),
        ac.knockout("last", everything, from_positions=[-1], to_positions=[1, 2, 4]),
        ac.knockout([3], [-4, 1, 2, 3], from_positions=(5, 6), to_positions=[4, 2, 1, 1]),
        ac.knockout(3, from_positions=[[5], [-1]], to_positions=[[1, 2, 4], [(1, 3), -2]]),
    ):
        assert torch.equal(run(model, edit)["logits"], by_hand(model, 3, cut)["logits"])
    # Several layers, as several edits; of one layer each on top of the other.
    several = run(model, ac.knockout([0, 2], 1, from_positions="last", to_positions=2))
    one_by_one = [ac.knockout(layer, 1, from_positions="last", to_positions=2) for layer in (0, 2)]
    assert torch.equal(several["logits"], run(model, one_by_one)["logits"])
    whole = run(model, ac.knockout("all", 1, from_positions=4, to_positions=2), sites="pattern")
    assert all(not bool(whole[f"pattern.{i}"][:, 1, 4, 2].any()) for i in range(4))
    both = [ac.knockout(1, 0, from_positions=4, to_positions=2), ac.knockout(1, 0, from_positions=4, to_positions=3)]
    together = ac.knockout(1, 0, from_positions=4, to_positions=[2, 3])
    assert torch.equal(run(model, both)["logits"], run(model, together)["logits"])


def test_keys_that_no_query_sees_anyway(model: Any) -> None:
    message = r"layer 1 changes nothing in prompt 0: to_positions \(\(3, 6\)\) lie ahead of from_positions \(2\)"
    for edit in (
        ac.knockout(1, from_positions=2, to_positions=(3, 6)),
        ac.knockout(1, 0, from_positions=[[2], [5]], to_positions=[[(3, 6)], [1]]),
    ):
        with pytest.raises(
            ac.errors.EditError, match=message if edit.of_prompts is None else "changes nothing in prompt 0"
        ):
            run(model, edit)
    with (
        pytest.raises(ac.errors.EditError, match=message),
        ac.edit(model, ac.knockout(1, from_positions=2, to_positions=(3, 6))),
    ):
        model.generate(IDS, max_new_tokens=2, pad_token_id=0)
    # Some of what is cut was seen, or is by the next prompt's numbers, or attention looks ahead.
    cut = cut_of([0, 1, 2, 3], [1, 5], [3])
    found = run(model, ac.knockout(1, from_positions=[1, 5], to_positions=3))
    assert torch.equal(found["logits"], by_hand(model, 1, cut)["logits"])
    bert = tiny_model("bert")
    ahead = run(bert, ac.knockout(1, from_positions=2, to_positions=(3, 6)))["logits"]
    assert not torch.allclose(ahead, run(bert)["logits"], atol=1e-4)
    # A layer with a window has keys that it does not see: other layers do.
    mistral = tiny_model("mistral")
    assert mistral.config.sliding_window == WINDOW
    long = torch.arange(3, 3 + WINDOW + 4)[None]
    torch.testing.assert_close(
        run(mistral, ac.knockout(1, from_positions="last", to_positions=0), ids=long)["logits"],
        run(mistral, ids=long)["logits"],
    )


def test_one_identity_for_all_ways_of_writing_the_same() -> None:
    def told(from_positions: Any, to_positions: Any, heads: Any = (0, 2)) -> str:
        edit = ac.knockout(1, heads, from_positions=from_positions, to_positions=to_positions)
        return json.dumps(edit.identity(), sort_keys=True)

    same = [
        [0, [0], (0, 1), "first", [0, 0], [(0, 1), "first"]],
        [-1, "last", [-1], ["last", -1]],
        [[1, 2, 3], (1, 4), [3, 1, 2], [(1, 3), 3], [(1, 3), (2, 4)]],
        [(-3, -1), [-3, -2], [-2, -3]],
        [[0, -1], ["last", "first"], [-1, (0, 1)]],
        [(2, -1), [(2, -1)], [(2, -1), (2, -1)]],
        ["all", ["all"], ["all", 3]],
        [[[0], [1, 2]], [[(0, 1)], [(1, 3)]]],
        [ac.tokens_of("image"), [ac.tokens_of("image")], [ac.tokens_of("image"), ac.tokens_of("image")]],
        [ac.tokens_of("image", "last"), [ac.tokens_of("image", "last")]],
        [[0, ac.tokens_of("image")], [ac.tokens_of("image"), "first"]],
    ]
    for ways in same:
        assert len({told(way, 0) for way in ways}) == 1, ways
        assert len({told("last", way) for way in ways}) == 1, ways
    assert len({told(ways[0], 0) for ways in same}) == len(same)
    assert told(0, [1, 3]) != told(0, (1, 4))
    assert told(3, 0, [2, 0]) == told(3, 0, (0, 2, 0)) != told(3, 0, [1, 2])


def test_what_is_wrong(model: Any) -> None:
    errors = ac.errors
    good: dict[str, Any] = {"from_positions": "last", "to_positions": 0}
    for arguments, error, message in [
        ({"layer": 4}, errors.LayerRangeError, "layer 4 is out of range: the model has 4 layers"),
        ({"layer": -5}, errors.LayerRangeError, "layer -5"),
        ({"layer": "every"}, errors.OptionError, "'every'"),
        ({"layer": 1.5}, errors.OptionError, "1.5"),
        ({"layer": []}, errors.OptionError, "empty"),
        ({"layer": 1, "heads": 4}, errors.LayerRangeError, r"head 4 of 'pattern\.1' is out of range: it has 4 heads"),
        ({"layer": 1, "heads": []}, errors.OptionError, "heads is"),
        ({"layer": 1, "from_positions": None}, errors.OptionError, "'all' is every one"),
        ({"layer": 1, "to_positions": "somewhere"}, errors.OptionError, "somewhere"),
        ({"layer": 1, "stack": "decoder"}, errors.SiteUnavailableError, "one stack"),
        ({"layer": 1, "stack": "middle"}, errors.OptionError, "'encoder'"),
    ]:
        with pytest.raises(error, match=message):
            ac.edit(model, ac.knockout(**{**good, **arguments}))
    for positions in ({"from_positions": 6}, {"to_positions": -7}, {"to_positions": (0, 9)}):
        with pytest.raises(errors.LayerRangeError, match="out of range: the prompt has 6 tokens"):
            run(model, ac.knockout(1, **{**good, **positions}))
    with pytest.raises(errors.SiteUnavailableError, match="two stacks"):
        ac.edit(tiny_model("t5"), ac.knockout(1, **good))
    with pytest.raises(errors.SiteUnavailableError, match=r"pattern\.0.*mixer_out|pattern\.0.*no attention"):
        ac.edit(tiny_model("mamba"), ac.knockout("all", **good))
    mixed = tiny_model("qwen3_next")
    with pytest.raises(errors.SiteUnavailableError, match=r"pattern\.0.*no probabilities.*blocks 1, 3 have it"):
        ac.edit(mixed, ac.knockout([0, 1], **good))
    cache = run(mixed, ac.knockout("all", **good), sites=["pattern.1", "pattern.3"])
    assert not any(bool(value[:, :, -1, 0].any()) for value in cache.values())
    with (
        pytest.raises(errors.MissedModuleError, match="knockout of layer 1 at layer 1"),
        ac.edit(model, ac.knockout(1, **good)),
    ):
        pass


def test_nothing_is_left_behind(model: Any) -> None:
    before = state(model)
    edit = ac.knockout("all", 0, from_positions="last", to_positions=0)
    run(model, edit)
    assert state(model) == before

    class Interrupt(KeyboardInterrupt):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(interrupt)
    with pytest.raises(Interrupt), ac.edit(model, edit), ac.capture(model, sites="pattern"):
        model(IDS)
    handle.remove()
    with pytest.raises(ac.errors.EditError), ac.edit(model, ac.knockout(1, from_positions=0, to_positions=0)):
        model(IDS)
    assert state(model) == before
    assert torch._C._len_torch_function_stack() == 0
    plain = run(model)["logits"]
    for _ in range(2):
        run(model, edit)
    assert torch.equal(run(model)["logits"], plain)


def test_half_precision() -> None:
    model = tiny_model("llama", attn_implementation="eager").to(torch.bfloat16)
    cut = cut_of([1], [4, 5], [0, 1])
    cache = run(model, ac.knockout(2, 1, from_positions=(4, 6), to_positions=(0, 2)))
    assert torch.equal(cache["logits"], by_hand(model, 2, cut)["logits"])
    with pytest.raises(ac.errors.EditError, match="nothing to attend to"):
        run(model.half(), ac.knockout(2, 1, from_positions=1, to_positions=(0, 2)))


def test_gradients_flow(model: Any) -> None:
    edit = ac.knockout(1, 0, from_positions="last", to_positions=[0, 2])
    with ac.edit(model, edit):
        model(IDS).logits[:, -1].square().mean().backward()
    given = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with masked_by_hand(attention_of(model, "llama", 1, None), cut_of([0], [5], [0, 2])):
        model(IDS).logits[:, -1].square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(given[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_two_threads_cut_and_edit_apart(model: Any) -> None:
    """Each thread's passes see what that thread asked for, at the same modules and at the same time."""
    edits: list[Any] = [
        [ac.knockout(1, 0, from_positions="last", to_positions=0), ac.ablate("head_out.2.1")],
        [ac.knockout(1, 3, from_positions=2, to_positions=1), ac.ablate("head_out.2.3")],
        None,
    ]
    sites = ["pattern.1", "head_out.2", "logits"]
    alone = [run(model, edit, sites=sites) for edit in edits]
    together, barrier = [[] for _ in edits], threading.Barrier(len(edits))

    def work(number: int) -> None:
        for _ in range(5):
            barrier.wait(timeout=60)
            together[number].append(run(model, edits[number], sites=sites))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(edits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, caches in zip(alone, together, strict=True):
        assert len(caches) == 5
        assert all(torch.equal(cache[key], mine[key]) for cache in caches for key in sites)


def test_a_mask_of_ten_thousand_hides_what_it_hides() -> None:
    """OpenAI's GPT takes 1e4 from the scores of the future: a query with nothing else left sees nothing."""
    config = transformers.OpenAIGPTConfig(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    with (
        pytest.raises(ac.errors.EditError, match="token 0 of prompt 0"),
        ac.edit(model, ac.knockout(0, from_positions=0, to_positions=0)),
    ):
        model(IDS)
    # Low scores that are no mask are seen, however the others are cut.
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(30)
    with (
        torch.no_grad(),
        ac.edit(model, ac.knockout(0, from_positions=5, to_positions=5)),
        ac.capture(model, sites="pattern.0") as cache,
    ):
        model(IDS)
    assert not bool(cache["pattern.0"][:, :, 5, 5].any())
    torch.testing.assert_close(cache["pattern.0"].sum(-1), torch.ones(2, 4, 6))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_of_attention_stays_in_training(attention: str) -> None:
    model = tiny_model("llama", attn_implementation=attention, attention_dropout=0.5).train()

    def passes(edits: Any) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad(), ac.edit(model, edits):
            return torch.stack([model(IDS).logits for _ in range(8)])

    cut = passes(ac.knockout("all", heads=0, from_positions=5, to_positions=0))
    assert bool((cut.std(0) > 0.01).float().mean() > 0.5)
    # The same numbers are drawn as without an edit.
    torch.manual_seed(0)
    with torch.no_grad():
        plain = torch.stack([model(IDS).logits for _ in range(8)])
    torch.testing.assert_close(passes({"pattern.1": lambda x: x}), plain, rtol=1e-4, atol=1e-4)

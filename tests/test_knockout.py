"""`ac.knockout`, held against masks written by hand into a plain eager forward."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import actcache as ac
import edit_helpers
from actcache.testing.tiny import FAMILIES, PAD, WINDOW, tiny_model
from edit_helpers import state

IDS = torch.tensor([[5, 9, 100, 7, 60, 41], [8, 3, 4, 50, 11, 90]])
LEFT = torch.tensor([[PAD, PAD, 9, 100, 7, 41], [8, 3, 4, 50, 6, 90]])
RIGHT = torch.tensor([[9, 100, 7, 41, PAD, PAD], [8, 3, 4, 50, 6, 90]])
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
NO_ATTENTION = ("mamba", "mamba2")
ATTENTIVE = [family for family in FAMILIES if family not in NO_ATTENTION]


def attention_of(model: Any, family: str, layer: int, stack: str | None) -> Any:
    """The module that is called with the mask of self-attention."""
    if family.startswith("t5"):
        return getattr(model, str(stack)).block[layer].layer[0].SelfAttention
    if family == "bart":
        return getattr(model.model, str(stack)).layers[layer].self_attn
    if family in ("bert", "roberta"):
        return getattr(model, family).encoder.layer[layer].attention.self
    if family == "distilbert":
        return model.distilbert.transformer.layer[layer].attention
    if family == "mpt":
        return model.transformer.blocks[layer].attn
    if family.startswith("gpt_neox"):
        return model.gpt_neox.layers[layer].attention
    if family.startswith("opt"):
        return model.model.decoder.layers[layer].self_attn
    block = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[layer]
    return next(
        getattr(block, name) for name in ("attn", "self_attn", "self_attention", "attention") if hasattr(block, name)
    )


@contextmanager
def masked_by_hand(attention: Any, cut: Tensor) -> Iterator[None]:
    """`cut` (bool ``[B, H, S, S]``) at -inf in the mask that one attention module of an eager model is given."""

    def pre(module: Any, args: Any, kwargs: Any) -> Any:
        def changed(mask: Tensor) -> Tensor:
            # Some masks are wider than there are keys.
            here = torch.nn.functional.pad(cut, (0, max(0, mask.shape[-1] - cut.shape[-1])))
            if mask.dtype == torch.bool:
                # MPT hides what is true.
                return mask | here
            return mask + torch.zeros(here.shape, dtype=mask.dtype).masked_fill(here, -torch.inf)

        # The first block of T5 puts the mask into the bias, which all others hand on.
        names = ["position_bias"] if type(module).__name__ == "T5Attention" else []
        names = names or [
            n for n in ("attention_mask", "mask", "sliding_window_mask") if isinstance(kwargs.get(n), Tensor)
        ]
        if not names and any(is_mask := [isinstance(a, Tensor) and a.ndim == 4 for a in args]):
            return tuple(changed(a) if yes else a for a, yes in zip(args, is_mask, strict=True)), kwargs
        # Where every token sees every other one, there may be no mask.
        masks = {name: kwargs[name] for name in names} or {
            "mask" if "mask" in kwargs else "attention_mask": torch.zeros(1, 1, 1, 1)
        }
        return args, {**kwargs, **{name: changed(mask) for name, mask in masks.items()}}

    handle = attention.register_forward_pre_hook(pre, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run(model: Any, edits: Any = None, sites: Any = None, ids: Tensor = IDS, **kwargs: Any) -> Any:
    return edit_helpers.run(model, edits, sites or ["logits"], ids, **kwargs)


def cut_of(heads: list[int], queries: list[int], keys: list[int], length: int = 6, n_heads: int = 4) -> Tensor:
    cut = torch.zeros(2, n_heads, length, length, dtype=torch.bool)
    for head in heads:
        for query in queries:
            cut[:, head, query, keys] = True
    return cut


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


def by_hand(model: Any, layer: int, cut: Tensor, sites: Any = None, ids: Tensor = IDS, **kwargs: Any) -> Any:
    with masked_by_hand(attention_of(model, "llama", layer, None), cut):
        return run(model, sites=sites, ids=ids, **kwargs)


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert"])
@pytest.mark.parametrize("from_positions", ["last", [1, -2], (1, 3), "all", [[2], ["last", 1]]])
def test_positions_count_real_tokens_whatever_the_padding_side(family: str, from_positions: Any) -> None:
    model = tiny_model(family)
    to_positions = [2] if from_positions == "all" else 0
    for ids in (LEFT, RIGHT):
        mask = (ids != PAD).long()
        places = (mask.cumsum(1) - 1).clamp_min(0)
        options = {"attention_mask": mask} | ({} if family == "bloom" else {"position_ids": places})
        edit = ac.knockout([1, 2], [0, 2], from_positions=from_positions, to_positions=to_positions)
        cache = run(model, edit, ids=ids, sites=["logits", "pattern"], **options)
        for row, real in enumerate(mask.bool()):
            alone = (
                from_positions[row] if isinstance(from_positions, list) and from_positions[0] == [2] else from_positions
            )
            edit = ac.knockout([1, 2], [0, 2], from_positions=alone, to_positions=to_positions)
            one = run(model, edit, ids=ids[row][real][None], sites=["logits", "pattern"])
            torch.testing.assert_close(cache["logits"][row][real], one["logits"][0], rtol=1e-4, atol=1e-4)
            pattern = cache["pattern.1"][row][:, real][:, :, real]
            torch.testing.assert_close(pattern, one["pattern.1"][0], rtol=1e-4, atol=1e-5)
            assert bool((one["pattern.1"][0, [0, 2]] == 0).tril().any())
        assert not any(bool(value.isnan().any()) for value in cache.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_oss", "t5", "gemma3"])
@pytest.mark.parametrize("from_positions", ["last", "all", [1, "last"]])
def test_generation_is_the_same_with_and_without_a_kv_cache(family: str, from_positions: Any) -> None:
    """Positions of the prompt keep their meaning in every step; with "all" new tokens are cut off too. Prompts grow
    past the sliding windows."""
    model = tiny_model(family)
    if family == "t5":
        if from_positions != "all":
            pytest.skip("the decoder's own prompt is one token")
        edit = ac.knockout("all", [0, 1], from_positions="all", to_positions=[1, 2], stack="encoder")
    else:
        edit = ac.knockout(
            "all", [0, 1, 3], from_positions=from_positions, to_positions=[0] if from_positions != "all" else 1
        )
    edit_helpers.hold_generation(model, edit, 2 * WINDOW, input_ids=LEFT, attention_mask=(LEFT != PAD).long())


def test_generation_is_a_mask_in_every_step(model: Any) -> None:
    """New tokens cut off from two tokens of the prompt: each step's logits by hand, the whole sequence at once."""
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    edit = ac.knockout(1, [0, 2], from_positions="all", to_positions=[1, 3])
    with ac.edit(model, edit):
        out = model.generate(IDS, **options, output_logits=True, return_dict_in_generate=True)
    ids = out.sequences[:, :-1]
    cut = cut_of([0, 2], list(range(10)), [1, 3], length=10)
    expected = by_hand(model, 1, cut, ids=ids)["logits"][:, 5:]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-4, atol=1e-4)
    # Of beams, each prompt's rows are cut alike.
    with ac.edit(model, edit):
        beams = [model.generate(IDS, **options, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


def test_a_query_that_would_see_nothing_is_named(model: Any) -> None:
    before = run(model)["logits"]
    for edit, message in [
        (ac.knockout(1, 2, from_positions=0, to_positions=0), "layer 1 leaves token 0 of prompt 0 nothing.*in head 2"),
        (ac.knockout(1, from_positions="last", to_positions="all"), "token 5 of prompt 0"),
        (
            ac.knockout([2], from_positions=[[3], [1]], to_positions=[[0], [0, 1]]),
            r"layer 2 leaves token 1 of prompt 1",
        ),
        (
            ac.knockout(1, from_positions="all", to_positions=0),
            r"token 0 of prompt 0.*ac\.ablate\('z\.1', heads=0, pos",
        ),
    ]:
        with pytest.raises(ac.errors.EditError, match=message):
            run(model, edit)
    mask = (LEFT != PAD).long()
    with pytest.raises(ac.errors.EditError, match="token 0 of prompt 0"):
        run(model, ac.knockout(1, from_positions="first", to_positions="first"), ids=LEFT, attention_mask=mask)
    # Padding attends to what nobody sees; that is no reason to refuse.
    run(model, ac.knockout(1, from_positions=(1, 4), to_positions=0), ids=LEFT, attention_mask=mask)
    assert torch.equal(run(model)["logits"], before)


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_patterns_of_generation(family: str) -> None:
    """With and without a KV cache, and where queries that share keys are put together for a single new token."""
    model = tiny_model(family)
    left = {"input_ids": LEFT, "attention_mask": (LEFT != PAD).long()}
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    edit = ac.knockout(1, [1, 2], from_positions="all", to_positions=[1, 2])
    with ac.edit(model, edit), ac.capture(model, sites="pattern.1") as cache:
        ids = model.generate(**left, **options)
    mask = torch.cat([left["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    whole = run(model, edit, ids=ids[:, :-1], sites="pattern.1", attention_mask=mask, position_ids=places)["pattern.1"]
    real = mask.bool()
    for row in range(2):
        torch.testing.assert_close(
            cache["pattern.1"][row][:, real[row]], whole[row][:, real[row]], rtol=1e-4, atol=1e-5
        )
    # A query of a sliding window sees other keys: those that are cut are cut for every query.
    assert not bool(cache["pattern.1"][1, [1, 2]][:, :, [1, 2]].any())


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

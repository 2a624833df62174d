"""Attention probabilities: those that the model's own attention makes, whichever implementation it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache.capture.hooks import observe
from actcache.capture.readers import OnInput
from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import describe
from actcache.model.implementation import holding_probabilities
from actcache.testing.tiny import PAD, tiny_model

IDS = tuple(zoo.prompts_of(3, [17])[0])
every_family = pytest.mark.parametrize("family", list(zoo.FAMILIES))
# Its fused attention adds other numbers to the scores than its eager one, by several percent, in both generations.
DIFFER = ("falcon-rw",)


def patterns_of(model: Any) -> list[str]:
    return [str(info.site) for info in ac.sites(model) if info.site.name == "pattern"]


@torch.no_grad()
def captured(model: Any, sites: Any, ids: Any = IDS, **inputs: Any) -> ac.ActivationCache:
    with ac.capture(model, sites=sites) as cache:
        model(input_ids=torch.as_tensor(ids).reshape(-1, len(ids)), **inputs)
    return cache


# -- against what transformers returns


@every_family
@pytest.mark.parametrize("seed", [0, 1])
def test_patterns_are_those_that_transformers_returns(family: str, seed: int) -> None:
    eager = zoo.eager_model_of(family, seed)
    theirs = {site: value for site, value in zoo.eager(family, eager, IDS).items() if "pattern" in site}
    for model in (eager, zoo.model_of(family, seed)):
        sites = patterns_of(model)
        assert sorted(sites) == sorted(theirs)
        if not sites:
            assert "mamba" in family
            return
        running = zoo.unused(family, model)
        with torch.no_grad(), ac.capture(running, sites=sites) as cache:
            running(**zoo.inputs_of(family, model, IDS))
        for site in sites:
            assert cache[site].shape == (1, *theirs[site].shape)
            if model is eager:
                assert torch.equal(cache[site][0], theirs[site]), site
            elif family not in DIFFER:
                assert zoo.relative_error(cache[site][0], theirs[site]) < 2e-6, site


@every_family
def test_patterns_weight_values(family: str) -> None:
    """What attention makes, with the fused attention that a model runs by itself, from the captured parts alone."""
    model = zoo.model_of(family)
    sites = patterns_of(model)
    if not sites:
        assert "mamba" in family
        return
    wanted = [site.replace("pattern", name) for site in sites for name in ("pattern", "v", "z")]
    running = zoo.unused(family, model)
    with torch.no_grad(), ac.capture(running, sites=wanted) as cache:
        running(**zoo.inputs_of(family, model, IDS))
    for site in sites:
        pattern, values, mixed = (cache[site.replace("pattern", name)].double() for name in ("pattern", "v", "z"))
        heads = pattern.shape[1]
        # The values of query head h are those of the group that it is in.
        values = values[:, :, [head // (heads // values.shape[2]) for head in range(heads)]]
        made = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
        assert (zoo.relative_error(made, mixed) < 1e-6) == zoo.FAMILIES[family].plain, site
        rows = pattern.sum(-1)
        if family == "gpt_oss":
            assert bool((rows < 0.999).all())
        else:
            torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-6)


def test_a_window_is_in_the_pattern() -> None:
    model = tiny_model("gemma3")
    cache = captured(model, "pattern")
    ahead = torch.ones(17, 17).triu(1).bool()
    behind = torch.ones(17, 17).tril(-8).bool()
    for layer in range(4):
        pattern = cache[f"pattern.{layer}"][0]
        assert not bool(pattern[:, ahead].any())
        assert bool((pattern[:, behind] == 0).all()) == (layer % 2 == 0)
        assert bool((pattern[:, ~ahead & ~behind] > 0).all())


# -- padding, generation


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "falcon", "gpt_oss", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_between_real_tokens(family: str, side: str) -> None:
    model = tiny_model(family)
    prompts = [list(IDS[:9]), list(IDS[3:17])]
    width = max(map(len, prompts))
    kept = [slice(width - len(p), width) if side == "left" else slice(0, len(p)) for p in prompts]
    ids = torch.full((2, width), PAD)
    mask = torch.zeros(2, width, dtype=torch.long)
    for row, (prompt, where) in enumerate(zip(prompts, kept, strict=True)):
        ids[row, where] = torch.tensor(prompt)
        mask[row, where] = 1
    inputs: dict[str, Any] = {"attention_mask": mask}
    if family in ("gpt2", "bert"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), ac.capture(model, sites=["pattern", "z", "head_out"]) as cache:
        model(input_ids=ids, **inputs)
    for row, (prompt, where) in enumerate(zip(prompts, kept, strict=True)):
        alone = captured(model, ["pattern", "z", "head_out"], prompt)
        for key, value in alone.items():
            own = cache[key][row][:, where, where] if "pattern" in key else cache[key][row][where]
            assert zoo.relative_error(own, value[0]) < 2e-6, key
            if "pattern" in key:
                seen = cache[key][row][:, where]
                outside = torch.ones(width, dtype=torch.bool)
                outside[where] = False
                assert not bool(seen[:, :, outside].any())


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss", "falcon", "mistral"])
def test_each_step_of_generation_attends_to_all_before(family: str) -> None:
    """A query's row is what it is in one pass over everything, with a cache of keys and without."""
    model = tiny_model(family)
    steps: list[Tensor] = []
    point = describe(model).points("pattern.1")
    with observe(point, lambda _, value: steps.append(value.clone())):
        made = model.generate(
            torch.tensor([IDS[:12]]), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=PAD
        )
    full = captured(model, "pattern.1", made[0, :-1].tolist())["pattern.1"]
    # A cache of keys that slides along keeps the last of them only.
    kept = [8] * 4 if family == "mistral" else [13, 14, 15, 16]
    assert [tuple(step.shape[2:]) for step in steps] == [(12, 12), *((1, keys) for keys in kept)]
    assert zoo.relative_error(steps[0], full[:, :, :12, :12]) < 2e-6
    for number, step in enumerate(steps[1:], 12):
        first = number + 1 - step.shape[3]
        assert zoo.relative_error(step, full[:, :, number : number + 1, first : number + 1]) < 2e-6
        assert not bool(full[:, :, number, :first].any())


# -- reading disturbs nothing


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "bert", "t5", "gpt_oss", "modernbert", "qwen3_next"])
def test_the_model_computes_what_it_computes_without(family: str) -> None:
    model = tiny_model(family)
    inputs = zoo.inputs_of(family, model, IDS)
    with torch.no_grad():
        before = model(**inputs).logits
        with ac.capture(model, sites=[i.site for i in ac.sites(model) if i.site.name in ("pattern", "head_out")]):
            during = model(**inputs).logits
        after = model(**inputs).logits
    assert torch.equal(during, before)
    assert torch.equal(after, before)


def test_another_threads_pass_is_its_own() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([IDS])
    other: list[Tensor] = []
    mine: list[int] = []
    ready, done = threading.Event(), threading.Event()

    @torch.no_grad()
    def run() -> None:
        ready.wait(20)
        other.append(model(ids[:, :5]).logits)
        done.set()

    def wait(*_: Any) -> None:
        if threading.get_ident() in mine:
            ready.set()
            done.wait(20)

    thread = threading.Thread(target=run)
    thread.start()
    with torch.no_grad():
        expected = model(ids[:, :5]).logits
        with ac.capture(model, sites=["pattern.1", "head_out.1"]) as cache:
            # In the middle of this thread's attention, and of its output projection.
            hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(wait)
            mine.append(threading.get_ident())
            model(ids)
            hook.remove()
    thread.join(20)
    assert torch.equal(other[0], expected)
    alone = captured(model, ["pattern.1", "head_out.1"])
    assert torch.equal(cache["pattern.1"], alone["pattern.1"])
    assert torch.equal(cache["head_out.1"], alone["head_out.1"])


def test_nothing_is_held_when_the_call_is_over() -> None:
    import gc
    import weakref

    model = tiny_model("llama", attn_implementation="eager")
    attention = model.model.layers[1].self_attn
    refs: list[Any] = []
    with torch.no_grad(), ac.capture(model, sites=["pattern.1", "head_out.1.2"]):
        hooks = [
            attention.o_proj.register_forward_pre_hook(lambda _, args: refs.append(weakref.ref(args[0]))),
            # Behind attention's output its probabilities.
            attention.register_forward_hook(lambda _, args, output: refs.append(weakref.ref(output[1]))),
        ]
        model(torch.tensor([IDS]))
        for hook in hooks:
            hook.remove()
        gc.collect()
        assert [ref() for ref in refs] == [None, None]


# -- implementations that hold no probabilities


@contextmanager
def implementation(model: Any, name: str) -> Iterator[None]:
    """Run the model with an attention function that transformers knows by a name, and that makes probabilities where
    nobody sees them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def hidden(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        with torch._C.DisableTorchFunction():
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, hidden)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    yield


def implementations(model: Any) -> set[str]:
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


def test_another_implementation_gives_way_while_its_probabilities_are_read() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    expected = captured(plain, ["pattern", "z"])
    with implementation(model, "unseen"):
        assert {"pattern.0", "q.0", "head_out.3"} <= {str(info.site) for info in ac.sites(model)}
        assert implementations(model) == {"unseen"}
        cache = captured(model, ["pattern", "z"])
        assert implementations(model) == {"unseen"}
        for key, value in expected.items():
            assert zoo.relative_error(cache[key], value) < 2e-6, key
        # Sites that need none leave it as it is.
        with ac.capture(model, sites=["z", "head_out"]):
            assert implementations(model) == {"unseen"}
            model(torch.tensor([IDS]))
        block = ac.capture(model, sites="pattern.0")
        block.__enter__()
        assert implementations(model) == {"eager"}
        block.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        assert implementations(model) == {"unseen"}


def test_blocks_that_end_in_any_order_leave_what_there_was() -> None:
    model = tiny_model("llama")
    with implementation(model, "unseen"):
        first, second = ac.capture(model, sites="pattern.0"), ac.capture(model, sites="pattern.1")
        first.__enter__()
        second.__enter__()
        model(torch.tensor([IDS]))
        first.__exit__(None, None, None)
        assert implementations(model) == {"eager"}
        second.__exit__(None, None, None)
        assert implementations(model) == {"unseen"}
    with holding_probabilities(plain := tiny_model("llama")):
        # It shows them as it is.
        assert implementations(plain) == {"sdpa"}


def test_an_implementation_chosen_inside_the_block() -> None:
    model = tiny_model("llama")
    with (
        torch.no_grad(),
        pytest.raises(SiteUnavailableError, match=r"another implementation.*attn_implementation='eager'"),
        ac.capture(model, sites="pattern.0"),
        implementation(model, "unseen"),
    ):
        model(torch.tensor([IDS]))


# -- changes in the middle


class Change:
    """Stands on an attention module, and doubles the probabilities of its second head."""

    declared = early = False

    def __init__(self, side: Any) -> None:
        self.side = side
        self.seen: list[Tensor] = []

    def stands(self) -> bool:
        return True

    def __call__(self, value: Tensor) -> Tensor:
        self.seen.append(value.clone())
        new = value.clone()
        if self.side == "pattern":
            new[:, 1] = new[:, 1].flip(-1)
        else:
            new[:, 1, 5, :3] = -torch.inf
        return new


@torch.no_grad()
@pytest.mark.parametrize("side", ["pattern", "scores"])
@pytest.mark.parametrize("attention", [None, "eager"], ids=["its own", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "t5"])
def test_what_changes_probabilities_changes_what_is_made_of_them(family: str, attention: str | None, side: str) -> None:
    """And who reads them meets the changed ones, wherever his block began."""
    from actcache.model.taps import Taps

    model = tiny_model(family, **({"attn_implementation": attention} if attention else {}))
    inputs = zoo.inputs_of(family, model, IDS)
    dot = "decoder." if family == "t5" else ""
    sites = [f"{dot}pattern.1", f"{dot}v.1", f"{dot}z.1", f"{dot}pattern.2"]
    with ac.capture(model, sites=sites) as before:
        model(**inputs)
    (point,) = describe(model).points(f"{dot}pattern.1").values()
    change = Change(side)
    notes = [(module, OnInput(note)) for module, note in point.around]
    placed: dict[str, Any] = {"listeners": notes, "guards": point.guards, "changes": [(point.module, change)]}
    for order in (0, 1):
        taps, block = Taps(), ac.capture(model, sites=sites)
        change.seen.clear()
        if order:
            taps.add(**placed)
        with block as cache:
            if not order:
                taps.add(**placed)
            model(**inputs)
            taps.remove()
        pattern, was = cache[f"{dot}pattern.1"], before[f"{dot}pattern.1"]
        assert len(change.seen) == 1
        if side == "pattern":
            assert torch.equal(change.seen[0], was)
            assert torch.equal(pattern[:, 1], was[:, 1].flip(-1))
        else:
            assert not bool(pattern[:, 1, 5, :3].any())
            assert change.seen[0].shape == was.shape
        assert torch.equal(pattern[:, [0, 2, 3]], was[:, [0, 2, 3]])
        values = cache[f"{dot}v.1"].double()
        values = values[:, :, [head // (4 // values.shape[2]) for head in range(4)]]
        made = torch.einsum("bhqk,bkhd->bqhd", pattern.double(), values)
        assert zoo.relative_error(made, cache[f"{dot}z.1"]) < 1e-6
        assert zoo.relative_error(cache[f"{dot}pattern.2"], before[f"{dot}pattern.2"]) > 1e-4

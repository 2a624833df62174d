"""The reference is right by itself: its values satisfy the identities of their sites, and are what transformers says.

Held without the package's own anatomy, so that a wrong row of the tables is found here.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
import zoo_families
from actcache.testing.tiny import FAMILIES as MADE

# A sum of three numbers, rounded once per addition: each is off by half a unit of the largest number involved.
EPS = torch.finfo(torch.float32).eps
IDS = tuple(zoo.prompts_of(3, [17])[0])
every_family = pytest.mark.parametrize("family", list(zoo.FAMILIES))


def assert_sum(whole: Tensor, *parts: Tensor) -> None:
    total = sum(part.double() for part in parts)
    bound = 2 * EPS * sum(part.double().abs() for part in parts)
    assert bool(((whole.double() - total).abs() <= bound).all()), float((whole.double() - total).abs().max())


def in_double(module: torch.nn.Module, value: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).double()(value.double())


def close(ours: Tensor, theirs: Tensor) -> bool:
    return zoo.relative_error(ours, theirs) < 2e-6


def test_every_family_that_can_be_made_has_a_reference() -> None:
    assert set(zoo.FAMILIES) == set(MADE)


@every_family
def test_the_reference_reads_exactly_the_sites_the_family_has(family: str) -> None:
    model = zoo.model_of(family)
    values = zoo.reference(family, 0, IDS)
    assert set(zoo.expected_sites(family, model)) <= set(values)
    width = model.get_input_embeddings().weight.shape[1] if family != "opt-350m" else 32
    widths = widths_of(family, model, width)
    for site, value in values.items():
        assert value.shape == (len(IDS), widths.get(zoo.name_of(site), width)), site
        assert bool(value.isfinite().all()), site
    assert model(**zoo.inputs_of(family, model, IDS)).logits.shape == (1, len(IDS), 259)


def widths_of(family: str, model: Any, width: int) -> dict[str, int]:
    """Widths of the sites that are no part of the stream."""
    if "mamba" in family:
        return {"logits": 259}
    config = model.config
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None) or width // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if family.startswith("falcon"):
        groups = {"falcon": 1, "falcon-40b": 2, "falcon-rw": 4}[family]
    widths = {"q": heads * size, "k": groups * size, "v": groups * size, "z": heads * size}
    if family == "deepseek_v3":
        widths = {"q": 4 * 12, "v": 4 * 8, "z": 4 * 8}
    wide = ("gpt2", "gpt_neo", "gptj", "bloom", "falcon", "falcon-40b", "falcon-rw", "mpt")
    return widths | {
        "head_out": heads * width, "mlp_act": 128 if family in wide else 48, "router_logits": 4, "logits": 259,
    }  # fmt: skip


@every_family
@pytest.mark.parametrize("seed", [0, 1])
def test_heads_add_up_and_patterns_mix_values(family: str, seed: int) -> None:
    """All heads and the bias are what the output projection returns; each head's pattern times its values is what it
    hands on; what is behind the last query is no key."""
    model = zoo.eager_model_of(family, seed)
    outputs: dict[str, Tensor] = {}
    projections = {site: module for site, module, _ in zoo.hooks_of(family, model) if ".z." in f".{site}"}
    seen = [
        module.register_forward_hook(lambda m, a, out, site=site: outputs.__setitem__(site, out[0].clone()))
        for site, module in projections.items()
    ]
    with torch.no_grad():
        at = zoo.eager(family, model, IDS)
    for handle in seen:
        handle.remove()
    heads = 0 if "mamba" in family else model.config.num_attention_heads
    assert [site for site in at if "pattern" in site] == [site.replace("z.", "pattern.") for site in projections]
    for site, module in projections.items():
        dot, _, layer = site.rpartition("z.")
        each = at[f"{dot}head_out.{layer}"].unflatten(-1, (heads, -1)).double()
        bias = getattr(module, "bias", None)
        whole = each.sum(1) + (0 if bias is None else bias.detach().double())
        assert zoo.relative_error(whole, outputs[site]) < 1e-6
        assert zoo.relative_error(each.sum(1) - each[:, 0], each.sum(1)) > 1e-2
        pattern = at[f"{dot}pattern.{layer}"].double()
        assert pattern.shape == (heads, len(IDS), len(IDS))
        rows = pattern.sum(-1)
        if family == "gpt_oss":
            assert bool((rows < 0.999).all())
        else:
            torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-5)
        assert bool(pattern.triu(1).any()) == (dot == "encoder." or "bert" in family)
        values = at[f"{dot}v.{layer}"].unflatten(-1, (-1, _size(family, model)))
        values = values.repeat_interleave(heads // values.shape[1], 1).double()
        mixed = torch.einsum("hqk,khd->qhd", pattern, values).flatten(1)
        assert (zoo.relative_error(mixed, at[site]) < 1e-5) == zoo.FAMILIES[family].plain, site


def _size(family: str, model: Any) -> int:
    """The width of one head's value."""
    config = model.config
    size = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


@every_family
@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_chain_and_branches_add_up(family: str, seed: int) -> None:
    model, at = zoo.model_of(family, seed), zoo.reference(family, seed, IDS)
    for prefix, stack in zoo.FAMILIES[family].stacks.items():
        dot = prefix and f"{prefix}."
        blocks = model.get_submodule(stack.blocks)
        assert torch.equal(at[f"{dot}embed"], at[f"{dot}resid_pre.0"])
        for i, block in enumerate(blocks):
            here = {name: at.get(f"{dot}{name}.{i}") for name in zoo_families.BLOCK_SITES}
            pre, attn, cross, mid, mlp, post = (
                here[n] for n in ("resid_pre", "attn_out", "cross_attn_out", "resid_mid", "mlp_out", "resid_post")
            )
            if i:
                assert torch.equal(pre, at[f"{dot}resid_post.{i - 1}"])
            if stack.form == "mixer":
                assert_sum(post, pre, here["mixer_out"])
            elif stack.form == "parallel":
                assert_sum(post, pre, attn, mlp)
            elif stack.form == "pre":
                assert_sum(mid, pre, attn, *([] if cross is None else [cross]))
                assert_sum(post, mid, mlp)
            else:
                norms = [block.get_submodule(path) for path in stack.norms]
                middle = in_double(norms[0], pre.double() + attn.double())
                if cross is not None:
                    middle = in_double(norms[1], middle + cross.double())
                assert close(mid, middle)
                assert close(post, in_double(norms[-1], mid.double() + mlp.double()))


@every_family
def test_a_missing_branch_would_show(family: str) -> None:
    """Each branch is far above rounding, and each block gives something else."""
    at = zoo.reference(family, 0, IDS)
    for site, value in at.items():
        name, _, layer = site.removeprefix("encoder.").removeprefix("decoder.").partition(".")
        if name in ("attn_out", "cross_attn_out", "mixer_out", "mlp_out"):
            stream = at[site.replace(name, "resid_pre")]
            assert float(value.norm() / stream.norm()) > 1e-2, site
            before = site.replace(f"{name}.{layer}", f"{name}.{int(layer) - 1}")
            assert before not in at or zoo.relative_error(value, at[before]) > 1e-2, site


@every_family
def test_the_ends_give_the_logits(family: str) -> None:
    model, made, at = zoo.model_of(family), zoo.FAMILIES[family], zoo.reference(family, 0, IDS)
    with torch.no_grad():
        for prefix, stack in made.stacks.items():
            dot = prefix and f"{prefix}."
            last = at[f"{dot}resid_post.{zoo.stack_depths(family, model)[prefix] - 1}"]
            if stack.final_norm is not None:
                assert torch.equal(at[f"{dot}final_norm"], model.get_submodule(stack.final_norm)(last))
                assert zoo.relative_error(at[f"{dot}final_norm"], last) > 1e-2
                last = at[f"{dot}final_norm"]
        # `last` is now that of the only stack, or of the decoder.
        assert close(made.head(model, last), at["logits"])


@every_family
def test_hidden_states_of_transformers_are_the_same_tensors(family: str) -> None:
    model, at = zoo.model_of(family), zoo.reference(family, 0, IDS)
    states = zoo.hidden_states(family, model, IDS)
    for prefix, sites in zoo.same_hidden_states(family, model).items():
        assert len(states[prefix]) == len(sites)
        for site, state in zip(sites, states[prefix], strict=True):
            assert site is None or torch.equal(at[site], state[0]), site


@every_family
def test_a_prompt_gives_what_it_gave_before(family: str) -> None:
    """Nothing is left behind by a longer prompt."""
    model = zoo.model_of(family)
    first = zoo.reference(family, 0, IDS)
    zoo.alone(family, model, zoo.prompts_of(5, [64])[0])
    again = zoo.alone(family, model, IDS)
    assert all(torch.equal(first[site], again[site]) for site in first)


@pytest.mark.parametrize("family", [f for f, z in zoo.FAMILIES.items() if z.lengths])
def test_the_rope_threshold_is_inside_the_context(family: str) -> None:
    """A token before the threshold has another value when the prompt goes on past it."""
    model = zoo.model_of(family)
    short = zoo.alone(family, model, IDS[:16])
    long = zoo.alone(family, model, IDS)
    assert zoo.relative_error(long["resid_post.3"][:16], short["resid_post.3"]) > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss", "gpt_neo"])
def test_the_sliding_window_is_inside_the_context(family: str) -> None:
    """The first block that slides does not see a token that is further back than the window."""
    model = zoo.model_of(family)
    layer = 1 if family == "gpt_neo" else 0
    seen, other = list(IDS), [IDS[0] + 1 if IDS[0] < 258 else 5, *IDS[1:]]
    a, b = (zoo.alone(family, model, ids) for ids in (seen, other))
    site = f"attn_out.{layer}"
    if layer == 0:
        assert torch.equal(a[site][8:], b[site][8:])
    assert not torch.equal(a[site][:8], b[site][:8])
    deeper = "resid_post.3"
    assert not torch.equal(a[deeper][8:], b[deeper][8:])

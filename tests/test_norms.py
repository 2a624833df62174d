"""What a norm computes, found out by running it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import zoo
from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import describe
from actcache.model.norms import measure_norm, norm_before


class Plain(nn.Module):
    """An RMS norm whose weight is kept as its distance from 1, in the manner of Gemma."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.epsilon_of_mine = eps
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return ((wide / (wide.square().mean(-1, keepdim=True) + self.epsilon_of_mine).sqrt()) * (1 + self.gain)).to(x)


def layer_norm(width: int, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=eps)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("width", [32, 33, 768])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_norms_are_measured(width: int, eps: float, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    like = torch.zeros((), dtype=dtype)
    for module, centred in ((layer_norm(width, eps), True), (Plain(width, eps), False)):
        norm = measure_norm(module.to(dtype), width, like)
        assert norm is not None
        assert norm.centred == centred
        if eps > 1e-8:
            assert math.isclose(norm.eps, eps, rel_tol=1e-6)
        x = torch.randn(4, width) * 2 + 0.3
        made = norm.finish(norm.divide(x, norm.scale(x)))
        assert zoo.relative_error(made, module.float()(x)) < 1e-6 + 2 * torch.finfo(dtype).eps * (
            dtype != torch.float32
        )


def test_what_is_no_norm_is_none() -> None:
    like = torch.zeros(())
    others = (nn.Linear(32, 32), nn.Identity(), nn.GELU(), nn.Softmax(-1), nn.Linear(32, 8), nn.Embedding(9, 32))
    assert [measure_norm(module, 32, like) for module in others] == [None] * len(others)


@pytest.mark.parametrize("family", [*zoo.FAMILIES])
def test_the_norms_of_a_block_give_what_attention_and_mlp_are_given(family: str) -> None:
    """The stream, normalised by what was measured, is a value that some module of the block was given."""
    model = zoo.model_of(family)
    anatomy = describe(model)
    found = zoo.reference(family, 0, (5, 200, 31, 7, 90))
    inputs: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.extend([*args, *kwargs.values()]), with_kwargs=True
        )
        for stack in anatomy.stacks
        for block in anatomy.blocks_of(stack)
        for module in block.modules()
    ]
    with torch.no_grad():
        model(**zoo.inputs_of(family, model, (5, 200, 31, 7, 90)))
    for handle in handles:
        handle.remove()
    given = [
        x.reshape(-1, 32) for x in inputs if isinstance(x, Tensor) and x.numel() % 32 == 0 and x.is_floating_point()
    ]
    norms: set[bool] = set()
    for stack in anatomy.stacks:
        dot = f"{stack}." if stack else ""
        for layer in range(anatomy.depth(stack)):
            for name in ("resid_pre", "resid_mid"):
                stream = found.get(f"{dot}{name}.{layer}")
                if stream is None:
                    continue
                norm = norm_before(anatomy, stack, layer, name)
                norms.add(norm is None)
                made = stream if norm is None else norm.finish(norm.divide(stream, norm.scale(stream)))
                assert any(g.shape == made.shape and zoo.relative_error(made, g) < 1e-5 for g in given), (layer, name)
    unnormed = family == "olmo2" or any(stack.form == "post" for stack in zoo.FAMILIES[family].stacks.values())
    # ModernBERT's first block has nothing before its attention.
    assert norms == ({True, False} if family == "modernbert" else {unnormed})


@torch.no_grad()
def test_the_final_norm_is_behind_the_last_block() -> None:
    model = zoo.model_of("llama")
    norm = norm_before(describe(model), None, 4, "resid_pre")
    x = torch.randn(3, 32)
    assert norm is not None
    assert zoo.relative_error(norm.finish(norm.divide(x, norm.scale(x))), model.model.norm(x)) < 1e-6
    assert norm_before(describe(zoo.model_of("bert")), None, 4, "resid_pre") is None


def test_a_stream_that_no_module_is_given_is_refused() -> None:
    """A function normalises it, say."""
    model = zoo.model_of("gptj")
    with pytest.raises(SiteUnavailableError, match=r"GPTJForCausalLM puts on resid_mid\.1 cannot be made out"):
        norm_before(describe(model), None, 1, "resid_mid")

"""From the stream behind the last block to logits, on every architecture."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import zoo
from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import describe
from actcache.model.head import find_head
from actcache.testing.tiny import FAMILIES, tiny_model

IDS = (5, 200, 31, 7, 90, 11, 254, 3, 17)
NO_HEAD_NORM = ("opt-350m", "bart", "bert", "distilbert", "roberta")


def stream_of(family: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The last block's output and all other values, read by plain hooks."""
    found = zoo.reference(family, 0, IDS)
    prefix = "decoder." if zoo.FAMILIES[family].encoder_decoder else ""
    depth = len(zoo.model_of(family).get_submodule(zoo.FAMILIES[family].stacks[prefix.rstrip(".")].blocks))
    return found[f"{prefix}resid_post.{depth - 1}"], found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_head_gives_the_models_logits(family: str) -> None:
    model = zoo.model_of(family)
    head = find_head(model)
    stream, found = stream_of(family)
    assert zoo.relative_error(head(stream), found["logits"]) < 1e-6
    assert zoo.relative_error(head(stream[None, 2:4]), found["logits"][None, 2:4]) < 1e-5
    assert (head.norm is None) == (family in NO_HEAD_NORM)
    prefix = "decoder." if zoo.FAMILIES[family].encoder_decoder else ""
    normed = found.get(f"{prefix}final_norm", stream)
    by_hand = zoo.FAMILIES[family].head(model, normed)
    assert zoo.relative_error(head.unembed(normed), by_hand) < 1e-6
    assert zoo.relative_error(torch.cat(list(head.in_parts(stream, 4 * 259 * 2))), found["logits"]) < 1e-5


@torch.no_grad()
def test_parts_stay_within_the_bytes_they_may_take() -> None:
    head = find_head(zoo.model_of("gpt2"))
    rows = torch.randn(11, 32)
    assert [len(part) for part in head.in_parts(rows, 4 * 259 * 4)] == [4, 4, 3]
    assert [len(part) for part in head.in_parts(rows[:2], 1)] == [1, 1]


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "t5", "mamba", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_same_head_is_found(family: str, dtype: torch.dtype) -> None:
    full = find_head(zoo.model_of(family))
    half = find_head(tiny_model(family).to(dtype))
    assert [step.path for step in half.way.steps] == [step.path for step in full.way.steps]
    assert [step.factor for step in half.way.steps] == [step.factor for step in full.way.steps]
    assert half.way.end == full.way.end
    assert half.norm is not None
    assert full.norm is not None
    assert half.norm.centred == full.norm.centred
    assert abs(half.norm.eps - full.norm.eps) < 1e-3 * full.norm.eps


@torch.no_grad()
def test_a_cap_is_found_on_logits_too_small_to_show_it() -> None:
    model = tiny_model("gemma2")
    with torch.no_grad():
        model.lm_head.weight *= 1e-4
    head = find_head(model)
    with torch.no_grad():
        model.model.norm.weight += 1e6
    stream = torch.randn(5, 32)
    expected = zoo.FAMILIES["gemma2"].head(model, model.model.norm(stream))
    assert expected.abs().max() > 25
    assert zoo.relative_error(head(stream), expected) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_direction_of_a_token_is_what_its_logit_grows_along(family: str) -> None:
    head = find_head(zoo.model_of(family))
    one, other = stream_of(family)[0][2].double(), torch.randn(32, dtype=torch.float64)
    ids = torch.tensor([[7, 258], [0, 31]])
    if family in ("modernbert", "bert", "distilbert", "roberta"):
        with pytest.raises(SiteUnavailableError, match=r"what follows it \(.*\) is not linear"):
            head.directions(ids)
        return
    if head.norm is not None:
        eps = head.norm.eps
        if head.norm.centred:
            one, other = one - one.mean(), other - other.mean()
        one, other = (x / (x.square().mean() + eps).sqrt() for x in (one, other))
        back = [head.norm.finish(x.float()) for x in (one, other)]
    else:
        back = [one.float(), other.float()]
    logits = head.unembed(torch.stack(back)).double()
    if family == "gemma2":
        cap = zoo.model_of(family).config.final_logit_softcapping
        logits = cap * torch.atanh(logits / cap)
    change = (logits[0] - logits[1])[ids]
    assert torch.allclose(head.directions(ids).double() @ (one - other), change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere", "t5", "opt-350m"])
def test_directions_are_found_where_weights_cannot_be_read(family: str, tmp_path: Path) -> None:
    from accelerate import disk_offload

    ids = torch.tensor([[7, 258, 7], [0, 31, 5]])
    stream = torch.randn(3, 32)
    expected = find_head(zoo.model_of(family))
    offloaded = tiny_model(family)
    disk_offload(offloaded, str(tmp_path), execution_device=torch.device("cpu"))
    head = find_head(offloaded)
    assert zoo.relative_error(head.directions(ids), expected.directions(ids)) < 1e-6
    with torch.no_grad():
        assert zoo.relative_error(head(stream), expected(stream)) < 1e-6


def test_an_adapter_of_the_head_is_part_of_its_directions() -> None:
    from peft import LoraConfig, get_peft_model

    ids = torch.tensor([7, 258])
    adapted = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    ).eval()
    merged = tiny_model("llama")
    with torch.no_grad():
        merged.lm_head.weight += adapted.base_model.model.lm_head.get_delta_weight("default")
    assert zoo.relative_error(find_head(adapted).directions(ids), find_head(merged).directions(ids)) < 1e-5


@torch.no_grad()
def test_what_the_head_is_follows_the_model() -> None:
    model = tiny_model("gpt2")
    first = find_head(model)
    assert find_head(model) is first
    stream = torch.randn(3, 32)
    with torch.no_grad():
        model.lm_head.weight *= 2.0
    assert torch.equal(first(stream), model.lm_head(model.transformer.ln_f(stream)))
    model.lm_head = nn.Linear(32, 259, bias=True)
    assert find_head(model) is not first
    assert zoo.relative_error(find_head(model)(stream), model.lm_head(model.transformer.ln_f(stream))) < 1e-6


def test_the_head_leaves_the_model_alone_and_keeps_its_graph() -> None:
    model = tiny_model("llama").train()
    seen: list[Any] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    head = find_head(model)
    stream = torch.randn(3, 32, requires_grad=True)
    head(stream).sum().backward()
    assert stream.grad is not None
    assert model.lm_head.weight.grad is not None
    assert not seen
    assert model.training
    assert model.lm_head.training


class Curious(GPT2LMHeadModel):
    """Does to its logits what no number can describe."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sin()
        return output


class Placed(nn.Linear):
    """Gives each position another result."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.arange(x.shape[-2])[:, None]


def test_a_head_that_cannot_be_shown_is_refused_by_name() -> None:
    with pytest.raises(SiteUnavailableError, match="last block of Curious and its logits cannot be made out"):
        find_head(Curious(tiny_model("gpt2").config).eval())
    model = tiny_model("gpt2")
    model.lm_head = Placed(32, 259)
    with pytest.raises(SiteUnavailableError, match="last block of GPT2LMHeadModel and its logits"):
        find_head(model)
    with pytest.raises(SiteUnavailableError, match="GPT2Model gives no logits: it has no language-model head"):
        find_head(tiny_model("gpt2").transformer)


@torch.no_grad()
def test_the_passes_of_other_threads_are_neither_read_nor_changed_while_a_head_is_looked_for() -> None:
    model = tiny_model("gpt2")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
    others: list[Tensor] = []

    class Meanwhile(nn.Linear):
        """Has another thread use the model whenever it runs."""

        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()
            return super().forward(x)

    @torch.no_grad()
    def run() -> None:
        others.append(model(ids).logits)

    head = Meanwhile(32, 259, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    found = find_head(model)
    assert len(others) >= 2
    assert all(torch.equal(logits, expected) for logits in others)
    assert zoo.relative_error(found(torch.ones(1, 32)), model.lm_head(model.transformer.ln_f(torch.ones(1, 32)))) < 1e-6


def test_a_head_dies_with_its_model() -> None:
    model = tiny_model("gpt2")
    head = find_head(model)
    anatomy = describe(model)
    del model
    with pytest.raises(ReferenceError):
        head(torch.zeros(1, 32))
    with pytest.raises(ReferenceError):
        anatomy.model  # noqa: B018

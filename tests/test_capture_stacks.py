"""Capture where sequences do not go through one stack of attention blocks: encoder-decoders, recurrent models."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import actcache as ac
from actcache.errors import LayerRangeError, SiteUnavailableError
from actcache.testing.tiny import PAD, tiny_model
from reference import relative_error

PROMPTS = [[5, 9, 100, 40], [8, 8], [90, 91, 92, 93, 94, 95]]
TARGETS = [[60, 61, 62], [70], [80, 81]]
SITES = ["encoder.resid_post.1", "encoder.resid_post.3", "decoder.resid_post.1", "decoder.resid_post.2", "logits"]


@pytest.fixture(scope="module", params=["t5", "bart"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def blocks(model: Any, stack: str) -> nn.ModuleList:
    core = getattr(model, "model", model)
    part = getattr(core, stack)
    return part.block if hasattr(part, "block") else part.layers


@torch.no_grad()
def alone(model: Any, prompt: list[int], target: list[int]) -> dict[str, Tensor]:
    """`[T, D]` of every block by plain hooks, for one prompt and one decoder input."""
    found: dict[str, Tensor] = {}
    handles = []
    for stack in ("encoder", "decoder"):
        for layer, block in enumerate(blocks(model, stack)):

            def note(_: nn.Module, args: Any, output: Any, key: str = f"{stack}.resid_post.{layer}") -> None:
                found[key] = (output[0] if isinstance(output, tuple) else output)[0].clone()

            handles.append(block.register_forward_hook(note))
    out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([target]))
    for handle in handles:
        handle.remove()
    return {**found, "logits": out.logits[0]}


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([r + [PAD] * (width - len(r)) for r in rows])
    return ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])


def given(prompts: list[list[int]], targets: list[list[int]]) -> dict[str, Tensor]:
    ids, mask = padded(prompts)
    decoder_ids, decoder_mask = padded(targets)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


@torch.no_grad()
def test_each_stack_has_tokens_of_its_own(model: Any) -> None:
    with ac.capture(model, sites=SITES) as cache, ac.capture(model, sites="decoder.resid_post") as decoder:
        model(**given(PROMPTS, TARGETS))
        model(**given(PROMPTS[:1], TARGETS[2:]))
    assert cache["encoder.resid_post.3"].shape == (4, 6, 32)
    assert cache["decoder.resid_post.2"].shape == (4, 3, 32)
    pairs = [*zip(PROMPTS, TARGETS, strict=True), (PROMPTS[0], TARGETS[2])]
    for read in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for row, (prompt, target) in enumerate(pairs):
            reference = alone(model, prompt, target)
            for site in SITES:
                assert relative_error(read.rows(site)[row], reference[site]) < 1e-5, (row, site)
            at_end = read.get_position(2, -1, site="decoder.resid_post")[row]
            assert relative_error(at_end, reference["decoder.resid_post.2"][-1]) < 1e-5
    assert cache.attention_mask.sum(1).tolist() == [4, 2, 6, 4]
    assert decoder.attention_mask.sum(1).tolist() == [3, 1, 2, 2]
    assert decoder.input_ids[0].tolist() == TARGETS[0]
    assert cache.select(prompts=[2]).rows("decoder.resid_post.1")[0].shape == (2, 32)


@torch.no_grad()
def test_positions_are_those_of_the_stack(model: Any) -> None:
    path = next(info.path for info in ac.sites(model) if str(info.site) == "decoder.resid_post.2")
    with ac.capture(model, [path], sites=SITES, positions="last", include_inputs=True) as cache:
        model(**given(PROMPTS, TARGETS))
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        reference = alone(model, prompt, target)
        for site in SITES:
            assert cache[site].shape[:2] == (3, 1)
            assert relative_error(cache[site][row], reference[site][-1:]) < 1e-5, (row, site)
        assert torch.equal(cache[path].hidden[row], cache["decoder.resid_post.2"][row])
    with pytest.raises(LayerRangeError, match="1 tokens"), ac.capture(model, sites=SITES, positions=1):
        model(**given(PROMPTS, TARGETS))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation(model: Any, use_cache: bool, options: dict[str, int]) -> None:
    ids, mask = padded(PROMPTS)
    returned = options.get("num_return_sequences", 1)
    with ac.capture(model, sites=SITES[:-1]) as cache, ac.capture(model, sites="decoder.resid_post.2") as decoder:
        rows = []
        for _ in range(2):
            rows += model.generate(
                ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, use_cache=use_cache, **options
            )
    assert cache["encoder.resid_post.3"].shape == (6, 6, 32)
    assert cache["decoder.resid_post.2"].shape == (6 * returned, len(rows[0]) - 1, 32)
    assert decoder.input_ids.tolist() == [row[:-1].tolist() for row in rows]
    for row, sequence in enumerate(rows):
        number = row // returned
        reference = alone(model, PROMPTS[number % 3], sequence[:-1].tolist())
        for site in SITES[2:4]:
            assert relative_error(cache.rows(site)[row], reference[site]) < 1e-5
        for site in SITES[:2]:
            assert relative_error(cache.rows(site)[number], reference[site]) < 1e-5


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_of_recurrent_models(family: str, use_cache: bool, options: dict[str, int]) -> None:
    model = tiny_model(family)
    ids = torch.tensor([[5, 9, 100, 7, 21], [8, 8, 4, 200, 31]])
    with ac.capture(model, sites="resid_post") as cache:
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, use_cache=use_cache,
            do_sample=False, pad_token_id=PAD, **options,
        )  # fmt: skip
    if use_cache and options and transformers.__version__.startswith("4."):
        # It leaves the recurrent state behind when it exchanges beams.
        with pytest.raises(SiteUnavailableError, match=r"without its recurrent state.*use_cache=False"):
            cache["resid_post.3"]
        return
    assert cache["resid_post.3"].shape[:2] == (len(made), 9)
    assert torch.equal(cache.input_ids, made[:, :-1])
    for row, sequence in enumerate(made):
        found: list[Tensor] = []
        handle = model.backbone.layers[3].register_forward_hook(lambda _, args, out: found.append(out.clone()))  # noqa: B023
        with torch.no_grad():
            model(sequence[None, :-1])
        handle.remove()
        assert relative_error(cache.rows("resid_post.3")[row], found[0][0]) < 1e-5


def test_drafts_by_the_model_itself_are_held_against_what_the_outer_call_returned():
    """In transformers 5 an encoder-decoder that drafts for itself runs its drafts at other positions than those of
    their tokens: parts of them must not be taken for the sequence's."""
    model = tiny_model("t5")
    ids = torch.tensor([[5, 9, 100, 7, 3]])
    with ac.capture(model, sites="decoder.resid_post.1") as cache:
        made = model.generate(input_ids=ids, max_new_tokens=8, assistant_model=model)
    with torch.no_grad():
        output = model(input_ids=ids, decoder_input_ids=made[:, :-1], output_hidden_states=True)
    right = output.decoder_hidden_states[2]
    with contextlib.suppress(SiteUnavailableError):
        torch.testing.assert_close(cache["decoder.resid_post.1"], right, rtol=0, atol=1e-4)


def test_drafts_that_are_right_are_kept():
    model = tiny_model("llama")
    ids = torch.tensor([[5, 9, 100, 7, 3]])
    with ac.capture(model, sites="resid_post.1") as cache:
        made = model.generate(input_ids=ids, max_new_tokens=8, assistant_model=model)
    with torch.no_grad():
        states = model(input_ids=made[:, :-1], output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(cache["resid_post.1"], states, rtol=0, atol=1e-4)


def test_positions_are_those_of_the_stacks_that_are_asked_for() -> None:
    """The decoder has one token, and nobody asked for any of its."""
    model = tiny_model("t5")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "decoder_input_ids": torch.tensor([[0]])}
    whole = ac.run_with_cache(model, inputs, sites=["encoder.resid_post.1", "logits"])[1]
    cache = ac.run_with_cache(model, inputs, sites="encoder.resid_post.1", positions=(1, 4))[1]
    assert torch.equal(cache["encoder.resid_post.1"], whole["encoder.resid_post.1"][:, 1:4])
    assert torch.equal(ac.run_with_cache(model, inputs, sites="logits", positions=0)[1]["logits"], whole["logits"])
    for sites in ("logits", ["encoder.resid_post.1", "decoder.resid_post.1"]):
        with pytest.raises(LayerRangeError, match="the prompt has 1 tokens"):
            ac.run_with_cache(model, inputs, sites=sites, positions=(1, 4))

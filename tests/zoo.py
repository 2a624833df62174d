"""What every architecture computes, read by plain torch hooks where `zoo_families` says.

Nothing here uses the package's own anatomy or capture. `alone(family, model, ids)` gives every value of one prompt
that is run by itself; `FAMILIES` says for each family where it is read, what the architecture does not have, and
which of transformers' hidden states are the same tensor.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo_inside
from actcache.testing.tiny import BOS, EOS, PAD, ROPE_THRESHOLD, VOCABULARY, WINDOW, tiny_model, tiny_tokenizer
from zoo_families import BLOCK_SITES, FAMILIES
from zoo_inside import SITES as INNER_SITES
from zoo_inside import Hook, into, out


@functools.cache
def model_of(family: str, seed: int = 0) -> Any:
    """The tiny model of a family, made once per test session: nothing may change it."""
    return tiny_model(family, seed=seed)


def saved(family: str, folder: Path) -> Path:
    """The tiny model of a family and its tokenizer in `folder`, as save_pretrained leaves them."""
    model_of(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompts_of(seed: int = 0, lengths: Sequence[int] | None = None) -> list[list[int]]:
    """Prompts on both sides of every threshold up to the context, one of them made of the special ids."""
    rng = random.Random(seed)
    if lengths is None:
        lengths = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 13, ROPE_THRESHOLD, ROPE_THRESHOLD + 1, 29, 64, 2, 13]
    made = [[rng.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths]
    return [*made, [EOS, 7, PAD, PAD, 9, BOS, EOS, 11, EOS, 200, PAD]]


def hooks_in(family: str, prefix: str, block: nn.Module) -> dict[str, Hook]:
    """What is read in one block, beside its input and output: blocks of one model may differ."""
    hooks = FAMILIES[family].stacks[prefix].hooks | zoo_inside.inside_of(family, prefix)
    return {name: hook for name, hook in hooks.items() if find(block, hook.path) is not None}


def stack_depths(family: str, model: nn.Module) -> dict[str, int]:
    return {prefix: len(model.get_submodule(stack.blocks)) for prefix, stack in FAMILIES[family].stacks.items()}


def expected_sites(family: str, model: nn.Module) -> list[str]:
    """Every site this family has, complete."""
    zoo = FAMILIES[family]
    found = []
    for prefix, stack in zoo.stacks.items():
        dot = prefix and f"{prefix}."
        missing = {name.removeprefix(dot) for name in zoo.absent if name.startswith(dot)}
        found.append(f"{dot}embed")
        for i, block in enumerate(model.get_submodule(stack.blocks)):
            inside = hooks_in(family, prefix, block)
            there = [name for name in BLOCK_SITES if name not in missing]
            found += [f"{dot}{name}.{i}" for name in (*there, *(name for name in INNER_SITES if name in inside))]
        found += [f"{dot}final_norm"] * ("final_norm" not in missing)
    return [*found, "logits"]


def absent_sites(family: str, model: nn.Module) -> list[str]:
    """Sites that are in the vocabulary and that this family, or one block of it, does not have; complete."""
    found = [site if site.endswith("final_norm") else f"{site}.0" for site in FAMILIES[family].absent]
    for prefix, stack in FAMILIES[family].stacks.items():
        for i, block in enumerate(model.get_submodule(stack.blocks)):
            inside = hooks_in(family, prefix, block)
            missing = [name for name in INNER_SITES if name not in inside]
            found += [f"{prefix and f'{prefix}.'}{name}.{i}" for name in missing]
    return found


def site_names(family: str, model: nn.Module) -> dict[str, list[str]]:
    """Site names without a layer -> the complete ones, by layer."""
    found: dict[str, list[str]] = {}
    for site in expected_sites(family, model):
        name, _, layer = site.rpartition(".")
        found.setdefault(name if layer.isdigit() else site, []).append(site)
    return found


def name_of(site: str) -> str:
    """A site's name without its stack and layer."""
    return site.removeprefix("encoder.").removeprefix("decoder.").partition(".")[0]


def shifted_right(model: Any, ids: Sequence[int]) -> list[int]:
    return [model.config.decoder_start_token_id, *ids[:-1]]


def inputs_of(family: str, model: Any, ids: Sequence[int]) -> dict[str, Tensor]:
    """What one prompt is to this model."""
    inputs = {"input_ids": torch.tensor([list(ids)])}
    if FAMILIES[family].encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([shifted_right(model, ids)])
    return inputs


def present(block: nn.Module, paths: str | tuple[str, ...]) -> nn.Module:
    """The module under the first of these names."""
    found = find(block, paths)
    assert found is not None, f"{type(block).__name__} has none of {paths}"
    return found


def find(block: nn.Module, paths: str | tuple[str, ...]) -> nn.Module | None:
    for path in (paths,) if isinstance(paths, str) else paths:
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    return None


def bare(value: Any) -> Tensor:
    """The tensor, or the first of a tuple."""
    return value[0] if isinstance(value, tuple) else value


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def hooks_of(family: str, model: Any) -> Iterator[tuple[str, nn.Module, Hook]]:
    """Site, module and what to read there."""
    for prefix, stack in FAMILIES[family].stacks.items():
        dot = prefix and f"{prefix}."
        blocks = model.get_submodule(stack.blocks)
        yield f"{dot}embed", blocks[0], into()
        for i, block in enumerate(blocks):
            yield f"{dot}resid_pre.{i}", block, into()
            for name, hook in hooks_in(family, prefix, block).items():
                yield f"{dot}{name}.{i}", present(block, hook.path), hook
            yield f"{dot}resid_post.{i}", block, out()
        if stack.final_norm is not None:
            yield f"{dot}final_norm", model.get_submodule(stack.final_norm), out()


@contextmanager
def listening(family: str, model: Any, batch: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Fills a dictionary with what the next pass computes, site by site, as `[B, S, D]`; every value is a copy."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(site: str, module: nn.Module, hook: Hook, value: Tensor) -> None:
        assert site not in found, f"{site} was computed twice"
        # OPT runs its MLP on rows that are flattened over the batch.
        value = value.reshape(batch, length, -1)
        value = value if hook.part is None else hook.part(value, module, model)
        # Falcon adds attention's output into the MLP's in place: later it is another value.
        found[site] = value.clone() if hook.times is None else value * getattr(model.config, hook.times)

    for site, module, hook in hooks_of(family, model):
        if hook.side == "output":

            def on_output(module: Any, _a: Any, value: Any, site: str = site, hook: Hook = hook) -> None:
                keep(site, module, hook, bare(value))

            handles.append(module.register_forward_hook(on_output))
        else:

            def on_input(module: Any, args: Any, kwargs: Any, site: str = site, hook: Hook = hook) -> None:
                keep(site, module, hook, given(args, kwargs))

            handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def unused(family: str, model: Any) -> Any:
    """`model` as it was before its first pass: dynamic RoPE remembers the longest one."""
    if not FAMILIES[family].lengths:
        return model
    rotary = model.model.rotary_emb
    fresh = copy.deepcopy(model)
    fresh.model.rotary_emb = type(rotary)(config=model.config)
    return fresh


@torch.no_grad()
def alone(family: str, model: Any, ids: Sequence[int]) -> dict[str, Tensor]:
    """Site -> `[T, D]` (logits: `[T, V]`; heads side by side), for one prompt that is run by itself."""
    model = unused(family, model)
    with listening(family, model, 1, len(ids)) as found:
        found["logits"] = model(**inputs_of(family, model, ids)).logits.clone()
    return {site: value[0] for site, value in found.items()}


@functools.cache
def reference(family: str, seed: int, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """`alone`, once per prompt of a session."""
    return alone(family, model_of(family, seed), ids)


@functools.cache
def eager_model_of(family: str, seed: int = 0) -> Any:
    """The same model with attention in plain operations, which gives its probabilities."""
    model = model_of(family, seed)
    eager = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    return eager.eval()


@torch.no_grad()
def eager(family: str, model: Any, ids: Sequence[int]) -> dict[str, Tensor]:
    """`alone` for a model of `eager_model_of`, with the patterns of self-attention as transformers returns them:
    ``"pattern.0"`` is `[H, T, T]`. What it rounds otherwise than other attention does is in all of its values."""
    model = unused(family, model)
    with listening(family, model, 1, len(ids)) as found:
        output = model(**inputs_of(family, model, ids), output_attentions=True)
        found["logits"] = output.logits.clone()
    values = {site: value[0] for site, value in found.items()}
    for prefix, stack in FAMILIES[family].stacks.items():
        dot = prefix and f"{prefix}."
        told = getattr(output, f"{prefix}_attentions" if prefix else "attentions", None) or ()
        told = [each for each in told if each is not None]
        with_heads = [i for i in range(len(model.get_submodule(stack.blocks))) if f"{dot}z.{i}" in values]
        values |= {f"{dot}pattern.{i}": each[0] for i, each in zip(with_heads, told, strict=True)}
    return values


def same_hidden_states(family: str, model: nn.Module) -> dict[str, list[str | None]]:
    """For each stack, the site that each entry of transformers' `hidden_states` is; None where it is no site."""
    zoo = FAMILIES[family]
    found = {}
    for prefix, depth in stack_depths(family, model).items():
        dot = prefix and f"{prefix}."
        stream: list[str | None] = [f"{dot}resid_pre.{i}" for i in range(depth)]
        ends = {"stream": f"{dot}final_norm", "stream, no end": None, "post": f"{dot}resid_post.{depth - 1}"}
        if zoo.hidden == "outputs":
            found[prefix] = [*[f"{dot}resid_post.{i}" for i in range(depth)], f"{dot}final_norm"]
        else:
            found[prefix] = [*stream, ends[zoo.hidden]]
    return found


@torch.no_grad()
def hidden_states(family: str, model: Any, ids: Sequence[int]) -> dict[str, tuple[Tensor, ...]]:
    """transformers' own hidden states of one prompt, by stack."""
    output = unused(family, model)(**inputs_of(family, model, ids), output_hidden_states=True)
    if FAMILIES[family].encoder_decoder:
        return {"encoder": output.encoder_hidden_states, "decoder": output.decoder_hidden_states}
    return {"": output.hidden_states}


def chosen_experts(value: Any, k: int) -> Tensor:
    """`[N, k]`, sorted: the experts of each row, from what a router returned."""
    if isinstance(value, tuple):
        return value[-1].sort(dim=-1).values
    return value.topk(k, dim=-1).indices.sort(dim=-1).values


@contextmanager
def routing(family: str, model: Any, batch: int) -> Iterator[dict[int, Tensor]]:
    """Fills a dictionary with the experts that the next pass chooses, by layer, as `[B, S, k]`."""
    zoo, found = FAMILIES[family], {}
    assert zoo.experts is not None
    k = model.config.num_experts_per_tok
    handles = []
    for i, block in enumerate(model.get_submodule(zoo.stacks[""].blocks)):

        def on_output(_m: Any, _a: Any, value: Any, i: int = i) -> None:
            found[i] = chosen_experts(value, k).reshape(batch, -1, k)

        handles.append(present(block, zoo.experts.path).register_forward_hook(on_output))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |difference| over max |reference|."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))

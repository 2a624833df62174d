"""From what a person passes (text, token ids, tensors) to the arguments of one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import PromptError, PromptTypeError, TokenizerError
from actcache.model.config_values import context_length, first_int, text_values
from actcache.model.decoder_inputs import require_decoder_start
from actcache.model.forward_inputs import ForwardInputs, accepts
from actcache.model.invariance import BatchPolicy, batch_policy
from actcache.model.offload import input_device
from actcache.model.rope import forget_lengths
from actcache.model.structure import unwrapped

Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]


@dataclass
class Prepared:
    """Arguments of one forward pass, and the strings of its tokens where a tokenizer is at hand."""

    kwargs: dict[str, Any]
    tokens: list[list[str]] | None


def prepare(model: nn.Module, inputs: Inputs, tokenizer: Any) -> Prepared:
    """Arguments for ``model(**kwargs)``: right padding, mask from lengths, position ids where the model takes them, and
    the prompt shifted right for the decoder of an encoder-decoder model.

    A mapping is passed on as it is, moved to the model's device, with position ids that follow its mask when it has
    none of its own. Raises `PromptError` (also for prompts that would change each other's values in one pass),
    `PromptTypeError`, `TokenizerError` or `OptionError`.
    """
    device = input_device(model)
    config = _config(model)
    policy = batch_policy(config, model=model)
    if isinstance(inputs, Mapping):
        kwargs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        mask = kwargs.get("attention_mask")
        fresh = "position_ids" not in kwargs and kwargs.get("past_key_values") is None
        counts = policy.position_ids and accepts(model, "position_ids")
        if fresh and counts and isinstance(mask, Tensor) and mask.ndim == 2:
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        ids = kwargs.get("input_ids")
        rows = None
        if isinstance(ids, Tensor) and ids.ndim == 2:
            real = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
            rows = [row[here.bool()].tolist() for row, here in zip(ids, real, strict=True)]
        return Prepared(kwargs, _strings(rows, tokenizer))
    prompts, tokenizer = _token_ids(model, inputs, tokenizer)
    _check(config, prompts)
    _check_together(policy, prompts)
    if policy.forget_lengths:
        forget_lengths(model)
    start = partial(require_decoder_start, config)
    kwargs = ForwardInputs(model, policy, decoder_start=start, always_mask=True).make(prompts, device)
    return Prepared(kwargs, _strings(prompts, tokenizer))


def find_tokenizer(model: nn.Module) -> Any:
    """The tokenizer saved beside this model, by the name it was loaded from; raises `TokenizerError`."""
    name = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise TokenizerError(
            f"this {type(model).__name__} was not loaded by name, so its tokenizer is unknown: pass tokenizer="
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(f"no tokenizer was found at {name!r}: pass tokenizer= ({type(error).__name__})") from error


def _token_ids(model: nn.Module, inputs: Any, tokenizer: Any) -> tuple[list[list[int]], Any]:
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Tensor):
        if inputs.is_floating_point() or inputs.ndim not in (1, 2):
            raise PromptTypeError(
                f"token ids must be an integer tensor [S] or [B, S], not {inputs.dtype} {list(inputs.shape)}"
            )
        return (inputs[None] if inputs.ndim == 1 else inputs).tolist(), tokenizer
    try:
        items = list(inputs)
    except TypeError:
        items = []
    if not items:
        raise PromptError("there is no prompt: pass a text, a list of texts, token ids, or a dict of tensors")
    if all(isinstance(item, str) for item in items):
        for i, text in enumerate(items):
            if not text:
                raise PromptError(f"prompt {i} is empty: every prompt needs at least one token")
        tokenizer = find_tokenizer(model) if tokenizer is None else tokenizer
        return [list(ids) for ids in tokenizer(items, padding=False, truncation=False)["input_ids"]], tokenizer
    if all(_is_id(item) for item in items):
        return [[int(item) for item in items]], tokenizer
    rows = []
    for i, item in enumerate(items):
        ids = None if isinstance(item, (str, bytes)) or not hasattr(item, "__iter__") else list(item)
        if ids is None or not all(_is_id(token) for token in ids):
            raise PromptTypeError(f"prompt {i} is {item!r}: expected texts only, or lists of token ids only")
        rows.append([int(token) for token in ids])
    return rows, tokenizer


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and getattr(value, "shape", ()) == ()


def _config(model: nn.Module) -> Mapping[str, Any]:
    to_dict = getattr(getattr(unwrapped(model), "config", None), "to_dict", None)
    config: Mapping[str, Any] = to_dict() if callable(to_dict) else {}
    return config


def _check_together(policy: BatchPolicy, prompts: list[list[int]]) -> None:
    """Refuse prompts that one pass would not give what they are alone."""
    alone, unequal = policy.lengths == "alone", len(set(map(len, prompts))) > 1
    if policy.coupled and len(prompts) > 1 and (alone or unequal):
        what = "one prompt at a time" if alone else "prompts of one length at a time"
        raise PromptError(
            f"{len(prompts)} prompts in one pass of this model would change each other's values. {policy.why} "
            f"Pass {what}, or use UnifiedCache, which batches them so."
        )


def _check(config: Mapping[str, Any], prompts: list[list[int]]) -> None:
    values = text_values(config)
    limit, size = context_length(values), first_int(values, "vocab_size")
    for i, ids in enumerate(prompts):
        if not ids:
            raise PromptError(f"prompt {i} has no tokens: every prompt needs at least one")
        if limit is not None and len(ids) > limit:
            raise PromptError(f"prompt {i} has {len(ids)} tokens, the model's context is {limit}: shorten it")
        if size is not None and not 0 <= min(ids) <= max(ids) < size:
            bad = next(t for t in ids if not 0 <= t < size)
            raise PromptError(f"prompt {i} holds token id {bad}, the model's vocabulary is 0 to {size - 1}")


def _strings(prompts: list[list[int]] | None, tokenizer: Any) -> list[list[str]] | None:
    if prompts is None or tokenizer is None:
        return None
    return [[str(token) for token in tokenizer.convert_ids_to_tokens(ids)] for ids in prompts]

"""A short pass of a model by itself, on a few token ids: what the identity check looks at."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actcache.model.modes import evaluating
from actcache.model.offload import input_device
from actcache.model.rope import restore_attention

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy

# Lengths differ, so that neither stack of an encoder-decoder can be taken for the other.
PROMPTS, TOKENS, DECODER_TOKENS = 2, 4, 3
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def probe_inputs(anatomy: Anatomy) -> dict[str, Any]:
    """Arguments of a pass of the backbone over a few token ids."""
    parameters = inspect.signature(anatomy.backbone.forward).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    tokens = min(TOKENS, anatomy.context_length or TOKENS)
    device = input_device(anatomy.model)
    ids = _spread(tokens, anatomy.vocab_size).to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    inputs = {name: value for name, value in inputs.items() if name in parameters or any_name}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = _spread(min(DECODER_TOKENS, tokens), anatomy.vocab_size).to(device)
    return inputs


def _spread(tokens: int, vocabulary: int) -> Tensor:
    """Ids spread over the vocabulary, without touching the random state; the last ids are often special."""
    ids = (torch.arange(PROMPTS * tokens) * 7919 + 3) % max(1, vocabulary - 1)
    return ids.view(PROMPTS, tokens)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model by itself: evaluation mode, no hooks but ours; modes, hooks and random state come back after."""
    modules = list(model.modules())
    hooks = [(m, name, m.__dict__[name]) for m in modules for name in _HOOKS if m.__dict__.get(name)]
    shadows = [(m, m.__dict__.pop("_call_impl")) for m in modules if "_call_impl" in m.__dict__]
    cuda = {p.device.index for m in modules for p in m._parameters.values() if p is not None and p.is_cuda}
    with evaluating(model), torch.random.fork_rng(devices=sorted(cuda)):
        try:
            for module, name, _ in hooks:
                module.__dict__[name] = OrderedDict()
            yield
        finally:
            restore_attention(model)
            for module, name, saved in hooks:
                module.__dict__[name] = saved
            for module, shadow in shadows:
                module.__dict__["_call_impl"] = shadow

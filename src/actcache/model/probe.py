"""A short pass of a model by itself, on a few token ids: what the identity check looks at."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actcache.model.eager import eager
from actcache.model.modes import evaluating
from actcache.model.offload import input_device
from actcache.model.rope import restore_attention
from actcache.model.taps import Tap
from actcache.model.threads import unseen

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy

# Lengths differ, so that neither stack of an encoder-decoder can be taken for the other.
PROMPTS, TOKENS, DECODER_TOKENS = 2, 4, 3
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def probe_inputs(anatomy: Anatomy, *, repeated: tuple[int, int] | None = None) -> dict[str, Any]:
    """Arguments of a pass of the backbone over a few token ids; `repeated`: over one prompt, given so many times, and
    of so many tokens in either stack."""
    parameters = inspect.signature(anatomy.backbone.forward).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wanted = TOKENS if repeated is None else repeated[1]
    tokens = min(wanted, anatomy.context_length or wanted)
    device = input_device(anatomy.model)
    if repeated is None:
        ids = _spread(PROMPTS, tokens, anatomy.vocab_size).to(device)
        decoder_ids = _spread(PROMPTS, min(DECODER_TOKENS, tokens), anatomy.vocab_size).to(device)
    else:
        ids = decoder_ids = _spread(1, tokens, anatomy.vocab_size).repeat(repeated[0], 1).to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    inputs = {name: value for name, value in inputs.items() if name in parameters or any_name}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = decoder_ids
    return inputs


def _spread(prompts: int, tokens: int, vocabulary: int) -> Tensor:
    """Ids spread over the vocabulary, without touching the random state; the last ids are often special."""
    ids = (torch.arange(prompts * tokens) * 7919 + 3) % max(1, vocabulary - 1)
    return ids.view(prompts, tokens)


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook` for the passes of this thread: in those of another it does nothing."""
    mine = threading.get_ident()

    def of_the_probe(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == mine else None

    return of_the_probe


def is_of_the_probe(hook: Any) -> bool:
    """Whether `hook` is what `of_this_thread` made, perhaps in another thread."""
    return getattr(hook, "__code__", None) is _CODE


_CODE = of_this_thread(id).__code__


def _not_of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    mine = threading.get_ident()

    def guarded(*args: Any) -> Any:
        return None if threading.get_ident() == mine else hook(*args)

    return guarded


_alone = threading.RLock()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model by itself in this thread: evaluation mode, uncompiled, no hooks but those added inside; modes,
    hooks and random state come back after. One thread at a time; what other threads run meanwhile meets its hooks as
    ever."""
    with _alone, unseen(), eager.held(), _undisturbed(model):
        yield


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    # In place, one by one: another thread may be going through them.
    hooks = [
        (held, number, hook, _not_of_this_thread(hook))
        for module in modules
        for name in _HOOKS
        if (held := module.__dict__.get(name))
        for number, hook in list(held.items())
    ]
    # Whatever else stands in for a module's call.
    shadows = [
        (m, shadow) for m in modules if (shadow := m.__dict__.get("_call_impl")) is not None and type(shadow) is not Tap
    ]
    cuda = {p.device.index for m in modules for p in m._parameters.values() if p is not None and p.is_cuda}
    with evaluating(model), torch.random.fork_rng(devices=sorted(cuda)):
        try:
            for held, number, _, guarded in hooks:
                held[number] = guarded
            for module, _ in shadows:
                del module.__dict__["_call_impl"]
            yield
        finally:
            restore_attention(model)
            for held, number, hook, guarded in hooks:
                # Unless it was taken away meanwhile.
                if held.get(number) is guarded:
                    held[number] = hook
            for module, shadow in shadows:
                module.__dict__["_call_impl"] = shadow

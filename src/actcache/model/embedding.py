"""The input of the first block as a sum: what a token gives, and what its position gives."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actcache.model.anatomy import Anatomy
from actcache.model.factors import ROUNDINGS, config_numbers, forms_of
from actcache.model.forms import first_input
from actcache.model.probe import of_this_thread, probe_inputs, undisturbed


@dataclass(frozen=True)
class TokenEmbedding:
    """The part of the first block's input that depends on the token alone, where a part for the position is added to
    it: the model's embedding times `factor`."""

    anatomy: Anatomy
    factor: float

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids ``[B, S]`` to vectors ``[B, S, D]``."""
        module = self.anatomy.embed
        assert module is not None
        weight = next(module.parameters(), ids)
        found: Tensor = module.forward(ids if weight.is_meta else ids.to(weight.device))
        return found * self.factor


_found: weakref.WeakKeyDictionary[Anatomy, float | None] = weakref.WeakKeyDictionary()


def token_embedding(anatomy: Anatomy) -> TokenEmbedding | None:
    """The embedding of tokens, of a model with one stack that adds embeddings of positions to it; None of any other.
    One short pass when it is first asked for."""
    if anatomy not in _found:
        _found[anatomy] = _find(anatomy)
    factor = _found[anatomy]
    return None if factor is None else TokenEmbedding(anatomy, factor)


def _find(anatomy: Anatomy) -> float | None:
    if anatomy.stacks != (None,) or anatomy.embed is None:
        return None
    given: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        given.append(first_input((args, kwargs)).clone())

    inputs = probe_inputs(anatomy)
    with undisturbed(anatomy.model), torch.no_grad():
        hook = anatomy.blocks[0].register_forward_pre_hook(of_this_thread(note), with_kwargs=True)
        try:
            anatomy.backbone(**inputs)
        finally:
            hook.remove()
        whole = given[0].double()
        part = TokenEmbedding(anatomy, 1.0)(inputs["input_ids"]).to(given[0].device)
    if part.shape != whole.shape:
        return None
    eps = max(torch.finfo(part.dtype).eps, torch.finfo(given[0].dtype).eps)
    for factor in (1.0, *forms_of(config_numbers(anatomy.model))):
        scaled = part.double() * factor
        rest = whole - scaled
        bound = ROUNDINGS * eps * (whole.abs() + scaled.abs())
        if bool((rest.abs() <= bound).all()):
            return None
        # Prompts of other tokens: what is left must be the same at the same position.
        if bool(((rest - rest[:1]).abs() <= bound + bound[:1]).all()):
            return factor
    return None

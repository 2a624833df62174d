"""Mixtures of experts: which experts each token was sent to, in each pass.

Where two experts score nearly the same, rounding decides between them, and another batch rounds otherwise. From there
on the values are others without anything being wrong. Such rows are counted, not compared; a row that differs without
any router having chosen otherwise is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actcache.model.anatomy import Anatomy, ReadPoint
from actcache.model.sites import Site

# Largest share of routings that rounding may decide. Measured in bfloat16: 2 of 5,644.
MOST_FLIPPED = 0.02
_EXPERTS = re.compile(r"(moe_|n_|num_)*(local_|routed_)?experts")
_CHOSEN = re.compile(r"(moe_)?(num_experts_per_tok(en)?|top_?k(_experts)?|k|num_selected_experts|router_top_k)")
_ROUTER = re.compile(r"(.*\.)?(gate|router)")
# What a block computes before its experts.
_BEFORE = (
    *("resid_pre", "attn_in", "q", "k", "v", "pattern", "z", "head_out", "attn_out", "cross_attn_out", "resid_mid"),
    *("mlp_in", "router_logits"),
)


def find_routers(anatomy: Anatomy, config: Mapping[str, Any]) -> dict[str, ReadPoint]:
    """By path, the routers of a mixture of experts, none for other models; reading one gives its choices ``[N, k]``."""
    numbers = [
        (name, value) for name, value in config.items() if isinstance(value, int) and not isinstance(value, bool)
    ]
    experts = {value for name, value in numbers if _EXPERTS.fullmatch(name) and value > 1}
    chosen = next((value for name, value in numbers if _CHOSEN.fullmatch(name)), 1)
    if not experts:
        return {}
    found = {}
    for block_path in anatomy.block_paths:
        for path, module in anatomy.model.get_submodule(block_path).named_modules(prefix=block_path):
            if path != block_path and _ROUTER.fullmatch(path):
                found[path] = ReadPoint(module, path, "output", _Choices(experts, chosen))
    return found


class _Choices:
    """The experts of each row, from what a router returned: their numbers, or a score for each expert."""

    def __init__(self, experts: set[int], chosen: int) -> None:
        self._experts = experts
        self._chosen = chosen

    def __call__(self, output: Any) -> Tensor:
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
        for tensor in tensors:
            if not tensor.is_floating_point() and tensor.dtype is not torch.bool:
                return tensor.detach().reshape(-1, tensor.shape[-1]).sort(dim=-1).values
        for tensor in tensors:
            if tensor.shape[-1] in self._experts:
                scores = tensor.detach().reshape(-1, tensor.shape[-1])
                return scores.topk(min(self._chosen, scores.shape[-1]), dim=-1).indices.sort(dim=-1).values
        # Something else that is called a gate.
        return tensors[0].new_zeros(0, 1)


class Flips:
    """Where routers of one prompt chose otherwise than when it was alone."""

    def __init__(self, anatomy: Anatomy, alone: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
        self._depths = {stack: anatomy.depth(stack) for stack in anatomy.stacks}
        self.routed = 0
        self.flipped = 0
        # By stack and layer, which tokens.
        self._at: dict[tuple[str | None, int], Tensor] = {}
        place = {f"{s.blocks}.{i}.": (s.name, i) for s in anatomy.structure.stacks for i in range(s.n_layers)}
        for path, choices in here.items():
            if len(choices) != len(alone[path]) or not len(choices):
                continue
            other = (choices != alone[path]).any(-1)
            self.routed += len(other)
            self.flipped += int(other.sum())
            where = next(where for prefix, where in place.items() if path.startswith(prefix))
            if bool(other.any()):
                self._at[where] = self._at.get(where, other) | other

    def touched(self, site: Site, tokens: int) -> Tensor:
        """Bool ``[tokens]``: rows of `site` that may be others because of a flip."""
        rows = torch.zeros(tokens, dtype=torch.bool)
        for (stack, layer), other in self._at.items():
            if stack != site.stack and site.name != "logits":
                # The decoder attends to all that the encoder gives.
                rows |= stack == "encoder"
                continue
            at = self._depths[stack] if site.layer is None and site.name != "embed" else site.layer or 0
            if at > layer:
                # Later blocks look back at a token that is another.
                first = 0 if stack == "encoder" else int(other.nonzero()[0])
                rows[first:] = True
            elif at == layer and site.name not in (*_BEFORE, "embed"):
                rows |= other
        return rows

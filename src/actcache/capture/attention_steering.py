"""Attention steering: some queries attend to some keys more, less, or with a share that is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from actcache.capture.edit_values import read_heads
from actcache.capture.knockout import Knockout, read_edges
from actcache.capture.ready_made import ReadyMade
from actcache.errors import OptionError


def steer_attention(
    layer: Any,
    heads: Any = None,
    *,
    from_positions: Any,
    to_positions: Any,
    scale: float | None = None,
    share: float | None = None,
    stack: str | None = None,
) -> ReadyMade:
    """Change how much the queries at `from_positions` attend to the keys at `to_positions`; the rest of their attention
    is shared out anew, so that its sum stays what it was.

        ac.steer_attention(5, heads=3, from_positions="last", to_positions=(2, 5), scale=2.0)
        ac.steer_attention(5, from_positions="last", to_positions=0, share=0.9)

    Give one of the two. `scale`: what these probabilities are multiplied by before each query's, a sink's included,
    are brought back to their sum; 0 is `knockout`. `share`: the part of each query's attention (of what does not go to
    a sink) that these keys get together, 0 to 1, in the proportion they had; a query that sees none of them, or nothing
    else, keeps what it has. Layers, heads, positions, `stack` and what is refused are those of `knockout`.

    Both are made before the softmax, where a factor is the addition of its logarithm.

    Raises `OptionError` for a negative `scale`, a `share` outside 0 to 1, both or neither.
    """
    if (scale is None) == (share is None):
        raise OptionError("steer_attention needs either scale= (a factor, 2.0 doubles) or share= (0 to 1)")
    if scale is not None and not (0 <= scale < math.inf):
        raise OptionError(f"scale is {scale!r}: expected a number from 0 (none) up; 1 leaves attention as it is")
    if share is not None and not 0 <= share <= 1:
        raise OptionError(f"share is {share!r}: expected a part of the query's attention, from 0 to 1")
    layers = read_edges("steer_attention", layer, from_positions, to_positions, stack)
    return AttentionSteering(
        f"steering of attention at layer {layer!r}",
        from_positions,
        read_heads(heads),
        layers,
        to_positions,
        stack,
        None if scale is None else float(scale),
        None if share is None else float(share),
    )


@dataclass(frozen=True, eq=False)
class AttentionSteering(Knockout):
    """Made by `steer_attention`."""

    scale: float | None
    share: float | None

    _kind: ClassVar[str] = "attention steering"

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "scale": self.scale, "share": self.share}

    def _changed(self, scores: Tensor, edges: Tensor) -> Tensor:
        if self.scale is not None:
            return torch.where(edges, scores + _log(self.scale), scores)
        assert self.share is not None
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # The logarithms of what goes to these keys, to the others and to all of them.
        theirs = wide.masked_fill(~edges, -torch.inf).logsumexp(-1, keepdim=True)
        others = wide.masked_fill(edges, -torch.inf).logsumexp(-1, keepdim=True)
        whole = torch.logaddexp(theirs, others)
        both = edges.any(-1, keepdim=True) & theirs.isfinite() & others.isfinite()
        to = torch.where(edges, wide - theirs + _log(self.share), wide - others + _log(1 - self.share)) + whole
        return torch.where(both, to, wide).to(scores.dtype)


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -math.inf

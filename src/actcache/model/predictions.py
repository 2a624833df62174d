"""What a head says of many rows, in bounded memory: the cross-entropy of the tokens that follow, and logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from actcache.model.head import Head

# Logits in memory at a time: larger parts are no faster on a CPU, smaller ones are slower on an accelerator.
_CPU_BYTES, _BYTES = 32 << 20, 256 << 20


@dataclass(frozen=True)
class Predictions:
    """What was computed of `N` rows.

    Attributes:
        losses: float32 ``[N]``, the cross-entropy of each row's target; nan where it has none.
        values: float32 logits of the kept rows, ``[n, V]``, or the largest first ``[n, k]``; None where none are kept.
        indices: int32 ``[n, k]``, the tokens of `values`; None for all logits.
    """

    losses: Tensor
    values: Tensor | None = None
    indices: Tensor | None = None


@torch.no_grad()
def predict(
    head: Head,
    rows: Tensor,
    targets: Tensor,
    keep: Tensor | None = None,
    *,
    top_k: int | None = None,
    normalised: bool = False,
    max_bytes: int | None = None,
) -> Predictions:
    """What `head` says of `rows` ``[N, D]`` of the stream, or with `normalised` of what the final norm made of it.

    Args:
        targets: int64 ``[N]``, the token that follows each row; -1 where none does or its loss is not asked for.
        keep: bool ``[N]``, the rows whose logits are kept; None for none.
        top_k: keep only so many of the largest logits of a row.
        max_bytes: how much memory float32 logits may take at a time (at least one row's).
    """
    if max_bytes is None:
        max_bytes = _CPU_BYTES if rows.device.type == "cpu" else _BYTES
    losses = torch.full((len(rows),), torch.nan, device=rows.device)
    kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.device) if keep is None else keep
    needed = ((targets >= 0) | kept).nonzero()[:, 0]
    values: list[Tensor] = []
    indices: list[Tensor] = []
    start = 0
    for logits in head.in_parts(rows[needed], max_bytes, normalised=normalised):
        at = needed[start : start + len(logits)]
        start += len(logits)
        wide = logits.float()
        target = targets[at]
        if bool((target >= 0).any()):
            # Faster than the difference to logsumexp, which goes through the logits three times.
            found = cross_entropy(wide, target, ignore_index=-1, reduction="none")
            losses[at] = torch.where(target >= 0, found, torch.nan)
        chosen = kept[at]
        if bool(chosen.any()):
            some = wide[chosen]
            if top_k is not None:
                largest = some.topk(min(top_k, some.shape[-1]), dim=-1)
                indices.append(largest.indices.to(torch.int32))
                some = largest.values
            values.append(some)
    return Predictions(losses, torch.cat(values) if values else None, torch.cat(indices) if indices else None)

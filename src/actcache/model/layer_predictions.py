"""What a head predicts from the stream at many layers, in bounded memory: best tokens, entropy, distance to the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actcache.model.head import Head

# One layer's logits at a time; a few times that is alive (log-probabilities of the layer and of the last one).
_CPU_BYTES, _BYTES = 8 << 20, 128 << 20


@dataclass(frozen=True)
class LayerPredictions:
    """Predictions from `N` rows of the stream at `L` layers, on the CPU. Logarithms are natural.

    Attributes:
        tokens: int64 ``[L, N, k]``, the best `k` tokens, best first.
        probabilities: float32 ``[L, N, k]``, theirs.
        entropy: float32 ``[L, N]``, of the distribution at the layer.
        kl: float32 ``[L, N]``, ``KL(final || layer)``; None where the final stream is not known.
        ranks: int64 ``[L, N, t]``, how many tokens have a larger logit than each of the chosen: 0 is the best.
        chosen: float32 ``[L, N, t]``, the probabilities of the chosen.
    """

    tokens: Tensor
    probabilities: Tensor
    entropy: Tensor
    kl: Tensor | None
    ranks: Tensor
    chosen: Tensor

    @classmethod
    def join(cls, parts: Sequence[LayerPredictions]) -> LayerPredictions:
        """Predictions from the rows of all `parts`, of which there is at least one, in order."""
        kls = [part.kl for part in parts if part.kl is not None]
        return cls(
            torch.cat([part.tokens for part in parts], 1),
            torch.cat([part.probabilities for part in parts], 1),
            torch.cat([part.entropy for part in parts], 1),
            torch.cat(kls, 1) if len(kls) == len(parts) else None,
            torch.cat([part.ranks for part in parts], 1),
            torch.cat([part.chosen for part in parts], 1),
        )


@torch.no_grad()
def predict_layers(
    head: Head,
    layers: Sequence[Tensor],
    final: Tensor | None,
    *,
    top_k: int,
    chosen: Sequence[int] = (),
    normalised: bool = False,
    max_bytes: int | None = None,
) -> LayerPredictions:
    """What `head` predicts from each of `layers`, tensors ``[N, D]`` of the stream (with `normalised` of what the final
    norm made of it), and how far that is from what it predicts from `final` ``[N, D]``.

    `max_bytes`: how much memory the logits of one layer may take at a time (at least one row's). Softmax, entropy and
    divergence are computed in float32, of a float64 model in float64.
    """
    count = 0 if final is None and not layers else len(layers[0] if layers else final)  # type: ignore[arg-type]
    if max_bytes is None:
        max_bytes = _CPU_BYTES if head.device.type == "cpu" else _BYTES
    step = max(1, max_bytes // (4 * head.vocab_size))
    shape = len(layers), count
    made = LayerPredictions(
        torch.zeros(*shape, top_k, dtype=torch.int64),
        torch.zeros(*shape, top_k),
        torch.zeros(shape),
        None if final is None else torch.zeros(shape),
        torch.zeros(*shape, len(chosen), dtype=torch.int64),
        torch.zeros(*shape, len(chosen)),
    )
    ids = torch.tensor(list(chosen), dtype=torch.int64, device=head.device)
    for start in range(0, count, step):
        part = slice(start, start + step)
        # Equal rows give equal numbers: of the last layer itself the divergence is 0 without rounding.
        last = None if final is None else _logits(head, final[part], normalised)
        last_log = None if last is None else _log_softmax(last)
        weights = None if last_log is None else last_log.exp()
        for number, rows in enumerate(layers):
            same = rows is final and last is not None
            logits = last if same else _logits(head, rows[part], normalised)
            assert logits is not None
            log = last_log if same else _log_softmax(logits)
            assert log is not None
            best = logits.topk(top_k)
            made.tokens[number, part] = best.indices.cpu()
            made.probabilities[number, part] = log.gather(-1, best.indices).exp().float().cpu()
            own = weights if same else log.exp()
            assert own is not None
            made.entropy[number, part] = _entropy(own, log).float().cpu()
            if made.kl is not None and last_log is not None and weights is not None and not same:
                made.kl[number, part] = _divergence(weights, last_log, log).clamp_min(0).float().cpu()
            if chosen:
                made.chosen[number, part] = log[:, ids].exp().float().cpu()
                for i, token in enumerate(chosen):
                    made.ranks[number, part, i] = rank_of(logits, token)
    return made


def rank_of(logits: Tensor, token: int) -> Tensor:
    """How many tokens have a larger logit than `token` in each row ``[n, V]``: int64 ``[n]`` on the CPU, 0 for the
    best. Tokens of equal logits share the better rank."""
    return (logits > logits[:, token, None]).sum(-1).cpu()


def _logits(head: Head, rows: Tensor, normalised: bool) -> Tensor:
    rows = rows.to(head.device)
    return head.unembed(rows) if normalised else head(rows)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _entropy(p: Tensor, log: Tensor) -> Tensor:
    found = -(p * log).sum(-1)
    odd = found.isnan()
    if bool(odd.any()):
        # Tokens that are ruled out: 0 times minus infinity. Slower.
        found[odd] = torch.special.entr(p[odd]).sum(-1)
    return found


def _divergence(p: Tensor, log: Tensor, other: Tensor) -> Tensor:
    """``KL(p || exp(other))``, of which `log` is the logarithm of `p`."""
    found = (p * (log - other)).sum(-1)
    odd = found.isnan()
    if bool(odd.any()):
        # What `p` rules out adds nothing, however sure the other is of it. Slower.
        found[odd] = torch.where(p[odd] > 0, p[odd] * (log[odd] - other[odd]), 0).sum(-1)
    return found

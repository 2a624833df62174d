"""Perplexity and logits of the batches that run, from the stream as it leaves the last block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from actcache.derive.results import TOKEN_NLL, Asked
from actcache.errors import SiteUnavailableError
from actcache.extract.backends import RESULT
from actcache.extract.declared import refuse_edits_behind
from actcache.model.anatomy import describe
from actcache.model.head import Head, find_head
from actcache.model.predictions import predict
from actcache.model.sites import Site

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.capture.ready_made import ReadyMade


class Predictor:
    """Computes what is asked beside activations of the rows of one site: what the final norm returned, or where there
    is none what the last block did. Padding never gets to the head.

    Attributes: `site`.
    """

    def __init__(self, head: Head, site: str, asked: Asked, *, normalised: bool) -> None:
        self.site = site
        self._head = head
        self._asked = asked
        self._normalised = normalised
        self._rows = torch.empty(0)

    @classmethod
    def of(cls, model: torch.nn.Module, asked: Asked, edits: Sequence[ReadyMade]) -> Predictor:
        """Raises `SiteUnavailableError` when the head of `model` cannot be made out, `OptionError` for edits of it."""
        anatomy = describe(model)
        try:
            head = find_head(model)
        except SiteUnavailableError as error:
            raise SiteUnavailableError(
                f"{error}; compute_perplexity=False (and cache_logits=False) stores activations alone"
            ) from error
        stack = anatomy.stacks[-1]
        final = Site("final_norm", stack=stack)
        normalised = anatomy.why_not(final) is None
        refuse_edits_behind(edits, head, normalised=normalised)
        last = Site("resid_post", anatomy.depth(stack) - 1, stack=stack)
        return cls(head, str(final if normalised else last), asked, normalised=normalised)

    def receive(self, hidden: torch.Tensor, lengths: Sequence[int]) -> None:
        """Keep the real rows of `hidden` ``[B, S, D]``."""
        self._rows = torch.cat([h[:n] for h, n in zip(hidden, lengths, strict=True)])

    def predict(self, sequences: Sequence[npt.NDArray[np.int32]]) -> dict[str, torch.Tensor]:
        """The results of the batch, by `RESULT` and name."""
        rows, self._rows = self._rows, torch.empty(0)
        made = results_of(self._head, rows, sequences, self._asked, normalised=self._normalised)
        return {f"{RESULT}{name}": tensor for name, tensor in made.items()}


def results_of(
    head: Head,
    rows: torch.Tensor,
    sequences: Sequence[npt.NDArray[np.int32]],
    asked: Asked,
    *,
    normalised: bool = False,
    every: bool = True,
) -> dict[str, torch.Tensor]:
    """What is `asked` of prompts with the token ids `sequences`, by the names it has in a store.

    `rows` are those of every token, ``[sum of tokens, D]``, or without `every` of the last of each prompt ``[b, D]``.
    """
    logits, device = asked.logits, rows.device
    lengths = torch.tensor([len(ids) if every else 1 for ids in sequences])
    last = lengths.cumsum(0) - 1
    targets = torch.full((len(rows),), -1, dtype=torch.int64)
    if asked.perplexity:
        targets[:-1] = torch.cat([torch.from_numpy(np.array(ids)) for ids in sequences])[1:].long()
        targets[last] = -1
    keep = None
    if logits is not None:
        keep = torch.full((len(rows),), logits.positions == "all")
        keep[last] = True
        keep = keep.to(device)
    top_k = None if logits is None else logits.top_k
    made = predict(head, rows, targets.to(device), keep, top_k=top_k, normalised=normalised)
    results = {TOKEN_NLL: made.losses} if asked.perplexity else {}
    if logits is not None:
        columns = [tensor for tensor in (made.values, made.indices) if tensor is not None]
        results |= dict(zip(logits.names, columns, strict=True))
    return results

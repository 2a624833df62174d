"""Whether padding in front of tokens changes their values, mask or not: seen in a short pass.

Where positions are counted from the ids, everything but the padding id counts. Other models number all that is there,
and some mix neighbouring positions.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import Anatomy, describe
from actcache.model.forms import first_tensor
from actcache.model.invariance import OwnPositions
from actcache.model.probe import probe_inputs, undisturbed

_FRONT = 3
_lock = threading.Lock()
_seen: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, int], float]] = weakref.WeakKeyDictionary()


def effect_of_front_padding(model: nn.Module, fill: int, positions: OwnPositions | None, prompts: int) -> float:
    """How far the values of a few tokens change when ids `fill` are put in front of them, under a mask and with
    `positions` where these are given: the largest difference over the largest value, or the median dimension's where
    that is more, and 0 where it is rounding. Also 0 for a model that cannot be looked at: its blocks cannot be made
    out, or it does not run on a few ids alone.

    `prompts`: how many the pass will have, since some models look at the mask only beside a second prompt (Mamba 2 in
    transformers 4).
    """
    try:
        anatomy = describe(model)
    except SiteUnavailableError:
        return 0.0
    with _lock:
        found = _seen.setdefault(model, {})
    rows = min(prompts, 2)
    if (fill, rows) not in found:
        try:
            found[fill, rows] = _effect(anatomy, fill, positions, rows)
        except (TypeError, ValueError, LookupError):
            found[fill, rows] = 0.0
        except RuntimeError:
            # Of the moment, perhaps: memory that was short.
            return 0.0
    return found[fill, rows]


def _effect(anatomy: Anatomy, fill: int, positions: OwnPositions | None, rows: int) -> float:
    inputs = probe_inputs(anatomy, repeated=(rows, 4))
    ids: Tensor = inputs["input_ids"]
    padded = torch.cat([ids.new_full((rows, _FRONT), fill), ids], 1)
    real = (torch.arange(padded.shape[1], device=ids.device) >= _FRONT).expand(rows, -1)
    given = {**inputs, "input_ids": padded}
    if "attention_mask" in inputs:
        given["attention_mask"] = real.long()
    if positions is not None:
        given["position_ids"] = positions.of(real, padded)
    with undisturbed(anatomy.model), torch.no_grad():
        alone, behind = (_first(anatomy.backbone(**arguments)) for arguments in (inputs, given))
    # By dimension, too: beside a massive one all others may change unseen.
    difference, size = (
        value.double().abs().flatten(0, -2).amax(0) for value in (behind[:, -alone.shape[1] :] - alone, alone)
    )
    error = torch.maximum(difference.max() / size.max(), (difference / size.clamp_min(1e-30)).median())
    # Of other positions much more comes than of other kernels.
    rounding = max(1e-3, 8 * torch.finfo(alone.dtype).eps)
    return float(error) if bool(error > rounding) else 0.0


def _first(output: Any) -> Tensor:
    """The hidden states of the stack that reads the prompt."""
    encoded = getattr(output, "encoder_last_hidden_state", None)
    return encoded if isinstance(encoded, Tensor) else first_tensor(output)

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
_seen: weakref.WeakKeyDictionary[nn.Module, dict[int, float]] = weakref.WeakKeyDictionary()


def effect_of_front_padding(model: nn.Module, fill: int, positions: OwnPositions | None) -> float:
    """How far the values of a few tokens change when ids `fill` are put in front of them, under a mask and with
    `positions` where these are given: the largest difference over the largest value, 0 where it is rounding. Also 0
    for a model that cannot be looked at: its blocks cannot be made out, or it does not run on a few ids alone."""
    try:
        anatomy = describe(model)
    except SiteUnavailableError:
        return 0.0
    with _lock:
        found = _seen.setdefault(model, {})
    if fill not in found:
        try:
            found[fill] = _effect(anatomy, fill, positions)
        except (TypeError, ValueError, RuntimeError, LookupError):
            found[fill] = 0.0
    return found[fill]


def _effect(anatomy: Anatomy, fill: int, positions: OwnPositions | None) -> float:
    inputs = probe_inputs(anatomy, repeated=(1, 4))
    ids: Tensor = inputs["input_ids"]
    padded = torch.cat([ids.new_full((1, _FRONT), fill), ids], 1)
    real = torch.arange(padded.shape[1], device=ids.device)[None] >= _FRONT
    given = {**inputs, "input_ids": padded}
    if "attention_mask" in inputs:
        given["attention_mask"] = real.long()
    if positions is not None:
        given["position_ids"] = positions.of(real, padded)
    with undisturbed(anatomy.model), torch.no_grad():
        alone, behind = (_first(anatomy.backbone(**arguments)) for arguments in (inputs, given))
    error = (behind[:, -alone.shape[1] :].double() - alone.double()).abs().max() / alone.double().abs().max()
    # Of other positions much more comes than of other kernels.
    rounding = max(0.02, 8 * torch.finfo(alone.dtype).eps)
    return float(error) if bool(error > rounding) else 0.0


def _first(output: Any) -> Tensor:
    """The hidden states of the stack that reads the prompt."""
    encoded = getattr(output, "encoder_last_hidden_state", None)
    return encoded if isinstance(encoded, Tensor) else first_tensor(output)

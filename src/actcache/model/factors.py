"""Numbers by which a model multiplies a value on its way, recognised among those of its config."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from actcache.model.structure import text_config, unwrapped

# How far, in roundings of the largest value, a value may be from what it is taken for.
ROUNDINGS = 4


def config_numbers(model: nn.Module) -> list[float]:
    """The positive numbers of the config."""
    config = text_config(unwrapped(model))
    found = [float(value) for value in vars(config).values() if type(value) in (int, float)] if config else []
    return list(dict.fromkeys(value for value in found if 0 < value < math.inf))


def forms_of(numbers: list[float]) -> list[float]:
    """The numbers as models use them: themselves, their roots, and one over either."""
    return list(dict.fromkeys(form for n in numbers for form in (n, 1 / n, n**0.5, n**-0.5)))


def factor_between(value: Tensor, given: Tensor, numbers: list[float]) -> float | None:
    """The number that `value` was multiplied by to become `given`; None where it was not."""
    if value.shape != given.shape:
        return None
    if torch.equal(value, given):
        return 1.0
    wide = value.double()
    size = float(wide.square().sum())
    measured = float((wide * given.double()).sum()) / size if size else math.nan
    near = [form for form in forms_of(numbers) if abs(form - measured) < 0.01 * abs(form)]
    errors = {form: roundings(value * form, given) for form in near}
    best = min(errors, key=lambda form: errors[form], default=None)
    return best if best is not None and errors[best] <= ROUNDINGS else None


def roundings(one: Tensor, other: Tensor) -> float:
    """The largest difference, in roundings of the largest value of `other`."""
    eps = max(torch.finfo(t.dtype).eps for t in (one, other))
    wide = other.double()
    return float((one.double() - wide).abs().max() / (eps * wide.abs().max().clamp_min(1e-30)))

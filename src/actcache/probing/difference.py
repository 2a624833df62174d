"""The difference of the means of two sets of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import OptionError
from actcache.probing.inputs import Layers, as_array, layers_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.unified import UnifiedCache

_PROMPTS_AT_ONCE = 256


def mean_difference(
    positive: Any, negative: Any, *, cache: UnifiedCache | None = None, site: str | None = None, layers: Any = None
) -> npt.NDArray[np.float32]:
    """The mean over `positive` minus the mean over `negative`, for each layer: float32 ``[L, D]``.

    Sums are taken in float64, whatever dtype the values have. Each row is a direction for `ac.steer`.

    Args:
        positive, negative: activations as `ac.activations` returns them: arrays or tensors ``[B, L, D]``, or lists of
            ``[T, L, D]``, of which every token counts the same; or mappings from layer to ``[B, D]``. With `cache`:
            prompts.
        cache: where activations of the prompts are read, computed first where they are missing. One that keeps full
            sequences gives means over tokens.
        site: which of the sites of `cache`; needed where it has several.
        layers: some of the layers of `cache`, in the order wanted.

    Raises:
        OptionError: no rows, shapes or layers that do not fit each other, values that are not finite.
        PromptError, PromptTypeError, PartialWarmupError: as `UnifiedCache.warmup`.
    """
    if cache is not None:
        if not hasattr(cache, "extractor"):
            raise OptionError(f"cache is {cache!r:.60}: expected an ac.UnifiedCache.")
        names = _names(cache, site, layers)
        both = [_prompts(positive, "positive"), _prompts(negative, "negative")]
        cache.warmup([prompt for prompts in both for prompt in prompts])
        means = [_mean_of_prompts(cache, prompts, len(names), site, layers) for prompts in both]
    elif site is not None or layers is not None:
        raise OptionError("site= and layers= choose from a cache: pass cache=, or choose from the arrays.")
    else:
        sides = [_given(positive, "positive"), _given(negative, "negative")]
        if sides[0].names != sides[1].names:
            raise OptionError(f"positive has the layers {sides[0].names}, negative {sides[1].names}.")
        widths = {matrix.shape[1] for side in sides for matrix in side.matrices}
        if len(widths) > 1:
            raise OptionError(f"vectors are {sorted(widths)} numbers wide: [L, D] needs one width.")
        means = [np.stack([m.astype(np.float64).mean(axis=0) for m in side.matrices]) for side in sides]
    return (means[0] - means[1]).astype(np.float32)


def _given(values: Any, what: str) -> Layers:
    if isinstance(values, Mapping) or not isinstance(values, Sequence):
        return layers_of(values, what)
    if isinstance(values, str) or any(isinstance(part, str) for part in values):
        raise OptionError(f"{what} holds texts: pass cache= to have their activations read.")
    parts = [as_array(part) for part in values]
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) != 1 or parts[0].ndim != 3:
        raise OptionError(f"{what} is a list of {sorted({p.shape for p in parts})}, expected arrays [T, L, D].")
    return layers_of(np.concatenate(parts), what)


def _prompts(given: Any, what: str) -> list[Any]:
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise OptionError(f"{what} has no prompts: a mean needs one at least.")
    return prompts


def _names(cache: UnifiedCache, site: str | None, layers: Any) -> list[str]:
    """The complete names of what is read of `cache`, which have one width."""
    from actcache.extract.extractor import chosen_sites
    from actcache.extract.inventory import width_of
    from actcache.model.sites import Site

    if site is None and len(cache.extractor.site_names) > 1:
        raise OptionError(f"the cache holds {list(cache.extractor.site_names)}: choose one with site=.")
    (names,) = chosen_sites(cache.extractor, site, layers).values()
    widths = {width_of(cache.extractor.source, Site.parse(name)) for name in names}
    if len(widths) > 1:
        raise OptionError(f"vectors are {sorted(widths)} numbers wide: choose layers of one width with layers=.")
    return names


def _mean_of_prompts(
    cache: UnifiedCache, prompts: list[Any], count: int, site: str | None, layers: Any
) -> npt.NDArray[np.float64]:
    """The mean of the vectors of `prompts`, ``[count, D]``; a part of them is in memory at a time."""
    import torch

    total, rows = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        answer = cache.get_activations(prompts[start : start + _PROMPTS_AT_ONCE], site=site, layers=layers)
        assert isinstance(answer, tuple)
        values, mask = answer
        real = values if mask is None else values[mask]
        total = total + real.double().sum(0)
        rows += len(real)
    if not bool(torch.isfinite(total).all()):
        raise OptionError("what is stored of these prompts holds inf or nan: leave out the prompts that do.")
    return (total / rows).reshape(count, -1).numpy()

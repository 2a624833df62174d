"""What is done to vectors on their way out: centred, scaled, in the dtype and on the device asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actcache.errors import OptionError, require_choice
from actcache.store.reading import converted

if TYPE_CHECKING:
    import torch

    from actcache.store.statistics import Moments

NORMALIZATIONS = ("mean", "mean_std", "unit")


def check_normalize(normalize: Any) -> str | None:
    """One of `NORMALIZATIONS`, or None; OptionError for anything else."""
    return None if normalize is None else require_choice(normalize, NORMALIZATIONS, "normalize")


@dataclass(frozen=True)
class Finish:
    """What becomes of the vectors of one site: `mean` and `std` (float64 ``[D]``) out, then `dtype`."""

    normalize: str | None
    dtype: torch.dtype | None
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None

    @classmethod
    def made(cls, normalize: str | None, dtype: torch.dtype | None, moments: Callable[[], Moments]) -> Finish:
        """`moments` gives the statistics of the tokens that are streamed, where they are needed."""
        if normalize not in ("mean", "mean_std"):
            return cls(normalize, dtype)
        import torch

        known = moments()
        std = torch.from_numpy(known.std.copy())
        # A dimension that never changes is 0 after centring, whatever it is divided by.
        std[std == 0] = 1
        return cls(normalize, dtype, torch.from_numpy(known.mean.copy()), std if normalize == "mean_std" else None)

    def __call__(self, vectors: torch.Tensor, name: Callable[[list[int]], str]) -> torch.Tensor:
        """`vectors` ``[B, D]``, perhaps in place; computed in float32 (float64 for float64), returned in `dtype` or
        their own. ValueOverflowError, with the `name` of the place, where a finite value would become inf."""
        import torch

        if self.normalize is not None and not vectors.is_floating_point():
            raise OptionError(f"normalize={self.normalize!r}: these are integers, of {vectors.dtype}.")
        dtype = vectors.dtype if self.dtype is None else self.dtype
        if self.normalize is not None:
            wide = torch.float64 if vectors.dtype == torch.float64 else torch.float32
            vectors = vectors.to(wide)
            if self.mean is not None:
                vectors -= self.mean.to(wide)
            if self.std is not None:
                vectors /= self.std.to(wide)
            if self.normalize == "unit":
                # The square of what fits float32 may not.
                largest = vectors.abs().amax(1, keepdim=True)
                vectors /= torch.where(largest == 0, 1, largest)
                length = vectors.norm(dim=1, keepdim=True)
                vectors /= torch.where(length == 0, 1, length)
        return converted(vectors, dtype, name=name)

"""What an extraction returns: ragged rows per site, with the tokens they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actcache.errors import UnknownKeyError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


@dataclass(frozen=True)
class Activations:
    """Activations of `B` prompts in the caller's order.

    ``activations["resid_post.5"]`` is a tensor `[B, D]` when pooled, else a list of `B` tensors `[T, D]`.

    Attributes:
        data: per site one tensor `[rows, D]`, prompts one after the other.
        row_offset: int64 `[B + 1]`; prompt `i` owns rows ``row_offset[i]:row_offset[i + 1]``.
        pooled: whether every prompt has exactly one row.
        token_ids: the token ids of each prompt.
    """

    data: Mapping[str, torch.Tensor]
    row_offset: npt.NDArray[np.int64]
    pooled: bool
    token_ids: list[npt.NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.token_ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __contains__(self, site: object) -> bool:
        return site in self.data

    def __getitem__(self, site: str) -> torch.Tensor | list[torch.Tensor]:
        if site not in self.data:
            raise UnknownKeyError(f"no site {site!r} was extracted.{did_you_mean(site, self.data)}")
        rows = self.data[site]
        if self.pooled:
            return rows
        return [rows[a:b] for a, b in zip(self.row_offset[:-1], self.row_offset[1:], strict=True)]

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(activations [B, S, L*D], mask [B, S])`: sites side by side, right-padded with zeros; bool mask."""
        import torch

        lengths = torch.from_numpy(self.row_offset[1:] - self.row_offset[:-1])
        longest = int(lengths.max())
        mask = torch.arange(longest)[None, :] < lengths[:, None]
        sites = list(self.data.values())
        padded = torch.zeros(len(self), longest, sum(s.shape[1] for s in sites), dtype=sites[0].dtype)
        padded[mask] = torch.cat(sites, dim=1)
        return padded, mask

"""What is known of the rows of a file that grows, while the disk is waited for: moments, and what storing changed."""

from __future__ import annotations

from collections.abc import Sequence

from actcache.store.casting import CastError, Piece, nothing_lost
from actcache.store.dtypes import value_dtype
from actcache.store.records import Records
from actcache.store.statistics import JointMoments, Moments, is_float


class Measured:
    """The moments of all rows of each column so far, and what storing them changed.

    `columns`: (site, code of its dtype, D). Rows that are stored as they are given are measured together where columns
    are alike, as those of the layers of a model are.
    """

    def __init__(self, columns: Sequence[tuple[str, str, int]]) -> None:
        self._errors = {site: CastError() for site, _, _ in columns}
        self._alone = {site: Moments.empty(dim) for site, code, dim in columns if is_float(value_dtype(code))}
        alike: dict[tuple[str, int], list[str]] = {}
        for site, code, dim in columns:
            if site in self._alone:
                alike.setdefault((code, dim), []).append(site)
        self._together = [(sites, JointMoments(len(sites), dim)) for (_, dim), sites in alike.items()]

    def add_cast(self, site: str, piece: Piece) -> None:
        """Take in rows that were cast."""
        self._errors[site].add(piece.error)
        if piece.moments is not None:
            self._alone[site].merge(piece.moments)

    def add_given(self, group: Sequence[Records], given: Sequence[str]) -> None:
        """Take in the rows of `group` at the sites `given`, which are stored as they are."""
        left = set(given)
        for sites, joint in self._together:
            if left.issuperset(sites):
                for part in group:
                    joint.update([part.data[site] for site in sites])
                left.difference_update(sites)
        for site in left:
            for part in group:
                moments = None
                if site in self._alone:
                    moments = Moments.empty(part.data[site].shape[1])
                    moments.update(part.data[site])
                    self._alone[site].merge(moments)
                self._errors[site].add(nothing_lost(len(part.data[site]), moments))

    def all(self) -> dict[str, tuple[Moments | None, CastError]]:
        """What is known of each site; no moments of integers."""
        found: dict[str, tuple[Moments | None, CastError]] = {
            site: (self._alone.get(site), error) for site, error in self._errors.items()
        }
        for sites, joint in self._together:
            for k, site in enumerate(sites):
                moments, error = joint.of(k), self._errors[site]
                error.add(nothing_lost(moments.count, moments))
                moments.merge(self._alone[site])
                found[site] = moments, error
        return found

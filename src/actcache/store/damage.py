"""What is lost where bytes are damaged: of each prompt the sites whose blocks fail, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from actcache.store.keys import Ints, Mask
from actcache.store.mapping import Segment
from actcache.store.records import SegmentInfo
from actcache.store.tombs import Keys, count_distinct, is_member


@dataclass(frozen=True)
class Remnant:
    """Prompts of a segment, bool ``[n]``, of which these sites are intact and others are not."""

    sites: tuple[str, ...]
    keep: Mask


def intact_of(segment: Segment, wanted: Mask) -> npt.NDArray[np.bool_]:
    """Which of the prompts `wanted` are intact at each site, bool ``[sites, n]``; reads every block of theirs."""
    chosen = np.flatnonzero(wanted)
    found = np.zeros((len(segment.info.sites), len(wanted)), bool)
    starts, stops = segment.row_offset[chosen], segment.row_offset[chosen + 1]
    found[:, chosen] = segment.checks.verify(segment.info.sites, starts, stops)
    return found


def remnants(sites: Sequence[str], intact: npt.NDArray[np.bool_], wanted: Mask) -> list[Remnant]:
    """What can be kept of the prompts `wanted` of which a part is damaged, in as few segments as there must be.

    A segment holds all of its sites for all of its prompts. So either prompts with the same sites left lie together, or
    sites with the same prompts left: whichever makes fewer of them. No value is in two.
    """
    broken = np.flatnonzero(wanted & ~intact.all(axis=0))
    left = intact[:, broken]
    by_prompt, of_prompt = np.unique(left, axis=1, return_inverse=True)
    by_site, of_site = np.unique(left, axis=0, return_inverse=True)
    found = []
    if by_prompt.shape[1] <= by_site.shape[0]:
        members = [(by_prompt[:, k], of_prompt.reshape(-1) == k) for k in range(by_prompt.shape[1])]
    else:
        members = [(of_site.reshape(-1) == k, by_site[k]) for k in range(by_site.shape[0])]
    for which, prompts in members:
        if which.any() and prompts.any():
            keep = np.zeros(len(wanted), bool)
            keep[broken[prompts]] = True
            found.append(Remnant(tuple(site for site, has in zip(sites, which, strict=True) if has), keep))
    return found


class KnownDamage:
    """What a process has found damaged in the segments of a space, which are known by number.

    What is left of damaged prompts has numbers, too: those of remnants.
    """

    def __init__(self) -> None:
        self._damaged: dict[int, npt.NDArray[np.bool_]] = {}
        """Bool ``[sites, prompts]``."""
        self._remnants: dict[int, tuple[int, Mask]] = {}
        """Of which segment a remnant is, and of which of its prompts."""

    def mark(
        self, number: int, info: SegmentInfo, sites: Sequence[str], rows: Ints, intact: npt.NDArray[np.bool_]
    ) -> list[Remnant]:
        """Note what of these prompts is not `intact`, bool ``[sites, rows]``; the remnants that take the place of those
        there were."""
        damaged = self._damaged.setdefault(number, np.zeros((len(info.sites), info.prompts), bool))
        for site, good in zip(sites, intact, strict=True):
            damaged[info.sites.index(site), rows[~good]] = True
        for remnant in self.remnants_of(number):
            del self._remnants[remnant]
        return remnants(info.sites, ~damaged, np.ones(info.prompts, bool))

    def add(self, remnant: int, number: int, keep: Mask) -> None:
        """Know the remnant of the prompts `keep` of a segment under the number `remnant`."""
        self._remnants[remnant] = number, keep

    def live(self, number: int) -> Mask | None:
        """Which prompts of a segment are undamaged at all sites, or are in a remnant; None for all."""
        if number in self._remnants:
            return self._remnants[number][1]
        damaged = self._damaged.get(number)
        return None if damaged is None else np.logical_not(damaged.any(axis=0))

    def whole(self, number: int) -> int:
        """The number of the segment that a remnant is of; of a segment its own."""
        return self._remnants[number][0] if number in self._remnants else number

    def remnants_of(self, number: int) -> list[int]:
        """The numbers of the remnants of a segment."""
        return [remnant for remnant, (whole, _) in self._remnants.items() if whole == number]

    def forget(self, number: int) -> None:
        """Nothing is known of a segment that has gone."""
        self._damaged.pop(number, None)
        for remnant in self.remnants_of(number):
            del self._remnants[remnant]


@dataclass
class Losses:
    """What cannot be read any more of one space: activations of which no intact copy is left.

    An activation is what one prompt has at one site in one layout.
    """

    activations: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    prompts: int = 0


def losses(held: Sequence[tuple[SegmentInfo, Mask, Mapping[str, Mask]]]) -> Losses:
    """What was lost, of segments with their prompts that no tomb names and, for each damaged site, those intact."""
    gone: dict[tuple[str, str], list[Keys]] = {}
    for info, live, damaged in held:
        for site, intact in damaged.items():
            gone.setdefault((info.layout, site), []).append(info.prompt_key[live & ~intact])
    found, everything = Losses(), []
    for (layout, site), keys in gone.items():
        missing = np.concatenate(keys)
        copies = [
            info.prompt_key[live & damaged[site] if site in damaged else live]
            for info, live, damaged in held
            if info.layout == layout and site in info.sites
        ]
        missing = missing[~is_member(missing, np.concatenate(copies))]
        count = count_distinct([missing])
        found.activations += count
        if count:
            found.sites[site] = found.sites.get(site, 0) + count
            everything.append(missing)
    found.prompts = count_distinct(everything)
    return found

"""What a page of a store or a dataset says, gathered before any of it is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actcache.store.keys import Ints
from actcache.store.prompts import CHAT
from actcache.store.records import DERIVED
from actcache.store.spaces import SpaceInfo
from actcache.store.store import Store
from actcache.store.summaries import SiteSummary
from actcache.wording import count, size

_BARS = 24
_SHOWN = 10


@dataclass(frozen=True)
class Histogram:
    """How many prompts have so many tokens: ``counts[i]`` have from ``edges[i]`` up to but not ``edges[i + 1]``."""

    edges: list[int]
    counts: list[int]
    median: float
    longest: int
    total: int

    @classmethod
    def of(cls, lengths: Sequence[int] | Ints) -> Histogram | None:
        """Of at least one length; None of none."""
        values = np.asarray(lengths, np.int64)
        if not len(values):
            return None
        low, high = int(values.min()), int(values.max())
        step = max(1, math.ceil((high - low + 1) / _BARS))
        edges = list(range(low, high + step + 1, step))
        counts = np.histogram(values, edges)[0].tolist()
        return cls(edges, counts, float(np.median(values)), high, int(values.sum()))


@dataclass(frozen=True)
class Layered:
    """A value for each layer of one site."""

    name: str
    layers: list[int]
    values: list[float]


@dataclass(frozen=True)
class ReadEntry:
    """A prompt, and when it was last read: seconds since the epoch."""

    prompt: str
    num_tokens: int | None
    at: float


@dataclass(frozen=True)
class Variant:
    """One variant of a model, as it is stored.

    Attributes:
        facts: what is said of it in a few words each, by name.
        sizes, norms: bytes and mean norm of each layer, for every site and layout that has layers.
        summaries: every site of every layout.
        hottest, coldest: the prompts read last, and those not read for longest; empty where there are few.
    """

    model_name: str
    name: str
    facts: Mapping[str, str]
    sizes: list[Layered]
    norms: list[Layered]
    summaries: list[SiteSummary]
    lengths: Histogram | None
    hottest: list[ReadEntry]
    coldest: list[ReadEntry]


@dataclass(frozen=True)
class Contents:
    """A whole page: its title, a table of all variants, and each of them; `lens` is the page of a logit lens."""

    title: str
    place: str
    facts: Mapping[str, str]
    variants: list[Variant]
    notes: list[str] = field(default_factory=list)
    lenses: list[tuple[str, str]] = field(default_factory=list)


def layered(summaries: Sequence[SiteSummary], value: str) -> list[Layered]:
    """`value` (a field of a summary) of all sites that lie in layers, a line for each site and layout."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for summary in summaries:
        match = re.fullmatch(r"(.+)\.(\d+)", summary.site)
        number = getattr(summary, value)
        if match and summary.layout != DERIVED and number is not None and math.isfinite(number):
            name = match[1] if summary.layout == "tokens" else f"{match[1]}, {summary.layout}"
            lines.setdefault(name, []).append((int(match[2]), float(number)))
    return [
        Layered(name, [layer for layer, _ in sorted(points)], [number for _, number in sorted(points)])
        for name, points in lines.items()
    ]


def variant_of(store: Store, space: SpaceInfo, name: str) -> Variant:
    """What `store` holds of one variant of a model. Of its prompts those are read that are shown."""
    summaries = store.summaries(space.space)
    places, times = store.last_reads(space)
    known = not space.imported and not space.pulled
    order = np.argsort(times, kind="stable")
    many = len(order) > _SHOWN
    facts = {
        "prompts": f"{space.num_prompts:,}",
        "size": size(space.size_bytes),
        "revision": space.revision or "",
        "dtype": space.dtype or "",
        "attention": space.attn_implementation or "",
        "space": space.space,
        "imported": space.imported or "",
        "pulled": space.pulled or "",
        "sites": count(len({s.site for s in summaries}), "site"),
    }

    def entries(numbers: Sequence[int]) -> list[ReadEntry]:
        return [ReadEntry(*_shown(places.prompt(i), known), times[i] / 1e9) for i in numbers]

    return Variant(
        space.model_name,
        name,
        {key: value for key, value in facts.items() if value},
        layered(summaries, "size_bytes"),
        layered(summaries, "mean_norm"),
        summaries,
        Histogram.of(places.num_tokens) if known else None,
        entries(order[::-1][:_SHOWN].tolist()),
        entries(order[:_SHOWN].tolist()) if many else [],
    )


def _shown(table: Any, known: bool) -> tuple[str, int | None]:
    text = table.text_of(0)
    tokens = table.tokens(0)
    if text is None:
        text = str(tokens.tolist())
    elif table.kind[0] == CHAT:
        text = f"chat {text}"
    return text, len(tokens) if known and (tokens >= 0).all() else None

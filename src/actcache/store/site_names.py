"""What the names of stored sites say: layers, their order, which logits there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from actcache.store.records import TOKENS

LAST = "last_token"
Sites = Mapping[str, set[str]]
"""Site names by layout."""


def layers_of(sites: Iterable[str], name: str | None = None) -> list[int]:
    """The layers in site names like "resid_post.5" (of the site `name` only, where given)."""
    found = set()
    for site in sites:
        match = re.fullmatch(r"(?:\w+\.)?([a-z_]+)\.(\d+)(?:\.\d+)?", site)
        if match and name in (None, match[1]):
            found.add(int(match[2]))
    return sorted(found)


def site_order(site: str) -> str:
    """What sites are sorted by: their names, layers by number."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(6), site)


def in_order(sites: set[str]) -> list[str]:
    """Sites by name, layers by number."""
    return sorted(sites, key=site_order)


def logits_of(sites: Sites) -> dict[str, set[int | None]]:
    """Which logits can be read: positions ("all", "last") -> numbers k of the k largest, None for every one."""
    found: dict[str, set[int | None]] = {}
    for layout, positions in ((TOKENS, ["all", "last"]), (LAST, ["last"])):
        names = sites.get(layout, set())
        held: set[int | None] = {None} if "logits" in names else set()
        for name in names:
            match = re.fullmatch(r"logits\.top(\d+)\.values", name)
            # Without their tokens the values are of no use.
            if match and f"logits.top{match[1]}.indices" in names:
                held.add(int(match[1]))
        for position in positions if held else ():
            found.setdefault(position, set()).update(held)
    return found

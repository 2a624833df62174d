"""Where stores lie in a bucket: for people who look where none is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from actcache.errors import nearest
from actcache.store.files import SPACE_NAME
from actcache.store.spaces import ROOT

if TYPE_CHECKING:
    from actcache.store.inspection import Inspection

_IN_A_STORE = re.compile(rf"(?:(.*)/)?{ROOT}/{SPACE_NAME.pattern}/[^/]+")
_MOST = 5


def where_nothing_is(store: Inspection) -> str:
    """What stands behind "nothing is stored" of an empty store: its URL, and of other places in that bucket some that
    have one, as far as one request tells them. Empty for a folder, of which everybody sees what it holds."""
    if store._copy is None:
        return ""
    from actcache.store.object_backend import ObjectBackend

    backend, location = store._copy.backend, str(store.location)
    found = stores_among(backend._first_keys()) if isinstance(backend, ObjectBackend) else []
    if not found:
        return f" at {location}"
    bucket = "/".join(location.split("/")[:3])
    # What is spelled nearly so comes first.
    urls = [f"{bucket}/{prefix}" if prefix else bucket for prefix in found]
    urls = list(dict.fromkeys([*nearest(location, urls), *urls]))[:_MOST]
    return f" at {location}; in that bucket there is something at {', '.join(urls)}"


def stores_among(keys: Iterable[str]) -> list[str]:
    """The prefixes, "" among them, below which some of these `keys` of a bucket are objects of a store."""
    found = (match for key in keys if (match := _IN_A_STORE.fullmatch(key)))
    return list(dict.fromkeys(match[1] or "" for match in found))

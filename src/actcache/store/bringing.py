"""Rows of several segments that are not here yet, brought together: into the mirrors, or to whoever reads them now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from actcache.store import behind
from actcache.store.checks import BlockChecks
from actcache.store.fetching import fetch
from actcache.store.keys import Ints
from actcache.store.receiving import Received, Taker
from actcache.store.wanted import Wanted

# Less than that is written to its mirror before a thread has begun to.
_LEAST_BEHIND = 1 << 20


def fetch_together(wanted: Iterable[tuple[BlockChecks, Sequence[str], Ints, Ints]]) -> None:
    """Fetch what of these rows of several segments is not here yet, all at the same time.

    Each is given by its checks, sites, and the rows ``starts[i]:stops[i]``. Raises as `fetch`.
    """
    absent = [checks.absent(sites, starts, stops) for checks, sites, starts, stops in wanted]
    fetch([one for one in absent if one is not None])


def receive_together(
    wanted: Iterable[tuple[BlockChecks, Sequence[str], Ints, Ints]],
    targets: Callable[[], Mapping[BlockChecks, Taker]] = dict,
) -> dict[BlockChecks, Received]:
    """`fetch_together` for whoever reads these rows now: of some segments all of them, which may be in no file yet.

    They are written to the mirrors behind it. Of segments that are not named all is in the file. `targets`: of
    some, where all that is wanted goes as soon as it has come.
    """
    wanted = list(wanted)
    while True:
        found = [(checks, *checks.missing(sites, starts, stops)) for checks, sites, starts, stops in wanted]
        absent = [one for _, one, _ in found if one is not None]
        if not absent:
            return {}
        flights, blocks = absent[0].fetcher.threads.flights, [(one.fetcher.name, one) for one in absent]
        if flights.begin(blocks):
            break
    try:
        return _received(found, absent, targets)
    finally:
        flights.end(blocks)


def _received(
    found: Sequence[tuple[BlockChecks, Wanted | None, bool]],
    absent: Sequence[Wanted],
    targets: Callable[[], Mapping[BlockChecks, Taker]],
) -> dict[BlockChecks, Received]:
    # Of each segment all that is wanted or nothing: some of it may be wanted apart from the rest.
    partly = {checks for checks, _, alone in found if not alone}
    whole = [checks for checks, one, _ in found if one is not None and checks not in partly]
    received: dict[BlockChecks, Received] = {}
    size = sum(one.nbytes for one in absent)
    if whole and size >= _LEAST_BEHIND and behind.has_room(size):
        received = {checks: Received() for checks in whole}
    expected = dict.fromkeys(received, 0)
    for checks, one, _ in found:
        if one is not None and checks in received:
            one.into = received[checks]
            expected[checks] += one.nbytes

    def meanwhile() -> None:
        wanted = targets() if received else {}
        for checks, mine in received.items():
            mine.targets = wanted.get(checks)

    fetch(absent, meanwhile=meanwhile)
    # What is wrong in the object is not there: whoever asks the file for it is told so.
    return {checks: mine for checks, mine in received.items() if mine.nbytes == expected[checks]}

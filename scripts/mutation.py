"""What `scripts/mutate.py` breaks: one line of the package."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, which stands once in `file` (below ``src/actcache``), becomes `new`; `tests` are those that must fail."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

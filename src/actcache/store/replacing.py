"""Segments and tombs in place of others, whether they lie on this host alone or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.store.files import remove
from actcache.store.locks import claim
from actcache.store.mirror import is_mirror
from actcache.store.spool import PATIENCE_S, at_once
from actcache.store.tombs import Keys, write_tomb

if TYPE_CHECKING:
    from actcache.store.working_copy import WorkingCopy


class Replacing:
    """Segments that are to be replaced by others made of them, to oneself while the block runs.

    `copy`: the working copy that they are in; None for a store on files, of which each is removed by `remove`.
    """

    def __init__(self, copy: WorkingCopy | None, paths: Sequence[Path], remove: Callable[[Path], int]) -> None:
        self._spool = None if copy is None else copy.spool
        self._paths, self._remove = paths, remove
        self._claims = contextlib.ExitStack()
        self.publish: Callable[[Path, Path], None] | None = None
        """What puts a segment that is made of them before it gets its name: where others may know them."""

    def __enter__(self) -> Replacing:
        if self._spool is not None:
            try:
                for path in self._paths:
                    if not is_mirror(path) and not self._claims.enter_context(claim(path, PATIENCE_S)):
                        self._spool.check_not_busy(path)
            except BaseException:
                self._claims.close()
                raise
            # From here on nobody begins to upload one of them.
            if not all(map(self._spool.is_here_alone, self._paths)):
                self.publish = self._spool.put_as
        return self

    def __exit__(self, *_: object) -> None:
        self._claims.close()

    def are_there(self) -> bool:
        """Whether nobody has removed one of them."""
        if self._spool is None or self.publish is None:
            return all(path.exists() for path in self._paths)
        return self._spool.are_there(self._paths)

    def remove(self) -> None:
        """Remove them."""
        if self._spool is None:
            for path in self._paths:
                self._remove(path)
        else:
            at_once(self._spool.remove_claimed, self._paths, 1 if self.publish is None else self._spool.concurrency)


def discard(copy: WorkingCopy | None, path: Path) -> int:
    """Remove a file of ours, and its object first where it may have one; the bytes it had, 0 where it was gone."""
    return remove(path) if copy is None else copy.spool.remove(path)


def bury(copy: WorkingCopy | None, folder: Path, dead_of: Sequence[tuple[str, Keys]]) -> None:
    """Declare the prompts with these token keys gone from the segments named: everywhere, when this returns.

    Where it raises, it holds on this host.
    """
    written = dict(write_tomb(folder, segment, keys) for segment, keys in dead_of)
    if copy is not None:
        spool = copy.spool
        # Not what lies there by now: another process that has merged its segment since removes a tomb that is not
        # listed yet. But another host may have read the segment before, and need the tomb for what it makes of it.
        at_once(lambda path: spool.publish(path, written[path]), list(written), spool.concurrency)

"""The tombs of one space: which prompts of which segments are gone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actcache.errors import FormatError, NewerFormatError
from actcache.store.files import ELSEWHERE, TRANSIENT, log, named
from actcache.store.keys import Mask
from actcache.store.records import SegmentInfo
from actcache.store.tombs import Keys, is_member, read_tomb

if TYPE_CHECKING:
    from actcache.store.working_copy import WorkingCopy


class Graves:
    """Kept in step with the folder by `update`. Whoever uses it holds the index's lock."""

    def __init__(self, folder: Path, copy: WorkingCopy | None = None) -> None:
        self.folder, self.copy = folder, copy
        self._tombs: dict[str, dict[str, Keys | None]] = {}
        """By segment; None for what cannot be read."""

    @property
    def names(self) -> set[str]:
        """The names of all tombs."""
        return {tomb for held in self._tombs.values() for tomb in held}

    def read(self, names: set[str]) -> dict[str, Keys | None]:
        """What these tombs say, for `update`; without those that are not there any more."""
        found: dict[str, Keys | None] = {}
        for tomb in names:
            try:
                found[tomb] = self._read(self.folder / tomb)
            except FileNotFoundError:
                continue
            except ELSEWHERE:
                raise
            except (FormatError, OSError) as error:
                if isinstance(error, OSError) and error.errno in TRANSIENT:
                    raise
                log.warning(
                    "a tomb cannot be read, so all of its segment counts as gone: %s", named(self.folder / tomb, error)
                )
                found[tomb] = None
        return found

    def _read(self, path: Path) -> Keys:
        try:
            return read_tomb(path)
        except NewerFormatError:
            raise
        except FormatError:
            # What is wrong here may be right where it comes from.
            if self.copy is None or not self.copy.renew_small(path):
                raise
            return read_tomb(path)

    def update(self, new: dict[str, Keys | None], gone: set[str]) -> set[str]:
        """Take in `new` tombs, forget those `gone`; the segments that they name."""
        for tomb in gone:
            self._tombs[tomb[:32]].pop(tomb, None)
        for tomb, keys in new.items():
            self._tombs.setdefault(tomb[:32], {})[tomb] = keys
        return {t[:32] for t in new.keys() | gone}

    def of(self, info: SegmentInfo) -> dict[str, Keys | None]:
        """Tombs that count for a segment: its own, and later ones of the segments merged into it.

        The keys of one that cannot be read are None.
        """
        found = dict(self._tombs.get(info.name, {}))
        for source, applied in info.replaces.items():
            found.update({t: k for t, k in self._tombs.get(source, {}).items() if t not in applied})
        return found

    def own(self, info: SegmentInfo) -> dict[str, Keys | None]:
        """Tombs of the very segment."""
        return self._tombs.get(info.name, {})


def dead(info: SegmentInfo, tombs: dict[str, Keys | None]) -> Mask:
    """Which prompts of a segment `tombs` name."""
    found = np.zeros(info.prompts, bool)
    for keys in tombs.values():
        found |= True if keys is None else is_member(info.prompt_key, keys)
    return found

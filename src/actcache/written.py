"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when the block ends well. Until then what is there stays as
    it is; a link stays one, and leads to the new file. Of a device, which has nothing to be kept, it is the name."""
    target = Path(os.path.realpath(path))
    if is_device(target):
        yield target
        return
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    # Some libraries make files that only their owner may read.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def is_device(path: Path) -> bool:
    """Whether it is a terminal, a pipe or the like, which is written to as it stands."""
    return path.exists() and not path.is_file() and not path.is_dir()

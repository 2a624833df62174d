"""Files that verbs write: looked at before any work is done, and put in place whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import click

from actcache.written import in_place_of, is_device


def file_to_write(option: str, value: str) -> Path:
    """The file that `option` names. UsageError where none can be written there, so that nothing is computed for it."""
    path = Path(value).expanduser()
    if path.is_dir():
        raise click.UsageError(f"{option} {value} is a folder: name a file to write.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise click.UsageError(f"{option} {value}: there is no folder {Path(value).parent}.")
    if not is_device(path) and not os.access(folder, os.W_OK | os.X_OK):
        raise click.UsageError(f"{option} {value}: {folder} may not be written to. Name another folder.")
    return path


@contextlib.contextmanager
def replaced(option: str, path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path`, the value of `option`, when the block ends well. Until then
    what is there stays as it is."""
    from safetensors import SafetensorError

    try:
        with in_place_of(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error)
        raise click.ClickException(
            f"{option} {path} cannot be written ({reason}): name another place, or make room. It is as it was."
        ) from None

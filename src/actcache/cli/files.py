"""Files that verbs write: looked at before any work is done, and put in place whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import click


def file_to_write(option: str, value: str) -> Path:
    """The file that `option` names. UsageError where none can be written there, so that nothing is computed for it."""
    path = Path(value).expanduser()
    if path.is_dir():
        raise click.UsageError(f"{option} {value} is a folder: name a file to write.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise click.UsageError(f"{option} {value}: there is no folder {Path(value).parent}.")
    if not _is_device(path) and not os.access(folder, os.W_OK | os.X_OK):
        raise click.UsageError(f"{option} {value}: {folder} may not be written to. Name another folder.")
    return path


@contextlib.contextmanager
def replaced(option: str, path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path`, the value of `option`, when the block ends well. Until then
    what is there stays as it is."""
    from safetensors import SafetensorError

    # A link stays one, and leads to the new file.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        if _is_device(target):
            # Nothing of it is there to be kept, and no file may take its place.
            yield target
            return
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error)
        raise click.ClickException(
            f"{option} {path} cannot be written ({reason}): name another place, or make room. It is as it was."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """Whether it is a terminal, a pipe or the like, which is written to as it stands."""
    return path.exists() and not path.is_file()

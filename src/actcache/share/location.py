"""What the name of a dataset means: a folder of this machine, or a repository of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from actcache.errors import OptionError

_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")


def local_folder(dataset: str | os.PathLike[str]) -> Path | None:
    """The absolute folder that `dataset` names, which need not exist; None for a repository of the Hub.

    A folder is a `pathlib.Path`, or a string that starts with ".", "/", "~" or "file://"; "org/name" is always the Hub.

    Raises `OptionError` for what is neither.
    """
    if isinstance(dataset, str) and dataset.startswith("file://"):
        parts = urlsplit(dataset)
        if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
            raise OptionError(f"{dataset!r} is no folder of this machine: expected file:///absolute/path.")
        return Path(unquote(parts.path)).absolute()
    if isinstance(dataset, str) and not dataset.startswith((".", "/", "~")):
        check_repo_id(dataset)
        return None
    if not isinstance(dataset, (str, os.PathLike)):
        raise OptionError(f"dataset is {dataset!r:.80}: expected 'org/name' on the Hub, or a folder.")
    folder = Path(dataset)
    try:
        return folder.expanduser().absolute()
    except RuntimeError:
        raise OptionError(f"{str(dataset)!r} names no folder: that user has no home folder known here.") from None


def folder_exists(folder: Path) -> bool:
    """Whether anything is there: an absent or empty folder does not count as existing."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def check_repo_id(name: str) -> str:
    """`name` where it can be that of a repository; `OptionError` otherwise."""
    if name and "/" not in name and ":" not in name:
        # The Hub would give it to the user of the token, where a folder may have been meant: public, and at once.
        raise OptionError(f'{name!r} is neither a repository ("org/name") nor a folder ("./{name}").')
    if not _REPO_ID.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        hint = f" A folder is written ./{name}" if re.fullmatch(r"[^:?#]+", name) and name else ""
        raise OptionError(
            f"{name!r} is no repository of the Hub: expected 'org/name' of letters, digits, '-', '_' and '.'.{hint}"
        )
    return name

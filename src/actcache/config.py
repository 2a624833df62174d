"""Environment variables and process-wide defaults, in one place.

``ACTCACHE_BACKEND`` (path) > ``ACTCACHE_DIR`` (path) > the user's cache folder; a call wins over all.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from actcache.errors import OptionError

# One slash is enough: a Path made from a URL has lost the other. One letter would be a drive.
_URL = re.compile(r"[A-Za-z][\w+.-]+:/")


def user_cache() -> Path:
    """This user's cache folder for actcache (what may be deleted at any time lives here too)."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("actcache", appauthor=False))


def default_store_path() -> Path:
    """Where the default store lives when no call has chosen one."""
    for variable in ("ACTCACHE_BACKEND", "ACTCACHE_DIR"):
        value = os.environ.get(variable)
        if value:
            return local_folder(value, variable)
    return user_cache() / "store"


def local_folder(value: str | Path, source: str) -> Path:
    """`value` as a folder of this machine; `source` (a variable, an option) is named when it cannot be one."""
    text = str(value)
    if _URL.match(text):
        raise OptionError(f"{source} is {text!r}: object stores are not supported yet, name a folder of this machine.")
    if not text.strip():
        raise OptionError(f"{source} is empty: name a folder.")
    return Path(value).expanduser()


def host_state_path() -> Path:
    """This host's disposable state: store indexes and digests of weight files."""
    return user_cache()

"""Environment variables and process-wide defaults, in one place.

``ACTCACHE_BACKEND`` (path) > ``ACTCACHE_DIR`` (path) > the user's cache folder; a call wins over all.
"""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """This user's cache folder for actcache (what may be deleted at any time lives here too)."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("actcache", appauthor=False))


def default_store_path() -> Path:
    """Where the default store lives when no call has chosen one."""
    for variable in ("ACTCACHE_BACKEND", "ACTCACHE_DIR"):
        value = os.environ.get(variable)
        if value:
            return Path(value).expanduser()
    return user_cache() / "store"


def host_state_path() -> Path:
    """This host's disposable state: store indexes and digests of weight files."""
    return user_cache()

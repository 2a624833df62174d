"""Environment variables and process-wide defaults, in one place.

What a store was made with wins over what the process has chosen by a call, that over the environment, and that over
the default. Limit and dtype of the process are those of the default store alone. `ACTCACHE_BACKEND` (a path) wins over
`ACTCACHE_DIR` (a path).
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.errors import OptionError, require_choice

STORAGE_DTYPES = ("float16", "bfloat16", "float32", "int8", "float8_e4m3")
GB = 2**30
DEADLINE_S = 120.0

# One slash is enough: a Path made from a URL has lost the other. One letter would be a drive.
_URL = re.compile(r"[A-Za-z][\w+.-]+:/")
_LOCATIONS = ("ACTCACHE_BACKEND", "ACTCACHE_DIR")
_LOCAL_GB = 20
_SWEEP_GB = 1
_REMOTE_TIMEOUT_S = 1800.0
_LEVELS = ("debug", "info", "warning", "error", "critical")
_chosen: dict[str, Any] = {}


@dataclass(frozen=True)
class Setting:
    """A value in force, and where it comes from: a call, a variable, or "default"."""

    value: Any
    source: str


def _from_variable(variable: str, read: Callable[[str, str], Any], otherwise: Any) -> Setting:
    """What the environment says, as ``read(value, variable)`` gives it; `otherwise` where it says nothing."""
    value = os.environ.get(variable)
    return Setting(read(value, variable), variable) if value else Setting(otherwise, "default")


def _number(value: Any) -> float:
    """`value` as a number; not a number where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def user_cache() -> Path:
    """This user's cache folder for actcache (what may be deleted at any time lives here too)."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("actcache", appauthor=False))


def host_state_path() -> Path:
    """This host's disposable state: store indexes and digests of weight files."""
    return user_cache()


def store_location() -> Setting:
    """Where the default store lives when no call has chosen one: a `Path`, or a URL as it was written."""
    for variable in _LOCATIONS:
        value = os.environ.get(variable)
        if value:
            may_be_url = variable == "ACTCACHE_BACKEND" and is_url(value)
            return Setting(value if may_be_url else local_folder(value, variable), variable)
    return Setting(user_cache() / "store", "default")


def overruled_location() -> str:
    """What is to be said where two variables name the default store and differ; empty where they do not."""
    winner, loser = (os.environ.get(variable) for variable in _LOCATIONS)
    if not winner or not loser or os.path.realpath(winner) == os.path.realpath(loser):
        return ""
    first, second = _LOCATIONS
    return (
        f"{first} ({winner}) wins over {second} ({loser}): it chooses a kind of store as well as its place. Unset "
        f"{first} to use {second}."
    )


def is_url(value: Any) -> bool:
    """Whether `value` names something that is no folder of this machine: ``s3://...``, or a Path made from that."""
    return bool(_URL.match(str(value)))


def local_folder(value: str | Path, source: str) -> Path:
    """`value` as an absolute path; `source` (a variable, an option) is named when it cannot be a folder here."""
    text = str(value)
    if _URL.match(text):
        raise OptionError(
            f"{source} is a URL, where a folder of this machine is expected: ACTCACHE_BACKEND, set_cache_backend() and "
            "store= take URLs."
        )
    if not text.strip():
        raise OptionError(f"{source} is empty: name a folder.")
    folder = Path(value).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{source} is {text!r}, and that is a file: name a folder, which need not exist yet.")
    return folder


def limit_bytes(gb: Any, source: str) -> int | None:
    """A limit in GB (2**30 bytes) as bytes; None and infinity mean no limit. `source` is named when it is wrong."""
    if gb is None:
        return None
    number = _number(gb)
    if isinstance(gb, bool) or not number >= 0:
        raise OptionError(
            f"{source} is {gb!r}: expected a number of GB that is not negative (0: keep nothing), such as 50 or 0.5."
        )
    return None if math.isinf(number) else int(number * GB)


def object_deadline_s() -> float:
    """For how many seconds an operation on an object store goes on failing before that is an error."""
    value = os.environ.get("ACTCACHE_DEADLINE_S")
    if not value:
        return DEADLINE_S
    seconds = _number(value)
    if not 0 < seconds < math.inf:
        raise OptionError(f"ACTCACHE_DEADLINE_S is {value!r}: expected a number of seconds above 0, such as 120.")
    return seconds


def local_limit(gb: float | None = None) -> Setting:
    """How many bytes of what lies elsewhere this host keeps when it was read (None: no limit): `gb`, where given."""
    if gb is not None:
        return Setting(limit_bytes(gb, "local_gb"), "Store()")
    return _from_variable("ACTCACHE_LOCAL_GB", limit_bytes, limit_bytes(_LOCAL_GB, "default"))


def sweep_bytes() -> Setting:
    """How many bytes the batches may take that run together through a model with offloaded weights: their hidden states
    on the device, and the rows that are kept of them."""
    setting = _from_variable("ACTCACHE_SWEEP_GB", limit_bytes, _SWEEP_GB * GB)
    return Setting(math.inf, setting.source) if setting.value is None else setting


def remote_patience() -> Setting:
    """For how many seconds a server may say nothing of a job that it has accepted."""
    return _from_variable("ACTCACHE_REMOTE_TIMEOUT", _patience, _REMOTE_TIMEOUT_S)


def _patience(value: str, source: str) -> float:
    seconds = _number(value)
    if not seconds > 0:
        raise OptionError(f"{source} is {value!r}: expected seconds, more than 0, such as 600; inf waits without end.")
    return seconds


def cache_limit() -> Setting:
    """The size limit of the default store where it has none of its own, in bytes; None where there is none."""
    if "limit" in _chosen:
        return Setting(_chosen["limit"], "set_cache_limit()")
    return _from_variable("ACTCACHE_MAX_GB", limit_bytes, None)


def set_cache_limit(gb: float | None = None) -> None:
    """Set the size that the default store should keep to, in GB (2**30 bytes); other stores have their own limit.

    None: no limit. 0: work without storing. The limit is enforced when a run has stored something, and by `evict`; a
    request that is larger is still answered in full.

    Raises:
        OptionError: not a number, or a negative one.
    """
    _chosen["limit"] = limit_bytes(gb, "gb")


def cache_dtype() -> Setting:
    """The dtype in which the default store keeps new vectors, where it has none of its own; None: as computed."""
    if "dtype" in _chosen:
        return Setting(_chosen["dtype"], "set_cache_dtype()")
    return _from_variable(
        "ACTCACHE_DTYPE", lambda value, source: require_choice(value, STORAGE_DTYPES, f"dtype in {source}"), None
    )


def set_cache_dtype(dtype: str | None = None) -> None:
    """Set the dtype in which the default store keeps new vectors; None: as computed. Other stores have their own.

    Raises:
        OptionError: not one of `STORAGE_DTYPES`.
    """
    _chosen["dtype"] = None if dtype is None else require_choice(dtype, STORAGE_DTYPES, "dtype")


def log_level() -> Setting:
    """The level at which the package's log is shown; None where nothing but warnings is, in Python's own way."""
    if "log" in _chosen:
        return Setting(_chosen["log"], "enable_cache_logging()")
    return _from_variable("ACTCACHE_LOG", _level, None)


def _level(level: Any, source: str) -> int:
    text = str(level).strip().lower()
    if text in _LEVELS:
        return int(getattr(logging, text.upper()))
    if isinstance(level, bool) or not text.isascii() or not text.isdigit():
        raise OptionError(f"{source} is {level!r}: expected one of {', '.join(_LEVELS)}, or a number.")
    return int(text)


def enable_cache_logging(level: int | str = logging.INFO) -> None:
    """Show on standard error what actcache finds, stores, merges and evicts.

    `level`: of `logging`, or its name. The logger is called "actcache"; a second call only changes the level.

    Raises:
        OptionError: no such level.
    """
    _chosen["log"] = _level(level, "level")
    _show_log(_chosen["log"])


def heed_log_variable() -> None:
    """Do what ``ACTCACHE_LOG`` asks, unless a call has asked for something."""
    setting = log_level()
    if setting.source == "ACTCACHE_LOG":
        _show_log(setting.value)


def _show_log(level: int) -> None:
    logger = logging.getLogger("actcache")
    logger.setLevel(level)
    if not any(isinstance(handler, _OnStandardError) for handler in logger.handlers):
        handler = _OnStandardError()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)


class _OnStandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is standard error at that moment, which programs replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        import sys

        return sys.stderr

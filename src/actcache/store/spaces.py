"""A space: the folder of one model identity, and its space.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache.errors import FormatError
from actcache.store.files import SPACE_NAME, atomic_file, log, write_all

ROOT = "v1"
FILE = "space.json"
FORMAT = "actcache-space"


@dataclass(frozen=True)
class SpaceInfo:
    """One model identity in a store. `identity` decides what is the same; `label` is for people."""

    space: str
    identity: Mapping[str, Any]
    label: Mapping[str, Any]
    num_prompts: int = 0
    size_bytes: int = 0
    created_ns: int = field(default=0, repr=False)

    @property
    def model_name(self) -> str:
        return str(self.label.get("model_name") or self.identity.get("model_name") or "")

    @property
    def revision(self) -> str | None:
        return _text(self.label.get("revision", self.identity.get("revision")))

    @property
    def dtype(self) -> str | None:
        """The dtype the model computed in."""
        return _text(self.label.get("dtype", self.identity.get("dtype")))


def new_space(model_name: str, **identity: Any) -> SpaceInfo:
    """A space for activations that come from outside: `model_name` and whatever else makes them what they are.

    Pass it to `Store.write`; the same arguments name the same space again.
    """
    full = {"model_name": model_name, "source": "external", **identity}
    label: dict[str, Any] = {k: full[k] for k in ("model_name", "revision", "dtype") if k in full}
    return SpaceInfo(space_id(full), full, label)


def space_id(identity: Mapping[str, Any]) -> str:
    """32 hexadecimal digits: the digest of the identity's canonical JSON."""
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()[:32]


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_space(root: Path, info: SpaceInfo) -> None:
    """Write ``<root>/<space>/space.json`` unless it is there."""
    folder = root / info.space
    if (folder / FILE).exists():
        return
    document = {
        "space": info.space, "created_ns": time.time_ns(), "label": dict(info.label), "identity": dict(info.identity),
    }  # fmt: skip
    # Like every file of ours it begins with the format, which is what clearing and sweeping look for.
    start = json.dumps({"__metadata__": {"format": FORMAT, "version": "1.0"}}, separators=(",", ":"))
    rest = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    text = f"{start[:-1]},{rest[1:]}"
    data = text.encode("utf-8", "surrogatepass")
    with atomic_file(folder, FILE, needed=len(data)) as fd:
        write_all(fd, [data], 0)


def read_space(folder: Path) -> SpaceInfo:
    """What ``folder/space.json`` says. FormatError when it is not ours or does not fit its folder."""
    try:
        document = json.loads(_content(folder / FILE).decode("utf-8", "surrogatepass"))
        if document["__metadata__"]["format"] != FORMAT:
            raise KeyError("format")
        info = SpaceInfo(
            document["space"], document["identity"], document["label"], created_ns=int(document["created_ns"])
        )
        fits = info.space == folder.name and space_id(info.identity) == info.space and info.model_name is not None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{folder / FILE} is not a description of a space: {error}") from None
    if not fits:
        raise FormatError(f"{folder / FILE} does not describe the folder it is in")
    return info


def list_spaces(root: Path) -> list[SpaceInfo]:
    """Every space below `root`, oldest first; unreadable ones are logged and left out."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder in root.iterdir():
            if SPACE_NAME.fullmatch(folder.name) and folder.is_dir():
                try:
                    found.append(read_space(folder))
                except FileNotFoundError:
                    continue
                except (FormatError, OSError) as error:
                    log.warning("ignoring a space: %s", error)
    return sorted(found, key=lambda s: (s.created_ns, s.space))


def _content(path: Path) -> bytes:
    # A pipe of this name would make a plain open wait for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not an ordinary file")
        return file.read()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)

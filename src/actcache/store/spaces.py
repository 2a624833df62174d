"""A space: the folder of one model identity, and its space.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import FormatError, NewerFormatError
from actcache.store.files import (
    OPEN_NAME,
    SEGMENT_NAME,
    SPACE_FILE,
    SPACE_NAME,
    atomic_file,
    is_ours,
    log,
    open_plain,
    remove,
    write_all,
)
from actcache.store.mapping import Segment
from actcache.store.records import VERSION, check_version

if TYPE_CHECKING:
    from actcache.store.working_copy import WorkingCopy

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
        """What its model is called."""
        return str(self.label.get("model_name") or self.identity.get("model_name") or "")

    @property
    def revision(self) -> str | None:
        """The commit of its model on the Hub; None for a folder, and where it is not known."""
        return _text(self.label.get("revision", self.identity.get("revision")))

    @property
    def dtype(self) -> str | None:
        """The dtype the model computed in."""
        return _text(self.label.get("dtype", self.identity.get("dtype")))

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation the model ran with; None where it is not known."""
        return _text(self.identity.get("attn_implementation"))

    @property
    def edits(self) -> list[Mapping[str, Any]]:
        """The ready-made edits the model was run with, as their identities; none for the model as it is."""
        found = self.identity.get("edits")
        return [e for e in found if isinstance(e, Mapping)] if isinstance(found, list) else []

    @property
    def imported(self) -> str | None:
        """Where it was imported from, when all that is known of the model is a name."""
        return _text(self.identity.get("imported"))

    @property
    def pulled(self) -> str | None:
        """The dataset that it was pulled from, as "org/name@commit" (of a folder the digest of its files)."""
        found = self.identity.get("pulled")
        return f"{found.get('dataset')}@{found.get('commit')}" if isinstance(found, Mapping) else None


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
    start = json.dumps({"__metadata__": {"format": FORMAT, "version": VERSION}}, separators=(",", ":"))
    rest = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    text = f"{start[:-1]},{rest[1:]}"
    data = text.encode("utf-8", "surrogatepass")
    with atomic_file(folder, FILE, needed=len(data)) as fd:
        write_all(fd, [data], 0)


def drop_if_empty(folder: Path, copy: WorkingCopy | None = None) -> None:
    """Remove the description and the folder of a space that holds no segment; whoever writes to it describes it again.

    `copy`: the working copy that the folder is part of, where the objects lie elsewhere. Raises OSError where files may
    not be removed.
    """
    path = folder / FILE
    if holds_segments(folder):
        return
    described = b""
    if is_ours(path, SPACE_FILE):
        with contextlib.suppress(FileNotFoundError):
            described = _content(path)
        if copy is None:
            remove(path)
        else:
            copy.spool.remove(path)
    try:
        folder.rmdir()
    except OSError:
        # Whoever stored something since the look above may have seen the description, and written none.
        if described and holds_segments(folder) and not path.exists():
            with atomic_file(folder, FILE, needed=len(described)) as fd:
                write_all(fd, [described], 0)


def holds_segments(folder: Path) -> bool:
    """Whether there is a segment in the folder of a space, or one that grows."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(folder)
        return any(is_ours(folder / name, pattern) for name in names for pattern in (SEGMENT_NAME, OPEN_NAME))
    return False


def read_space(folder: Path) -> SpaceInfo:
    """What ``folder/space.json`` says. FormatError when it is not ours or does not fit its folder."""
    try:
        document = json.loads(_content(folder / FILE).decode("utf-8", "surrogatepass"))
        if document["__metadata__"]["format"] != FORMAT:
            raise KeyError("format")
        check_version(str(document["__metadata__"]["version"]))
        info = SpaceInfo(
            document["space"], document["identity"], document["label"], created_ns=int(document["created_ns"])
        )
        fits = info.space == folder.name and space_id(info.identity) == info.space and info.model_name is not None
    except NewerFormatError as error:
        raise NewerFormatError(f"{folder / FILE}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{folder / FILE} is not a description of a space: {error}") from None
    if not fits:
        raise FormatError(f"{folder / FILE} does not describe the folder it is in")
    return info


def description_of(folder: Path) -> str | None:
    """The space of a folder as its segments say it in their metadata; None while the folder says nothing of it."""
    try:
        info = read_space(folder)
    except (FormatError, OSError):
        return None
    # Without characters beyond ASCII: a name may hold what no header can.
    return json.dumps({"identity": dict(info.identity), "label": dict(info.label)}, separators=(",", ":"))


def described_by(segment: Segment) -> SpaceInfo | None:
    """The space that a segment says it is of; None where it says nothing that fits."""
    try:
        found = json.loads(segment.metadata["description"])
        identity, label = dict(found["identity"]), dict(found["label"])
        if space_id(identity) != segment.info.space:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return SpaceInfo(segment.info.space, identity, label, created_ns=segment.info.created_ns)


def recovered_space(folder: Path) -> SpaceInfo | None:
    """What the segments of a folder say of their space, where ``space.json`` cannot; None when none of them does."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(name for name in os.listdir(folder) if SEGMENT_NAME.fullmatch(name)):
            with contextlib.suppress(FormatError, OSError):
                segment = Segment(folder / name)
                if segment.info.space == folder.name and (info := described_by(segment)) is not None:
                    return info
    return None


def list_spaces(root: Path) -> list[SpaceInfo]:
    """Every space below `root`, oldest first; those of which nothing is known are logged and left out."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder in root.iterdir():
            if SPACE_NAME.fullmatch(folder.name) and folder.is_dir():
                try:
                    found.append(read_space(folder))
                except (FormatError, OSError) as error:
                    info = None if isinstance(error, NewerFormatError) else recovered_space(folder)
                    if info is not None:
                        found.append(info)
                    elif not isinstance(error, FileNotFoundError):
                        log.warning("ignoring a space: %s", error)
    return sorted(found, key=lambda s: (s.created_ns, s.space))


def _content(path: Path) -> bytes:
    with os.fdopen(open_plain(path), "rb") as file:
        return file.read()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)

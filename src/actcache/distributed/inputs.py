"""Files that hold prompts, on disks and in datasets of the Hub: which there are, and opening them."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from actcache.errors import MissingFileError, OptionError, PromptError, did_you_mean

FORMATS = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text",
}  # fmt: skip
KINDS = ("parquet", "jsonl", "csv", "tsv", "text")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Input:
    """One file, as it was when the run began.

    Attributes:
        path: absolute, or ``hf://datasets/org/name@commit/path``.
        etag: what changes when its bytes do.
        kind: one of `KINDS`.
        column: the column or field that holds the prompt; None for the usual one.
        token: what the Hub is asked with, as transformers takes it.
        label, metadata: the columns or fields that hold what is stored with each prompt.
        numbers: those of a CSV, which knows no types, that hold whole numbers and nothing else.
    """

    path: str
    size: int
    etag: str
    kind: str
    column: str | None = None
    token: str | bool | None = field(default=None, repr=False, compare=False)
    label: str | None = None
    metadata: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """The columns that are read beside the prompt's, each once."""
        return tuple(dict.fromkeys([*([] if self.label is None else [self.label]), *self.metadata]))

    @property
    def identity(self) -> tuple[str, int, str]:
        """What tells its bytes from those of another: path (on the Hub without the commit), size, etag."""
        repository, commit, inside = self.path.partition("@")
        is_hub = self.path.startswith("hf://") and commit
        return (f"{repository}/{inside.partition('/')[2]}" if is_hub else self.path), self.size, self.etag

    def open(self) -> BinaryIO:
        """The file, to be read.

        Raises:
            PromptError: it is not what it was when the run began.
            MissingFileError: it is gone, or is not on this machine.
        """
        if self.path.startswith("hf://"):
            from actcache.distributed.hub_inputs import open_on_hub

            return open_on_hub(self)
        try:
            file = open(self.path, "rb", buffering=1 << 18)  # noqa: SIM115
        except OSError as error:
            raise MissingFileError(
                f"{self.path} cannot be read on this machine: {error.strerror}. Workers read the input themselves: it "
                "must be at the same path wherever they run."
            ) from None
        status = os.fstat(file.fileno())
        if (status.st_size, _etag(status)) != (self.size, self.etag):
            file.close()
            raise PromptError(f"{self.path} has changed since this run began: run again.")
        return file


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}"


def find_inputs(
    source: Source,
    *,
    column: str | None = None,
    kind: str | None = None,
    token: str | bool | None = None,
    label: str | None = None,
    metadata: Sequence[str] = (),
) -> list[Input]:
    """The files of `source`: a file, a folder (all files below it that may hold prompts), a pattern, any of these of a
    dataset of the Hub (``hf://datasets/org/name[@revision][/path]``), or several of them. Those of folders and patterns
    come sorted by name.

    Raises:
        MissingFileError, DatasetNotFoundError, DatasetAccessError: nothing is there, or it cannot be reached.
        OptionError: something else than places of files; a file of a form that is not read.
    """
    given: list[str | Path] = [source] if isinstance(source, str | Path) else list(source)
    if not given:
        raise OptionError("source names no file: expected files with prompts, a folder, or hf://datasets/org/name.")
    found: list[Input] = []
    for place in given:
        if not isinstance(place, str | Path):
            raise OptionError(
                f"source holds a {type(place).__name__}: expected places of files with prompts. Prompts in memory are "
                "for UnifiedCache.warmup; for several processes write them to a JSONL or Parquet file."
            )
        if str(place).startswith("hf://"):
            from actcache.distributed.hub_inputs import find_on_hub

            found += find_on_hub(str(place), column, kind, token)
        else:
            found += [_local(path, column, kind) for path in _paths(place)]
    for one in found if label is not None or metadata else ():
        if one.kind == "text":
            names = ", ".join(dict.fromkeys([*([label] if label is not None else []), *metadata]))
            raise OptionError(f"{names}: {one.path} is read as text, which has no columns.")
    return [replace(one, label=label, metadata=tuple(metadata)) for one in dict.fromkeys(found)]


def _paths(place: str | Path) -> list[str]:
    text = os.fspath(place)
    if "://" in text:
        raise OptionError(f"source {text!r}: prompts are read from files and from hf://datasets/org/name.")
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        below = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        paths = chosen(below, path)
        if not paths:
            raise MissingFileError(f"{path} holds no file that ends in {', '.join(FORMATS)}.")
        return paths
    if os.path.isfile(path):
        return [path]
    paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
    if not paths:
        parent = os.path.dirname(path)
        near = did_you_mean(os.path.basename(path), os.listdir(parent) if os.path.isdir(parent) else ())
        raise MissingFileError(
            f"no file {path!r}.{near} source names files with prompts. Prompts in memory are for UnifiedCache.warmup; "
            "for several processes write them to a JSONL or Parquet file."
        )
    return paths


def chosen(paths: Sequence[str], folder: str) -> list[str]:
    """Of all that is below a folder: what may hold prompts by its name, and is not hidden, sorted."""
    return sorted(
        path
        for path in paths
        if Path(path).suffix.lower() in FORMATS
        and not any(part.startswith((".", "_")) for part in Path(path[len(folder) :].lstrip("/")).parts)
    )


def _local(path: str, column: str | None, kind: str | None) -> Input:
    status = os.stat(path)
    return Input(path, status.st_size, _etag(status), kind_of(path, column, kind), column)


def kind_of(path: str, column: str | None, kind: str | None) -> str:
    """What a file holds: as it is told, or by its suffix; text for others.

    Raises `OptionError` for compressed files, for JSON that may be no JSONL, and for a column of a text.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _COMPRESSED:
        raise OptionError(f"{path} is compressed, so that no worker could begin in its middle: unpack it first.")
    if suffix == ".json" and kind is None:
        # As a text its brackets and names would be prompts.
        raise OptionError(
            f"{path} ends in .json: say file_format='jsonl' (--format jsonl) where each line is a prompt."
        )
    found = kind or FORMATS.get(suffix, "text")
    if found == "text" and column is not None:
        raise OptionError(f"column={column!r}: {path} is read as text, which has no columns.")
    return found

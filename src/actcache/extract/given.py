"""Labels and metadata of a warm-up: checked before any work, stored with the vectors of their prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import NotCachedError, OptionError
from actcache.store import given
from actcache.store.prompts import PromptTable
from actcache.store.pulled import registered
from actcache.store.records import LABEL, METADATA

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.extract.request import Request
    from actcache.extract.results import ResultWriter
    from actcache.store.store import Store
    from actcache.store.writer import Ticket

Said = dict[str, list[bytes]]
"""For `LABEL`, `METADATA` or both what is said of each prompt, as `given.encoded` writes it."""
NOTHING_SAID: Said = {}


def checked(labels: Any, metadata: Any, count: int) -> Said:
    """`labels` and `metadata` of `count` prompts, where they are not None; `OptionError` for what cannot be kept."""
    said: Said = {}
    if labels is not None:
        said[LABEL] = [given.encoded(plain(v, f"labels[{i}]")) for i, v in enumerate(one_each(labels, "labels", count))]
    if metadata is not None:
        rows = _rows(metadata, count)
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping) or not all(isinstance(key, str) and key for key in row):
                raise OptionError(f"metadata[{i}] is {row!r:.60}: expected a dict with names as keys.")
            if set(row) != set(rows[0]):
                raise OptionError(
                    f"metadata[{i}] has other keys than metadata[0]: {sorted(set(row) ^ set(rows[0]))}. "
                    "Give every prompt the same, None where there is no value."
                )
        said[METADATA] = [
            given.encoded({key: _value(value, f"metadata[{i}][{key!r}]") for key, value in row.items()})
            for i, row in enumerate(rows)
        ]
    return said


def one_each(values: Any, what: str, count: int) -> list[Any]:
    """`values` as a list, one for each of `count` prompts; `OptionError` where they are not, naming `what` they are."""
    # A set has an order of its own.
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not isinstance(values, Iterable):
        raise OptionError(f"{what} is {values!r:.60}: expected a list with one value for each prompt.")
    found = list(values)
    if len(found) != count:
        raise OptionError(f"{what} has {len(found)} values for {count} prompts.")
    return found


def _rows(metadata: Any, count: int) -> list[Any]:
    """Metadata as one dict for each prompt, also where columns were given."""
    if not isinstance(metadata, Mapping):
        return one_each(metadata, "metadata", count)
    columns = {key: one_each(values, f"metadata[{key!r}]", count) for key, values in metadata.items()}
    return [{key: values[i] for key, values in columns.items()} for i in range(count)]


def plain(value: Any, what: str) -> Any:
    """A string, a finite number, a boolean or None, arrays of no dimension among them; `OptionError` for all else."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if value is not None and not isinstance(value, (str, int, float)):
        raise OptionError(f"{what} is {value!r:.60}: expected a string, a number, a boolean or None.")
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{what} is {value!r}: expected a finite number, None where there is none.")
    return value


def _value(value: Any, what: str) -> Any:
    if hasattr(value, "tolist") and getattr(value, "shape", None) != ():
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{what}[{i}]") for i, item in enumerate(value)]
    return plain(value, what)


class Unsaid:
    """What of labels and metadata is not in the store yet, by the prompts' token ids."""

    def __init__(self, store: Store, request: Request, said: Said) -> None:
        """`said`: one value for each prompt of `request`. OptionError where a prompt is said to be two things."""
        table = request.tokens()
        keys = [key.tobytes() for key in table.token_key]
        self._left: dict[str, dict[bytes, bytes]] = {}
        for kind, values in said.items():
            first: dict[bytes, int] = {}
            for i, key in enumerate(keys):
                j = first.setdefault(key, i)
                if values[i] != values[j]:
                    raise OptionError(
                        f"prompts {j} and {i} are the same, and their {'labels' if kind == LABEL else kind} are not: "
                        f"{values[j].decode():.60} and {values[i].decode():.60}. Give each prompt one."
                    )
            known = given.stored(store, request.space, kind, table)
            left = {key: values[i] for key, i in first.items() if values[i] != known[i]}
            if left:
                self._left[kind] = left
        has = np.flatnonzero(request.lookup.found)
        of_stored = [i for i in has.tolist() if any(keys[i] in left for left in self._left.values())]
        self.of_stored = table.select(of_stored)
        """The prompts among them whose vectors are stored."""

    def put(self, writer: ResultWriter, prompts: PromptTable, *, after: Ticket | None = None) -> None:
        """Queue what is said of `prompts`. `after`: the ticket of their vectors."""
        keys = [key.tobytes() for key in prompts.token_key]
        for kind, left in self._left.items():
            # Each once: the same prompt may be there several times.
            members = list({keys[i]: i for i in range(len(keys)) if keys[i] in left}.values())
            if members:
                values = [left[keys[i]] for i in members]
                for records in given.records(kind, prompts.select(members), values):
                    writer.put_records(records, after=after)


def said_of(store: Store, request: Request, kind: str) -> list[Any]:
    """What is stored of `kind` for the prompts of `request`; None for a prompt of which nothing is.

    Of prompts that were pulled, what their dataset says, where nothing was said here.
    """
    table = request.tokens()
    own = given.stored(store, request.space, kind, table)
    said: list[Any] = [None if text is None else json.loads(text) for text in own]
    # Whoever has said here that there is none has said something.
    left = [i for i, text in enumerate(own) if text is None]
    prompts, at = request.prompts, np.array(left, np.intp)
    ids, texts = [table.tokens(i) for i in left], [prompts.texts[i] for i in left]
    asked = PromptTable.build(ids, texts, prompts.kinds[at])
    for pulled in request.lookup.question.pulled() if left else ():
        for known, theirs in registered(store, pulled, (), asked, at):
            for i, value in zip(theirs.tolist(), given.read(store, pulled.info.space, kind, known), strict=True):
                said[i] = value if said[i] is None else said[i]
    return said


def label_array(labels: Sequence[Any]) -> npt.NDArray[Any]:
    """Labels ``[B]``: int64, float64, bool or str where all are of one kind, else objects.

    Raises `NotCachedError` where a prompt has none.
    """
    missing = [i for i, label in enumerate(labels) if label is None]
    if missing:
        raise NotCachedError(
            f"{len(missing)} of {len(labels)} prompts have no label (the first is prompt {missing[0]}): "
            "UnifiedCache.warmup(prompts, labels=...) stores them, get_labels(prompts) gives those there are."
        )
    kinds = {type(label) for label in labels}
    whole = kinds == {int} and all(-(2**63) <= label < 2**63 for label in labels)
    plain = {bool: np.bool_, float: np.float64, str: np.str_} | ({int: np.int64} if whole else {})
    dtype: Any = plain.get(kinds.pop(), object) if len(kinds) == 1 else object
    return np.array(labels, dtype)

"""Labels and metadata as columns of an index: their types are those of the values, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from actcache.errors import OptionError
from actcache.extract.given import one_each, plain

_FIXED = (
    "text", "label", "num_tokens", "shard_index", "row_offset", "token_offset", "token_ids", "token_strings",
    "token_perplexity", "token_shard_ids", "token_shard_offsets", "perplexity_mean", "perplexity_min",
    "perplexity_max", "prompt_kind",
)  # fmt: skip
_PREFIXES = ("shard_index_", "row_offset_", "token_offset_")
_SMALL = 2**31
_LARGE = 2**63


def is_fixed(name: str) -> bool:
    """Whether the format has a column of this name: it is no metadata."""
    return name in _FIXED or name.startswith(_PREFIXES)


class Absent(Sequence[None]):
    """The values of a column that nobody has any for, `count` in number."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> None: ...
    @overload
    def __getitem__(self, at: slice) -> list[None]: ...
    def __getitem__(self, at: int | slice) -> list[None] | None:
        found = range(self._count)[at]
        return None if isinstance(found, int) else [None] * len(found)


@dataclass(frozen=True)
class Column:
    """Values of one column, with the name of their type in Arrow: "int64", "double", "bool", "string", "int32", or
    ``list<...>`` of one of these. None where a prompt has no value."""

    name: str
    type: str
    values: Sequence[Any]

    def select(self, order: Sequence[int]) -> Column:
        """The values at `order`."""
        return Column(self.name, self.type, [self.values[i] for i in order])


def label_column(labels: Any, count: int) -> Column:
    """`labels` of `count` prompts, all integers or all texts (None: no label); True and False are 1 and 0.

    Raises:
        OptionError: not one for each prompt, of both types, or of others.
    """
    values = [_plain(value, f"labels[{i}]") for i, value in enumerate(one_each(labels, "labels", count))]
    for i, value in enumerate(values):
        if isinstance(value, float) or (isinstance(value, int) and not -_LARGE <= value < _LARGE):
            raise OptionError(
                f"labels[{i}] is {value!r}: expected an int of 64 bits, a str, or None. Other numbers are metadata, "
                "where floats stay floats."
            )
    values = [int(value) if isinstance(value, bool) else value for value in values]
    if all(value is None or isinstance(value, int) for value in values):
        small = all(value is None or -_SMALL <= value < _SMALL for value in values)
        return Column("label", "int32" if small else "int64", values)
    texts = [i for i, value in enumerate(values) if isinstance(value, str)]
    number = next((i for i, value in enumerate(values) if isinstance(value, int)), None)
    if number is not None:
        raise OptionError(
            f"labels[{number}] is {values[number]!r}, an int, and labels[{texts[0]}] is {values[texts[0]]!r:.60}, a "
            "str: labels are all of one type. Convert them."
        )
    return Column("label", "string", values)


def metadata_columns(metadata: Any, count: int) -> list[Column]:
    """`metadata` (a dict for each prompt, or a list for each name) as columns, by name.

    Raises:
        OptionError: names that differ or that the format has its own columns under, values of mixed types, values that
            are no strings, numbers, booleans, or lists of these.
    """
    if isinstance(metadata, Mapping):
        by_name = {name: one_each(values, f"metadata[{name!r}]", count) for name, values in metadata.items()}
    else:
        rows = one_each(metadata, "metadata", count)
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise OptionError(f"metadata[{i}] is {row!r:.60}: expected a dict, or a list of values for each name.")
            if set(row) != set(rows[0]):
                raise OptionError(
                    f"metadata[{i}] has other keys than metadata[0]: {sorted(map(str, set(row) ^ set(rows[0])))}. "
                    "Give every prompt the same, None where there is no value."
                )
        by_name = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    for name in by_name:
        if not isinstance(name, str) or not name or not name.isprintable() or len(name) > 200:
            raise OptionError(f"metadata: {name!r:.60} cannot be the name of a column: expected a plain text.")
        if is_fixed(name):
            raise OptionError(f"metadata: the format has a column {name!r} of its own. Call yours another name.")
    return [_column(name, by_name[name]) for name in sorted(by_name)]


def _column(name: str, given: list[Any]) -> Column:
    where = f"metadata[{name!r}]"
    values: list[Any] = []
    for i, value in enumerate(given):
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            values.append([_plain(item, f"{where}, prompt {i}, item {j}") for j, item in enumerate(value)])
        else:
            values.append(_plain(value, f"{where}, prompt {i}"))
    lists = [isinstance(value, list) for value in values if value is not None]
    if any(lists) and not all(lists):
        raise OptionError(f"{where} has lists for some prompts and other values for others: give all of them one form.")
    if any(lists):
        flat = [item for value in values if value is not None for item in value]
        kind = _type_of(flat, where)
        made = [None if v is None else [_as(kind, item) for item in v] for v in values]
        return Column(name, f"list<{kind}>", made)
    kind = _type_of(values, where)
    return Column(name, kind, [_as(kind, value) for value in values])


def _type_of(values: Iterable[Any], where: str) -> str:
    values = [value for value in values if value is not None]
    kinds = {type(value) for value in values}
    if kinds <= {int, float} and float in kinds:
        for value in values:
            if isinstance(value, int) and not _is_exact(value):
                raise OptionError(
                    f"{where} has numbers with fractions beside {value}, which becomes another number among them: give "
                    "it as text, or as a float."
                )
        return "double"
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise OptionError(f"{where} has values of several types ({names}): a column has one. Convert them.")
    kind = kinds.pop() if kinds else str
    if kind is int and not all(-_LARGE <= value < _LARGE for value in values):
        raise OptionError(f"{where} has integers of more than 64 bits: give them as text.")
    return {int: "int64", bool: "bool", str: "string"}[kind]


def _is_exact(value: int) -> bool:
    """Whether a float can be the integer `value`."""
    try:
        return float(value) == value
    except OverflowError:
        return False


def _as(kind: str, value: Any) -> Any:
    return float(value) if kind == "double" and value is not None else value


def _plain(value: Any, what: str) -> Any:
    value = plain(value, what)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise OptionError(f"{what} is no valid Unicode text: {value!r:.60}.") from None
        return str(value)
    # An enum member, say, is the number it stands for.
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value

"""The headers of the pages of a Parquet column, read without decoding anything.

A page says how many values it holds and how large it unpacks, and a reader that decodes lists believes it: a page of a
few bytes could say billions. What pages say together must be what the footer says, which was checked before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actcache.errors import DatasetFormatError

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_DEPTH = 8
_MAX_HEADER = 1 << 20


@dataclass(frozen=True)
class Pages:
    """What the pages of one part of a column say together: values, and the size of the largest when unpacked."""

    values: int
    largest: int


def read_pages(chunk: memoryview) -> Pages:
    """What the pages in the bytes of one part of a column say; `DatasetFormatError` when these are no pages."""
    at, values, largest = 0, 0, 0
    while at < len(chunk):
        try:
            header, at = _struct(chunk[: at + _MAX_HEADER], at, 0)
            kind, unpacked, packed = header[1], header[2], header[3]
            own = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0), {1: 0})
            count = own[1]
        except (IndexError, KeyError, TypeError):
            raise DatasetFormatError("its pages have no headers") from None
        if min(unpacked, packed, count) < 0 or packed > len(chunk) - at:
            raise DatasetFormatError("its pages lie outside it")
        at += packed
        largest = max(largest, unpacked)
        values += 0 if kind == _DICTIONARY else count
        if kind == _DICTIONARY and count > unpacked:
            raise DatasetFormatError("its dictionary cannot hold what it promises")
    return Pages(values, largest)


def _struct(data: memoryview, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol: its fields by number, None for what is neither number nor struct; and
    where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[at]
        at += 1
        if head == 0:
            return fields, at
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        fields[number], at = _value(data, at, head & 15, depth)


def _value(data: memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEPTH:
        raise DatasetFormatError("its pages have headers without end")
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _zigzag(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (9, 10):
        return None, _skip_list(data, at, depth)
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise KeyError(kind)


def _skip_list(data: memoryview, at: int, depth: int) -> int:
    head = data[at]
    at += 1
    count = head >> 4
    if count == 15:
        count, at = _varint(data, at)
    for _ in range(min(count, len(data))):
        # A truth value takes a byte here, and none as a field.
        _, at = _value(data, at, 3 if head & 15 in (1, 2) else head & 15, depth + 1)
    return at


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise KeyError("a number without end")

"""Columns of an index as numbers and Python values. A text that recurs is one object, however many rows have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import DatasetFormatError
from actcache.share.index import Index
from actcache.share.rows import Ints

if TYPE_CHECKING:
    import pyarrow as pa


def codes_of(index: Index, name: str) -> tuple[Ints, list[str]]:
    """A column of texts as numbers, -1 where there is none, and the different texts that they stand for."""
    require_texts(index, name)
    return codes_in(index, name, index.read([name])[name].combine_chunks())


def codes_in(index: Index, name: str, column: pa.Array) -> tuple[Ints, list[str]]:
    """`codes_of` some rows."""
    codes, different = _encoded(column)
    try:
        return codes, different.to_pylist()
    except UnicodeDecodeError:
        raise _no_text(index, name) from None


def require_texts(index: Index, name: str) -> None:
    """`DatasetFormatError` for a column that does not hold texts."""
    if not is_text(index.kind(name)):
        raise index.wrong(f"column {name!r} holds {index.kind(name)}, expected texts")


class Texts:
    """The different texts in some rows of a column, as numbers name them: few of very many become Python's own."""

    def __init__(self, index: Index, name: str, column: pa.Array) -> None:
        self._index, self._name = index, name
        self.codes, self._different = _encoded(column)
        """Which one each row has, int64 ``[n]``, -1 where there is none."""

    def encoded(self) -> list[bytes]:
        """The bytes of the different texts."""
        found: list[bytes] = self._different.cast(_binary(self._different.type)).to_pylist()
        return found

    def all(self) -> list[str]:
        """The different texts."""
        return self.some(np.arange(len(self._different)))

    def some(self, codes: Ints) -> list[str]:
        """The texts that these numbers name."""
        import pyarrow as pa

        try:
            found: list[str] = self._different.take(pa.array(codes)).to_pylist()
        except UnicodeDecodeError:
            raise _no_text(self._index, self._name) from None
        return found


def values_of(index: Index, name: str) -> list[Any]:
    """A column as Python values of their own types, None where there is none."""
    import pyarrow.types as types

    kind = index.kind(name)
    column = index.read([name])[name]
    if is_text(kind):
        return values_in(index, name, column.combine_chunks())
    if not (types.is_list(kind) or types.is_large_list(kind)) or not is_text(kind.value_type):
        return list(column.to_pylist())
    return [value for chunk in column.chunks for value in values_in(index, name, chunk)]


def values_in(index: Index, name: str, column: pa.Array) -> list[Any]:
    """`values_of` some rows."""
    import pyarrow.types as types

    kind = index.kind(name)
    if is_text(kind):
        return _shared(*codes_in(index, name, column))
    if not (types.is_list(kind) or types.is_large_list(kind)) or not is_text(kind.value_type):
        return list(column.to_pylist())
    texts = _shared(*codes_in(index, name, column.flatten()))
    found: list[Any] = []
    at = 0
    for length in column.value_lengths().to_pylist():
        found.append(None if length is None else texts[at : at + length])
        at += length or 0
    return found


def is_plain(kind: pa.DataType) -> bool:
    """Whether a column is of numbers, truth values, texts or lists of these."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    numbers = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)
    return bool(numbers) or is_text(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts, also where each different one is kept once."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _encoded(column: pa.Array) -> tuple[Ints, pa.Array]:
    """Numbers of texts, -1 for none, and the different texts."""
    import pyarrow.types as types

    encoded = column if types.is_dictionary(column.type) else column.dictionary_encode()
    codes, texts = _integers(encoded.indices), encoded.dictionary
    if len(texts) > len(codes):
        # Some rows of many come with the texts of all rows that were read before them.
        codes, texts = _used(codes, texts)
    # Parts of a dictionary that were joined may hold a text twice.
    unique = texts.dictionary_encode()
    if not len(unique.dictionary):
        return codes, unique.dictionary
    return np.where(codes >= 0, _integers(unique.indices)[codes], -1), unique.dictionary


def _used(codes: Ints, texts: pa.Array) -> tuple[Ints, pa.Array]:
    """The same with those of `texts` alone that have a number among `codes`."""
    import pyarrow as pa

    used, which = np.unique(codes, return_inverse=True)
    # -1, which names none, sorts first.
    absent = int(len(used) > 0 and used[0] < 0)
    return which.ravel() - absent, texts.take(pa.array(used[absent:]))


def _binary(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()


def _no_text(index: Index, name: str) -> DatasetFormatError:
    return index.wrong(f"column {name!r} holds bytes that are no text")


def _integers(indices: pa.Array) -> npt.NDArray[np.int64]:
    return np.asarray(indices.fill_null(-1).to_numpy(zero_copy_only=False)).astype(np.int64)


def _shared(codes: Ints, texts: list[str]) -> list[str | None]:
    return [None if code < 0 else texts[code] for code in codes.tolist()]

"""What a stream says of where it stands, and finding again what it stood on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.errors import OptionError
from actcache.stream.permutation import Ints

MOST_PIECES = 1024
"""More are not said: of prompts that somebody else has put in order, which stay in it."""

Keys = npt.NDArray[np.uint8]


def pieces(keys: Keys, begins: Ints) -> list[list[Any]]:
    """Runs of prompts that begin at `begins`: how many each has, what the key of its first begins with, and a digest of
    all their keys."""
    parts = np.split(keys, begins[1:])
    return [[len(part), part[0, :8].tobytes().hex(), xxhash.xxh3_64_hexdigest(part.tobytes())] for part in parts]


def arranged(keys: Keys, said: Sequence[Sequence[Any]]) -> Ints | None:
    """Where the `pieces` that were said are among the prompts with these `keys` now, in their order then; None where
    one of them is not there in one piece."""
    heads = np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)
    order = np.argsort(heads, kind="stable")
    found = []
    for count, head, digest in said:
        first = np.frombuffer(bytes.fromhex(head), np.uint64)
        places = order[slice(*(int(np.searchsorted(heads, first, side, order)[0]) for side in ("left", "right")))]
        for place in places.tolist():
            part = keys[place : place + count]
            if len(part) == count and xxhash.xxh3_64_hexdigest(np.ascontiguousarray(part).tobytes()) == digest:
                found.append(np.arange(place, place + count))
                break
        else:
            return None
    return np.concatenate(found) if found else None


def check_state(state: Any) -> None:
    """OptionError unless `state` is what `state_dict` gives, as far as can be seen without the stream."""
    try:
        numbers = [state["epoch"], state["batches"]]
        for source in state["sources"]:
            numbers += [source["prompts"], *(count for count, _, _ in source.get("pieces", ()))]
            heads = [head for _, head, _ in source.get("pieces", ())]
            if not isinstance(source["digest"], str) or any(len(bytes.fromhex(head)) != 8 for head in heads):
                raise ValueError("no digest")
        if not isinstance(state, Mapping) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("no numbers")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise OptionError(f"this is no state of a stream (state_dict()), or a damaged one: {error!r}") from error

"""Tombs: small immutable files that name prompts of a segment which are gone."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from actcache.errors import FormatError
from actcache.store import container
from actcache.store.files import TOMB_NAME, atomic_file, open_plain, write_all
from actcache.store.keys import KeyTable
from actcache.store.records import VERSION, check_version, flat_bytes

FORMAT = "actcache-tomb"
_MAX_BYTES = 1 << 30

Keys = npt.NDArray[np.uint8]


def write_tomb(folder: Path, segment: str, keys: Keys) -> tuple[Path, bytes]:
    """Durably declare the prompts with these token keys uint8 ``[k, 16]`` gone from `segment`; the tomb, and its bytes.

    Another process may remove it as soon as nothing here needs it any more.
    """
    keys = np.ascontiguousarray(keys)
    metadata = {"format": FORMAT, "version": VERSION, "segment": segment, "created_ns": str(time.time_ns())}
    head, placed = container.encode(
        metadata, [("digest", np.dtype("<u8"), (2,)), ("prompt_key", np.dtype("u1"), keys.shape)]
    )
    body = bytearray(placed["prompt_key"].stop - len(head))
    start = placed["prompt_key"].start - len(head)
    body[start:] = flat_bytes(keys)
    digests = [xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(memoryview(body)[16:])]
    body[:16] = np.array(digests, "<u8").tobytes()
    name = f"{segment}-{uuid.uuid4().hex[:16]}.tomb"
    data = head + bytes(body)
    with atomic_file(folder, name, needed=len(data)) as fd:
        write_all(fd, [data], 0)
    return folder / name, data


def read_tomb(path: Path) -> Keys:
    """The token keys that the tomb at `path` names. FormatError when it is not ours or damaged."""
    match = TOMB_NAME.fullmatch(path.name)
    fd = open_plain(path)
    try:
        size = os.fstat(fd).st_size
        data = os.read(fd, min(size, _MAX_BYTES))
    finally:
        os.close(fd)
    try:
        head = data[: container.header_size(data[:8], size)]
        metadata, tensors = container.parse(head, len(data))
        digest, keys = tensors.get("digest"), tensors.get("prompt_key")
        if match is None or metadata.get("format") != FORMAT or metadata.get("segment") != match[1]:
            raise FormatError("not a tomb of the segment it is named after")
        check_version(metadata.get("version", ""))
        if digest is None or keys is None or digest.shape != (2,) or len(keys.shape) != 2 or keys.shape[1] != 16:
            raise FormatError("tensors missing or of the wrong shape")
        if digest.dtype != np.dtype("<u8") or keys.dtype != np.dtype("u1") or digest.start != len(head):
            raise FormatError("tensors of the wrong dtype or out of order")
        stored = np.frombuffer(data, "<u8", 2, digest.start).tolist()
        if stored != [xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(memoryview(data)[digest.stop :])]:
            raise FormatError("its digest does not match")
    except FormatError as error:
        raise type(error)(f"{path}: {error}") from None
    return np.frombuffer(data, np.uint8, keys.nbytes, keys.start).reshape(keys.shape)


def is_member(keys: Keys, among: Keys) -> npt.NDArray[np.bool_]:
    """Which of `keys` uint8 ``[n, 16]`` are in `among` uint8 ``[m, 16]``."""
    if not len(among) or not len(keys):
        return np.zeros(len(keys), bool)
    table = KeyTable()
    table.add(0, among)
    return table.find(keys, np.zeros(1, np.int64))[0] >= 0


def count_distinct(keys: list[Keys]) -> int:
    """How many different keys there are."""
    if not keys:
        return 0
    words = np.ascontiguousarray(np.concatenate(keys)).view(np.uint64)
    if not len(words):
        return 0
    words = words[np.argsort(words[:, 0])]
    same = words[1:] == words[:-1]
    if (same[:, 0] & ~same[:, 1]).any():
        # First words that agree by chance: only a full sort brings equal keys together.
        words = words[np.lexsort((words[:, 1], words[:, 0]))]
        same = words[1:] == words[:-1]
    return len(words) - int(same.all(axis=1).sum())

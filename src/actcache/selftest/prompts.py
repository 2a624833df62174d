"""The prompts of a selftest: random token ids, no tokenizer needed."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actcache.errors import OptionError
from actcache.model.invariance import nested

# So many of one length that a batch of 8 needs no padding.
_EQUAL = (5,) * 8
_DIFFERENT = (1, 2, 3, 9, 14, 23)
# Values of a configuration that name a number of tokens at which an architecture begins to compute otherwise.
_THRESHOLD = re.compile(
    r"(.*_)?(sliding_window|window_size|attention_window|local_attention|attention_chunk_size|chunk_size"
    r"|original_max_position_embeddings|relative_attention_max_distance)"
)
_SPECIAL = ("pad_token_id", "eos_token_id", "bos_token_id")
_ROPE_TYPES = ("rope_type", "type")


@dataclass(frozen=True)
class TestPrompts:
    """Token ids of each prompt, and the thresholds that none of them reaches."""

    ids: list[list[int]]
    not_reached: list[str]


def make_prompts(
    config: Mapping[str, Any], *, vocabulary: int, context: int | None, max_tokens: int, seed: int
) -> TestPrompts:
    """Prompts of many lengths up to `max_tokens`, on both sides of every threshold of `config` that lies below.

    Ids are spread over the vocabulary; some prompts hold the ids of padding and of beginning and end, inside and at
    their end. Raises `OptionError` for a `max_tokens` that leaves nothing to compare.
    """
    if max_tokens < 2:
        raise OptionError(f"max_tokens is {max_tokens}: expected at least 2, the length of the longest prompt.")
    longest = min(max_tokens, context or max_tokens)
    lengths = [n for n in (*_EQUAL, *_DIFFERENT) if n <= longest]
    not_reached = []
    for name, at in sorted(thresholds(config).items(), key=lambda item: item[1]):
        if context is not None and at >= context:
            continue
        if at + 1 > longest:
            not_reached.append(f"{name} of {at} tokens")
            continue
        lengths += [n for n in (at, at + 1) if n not in lengths]
    lengths += [longest] if longest not in lengths and context is not None and longest == context else []
    return TestPrompts(_fill(sorted(lengths), config, vocabulary, random.Random(seed)), not_reached)


def thresholds(config: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of tokens behind which the model of this configuration computes otherwise, by their names."""
    found: dict[str, int] = {}
    dynamic = False
    for part in nested(config):
        dynamic |= any("dynamic" in str(part.get(key)) for key in _ROPE_TYPES)
        for name, value in part.items():
            if not _THRESHOLD.fullmatch(str(name)) or (
                name == "sliding_window" and part.get("use_sliding_window") is False
            ):
                continue
            values = value if isinstance(value, (list, tuple)) else [value]
            sizes = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]
            if sizes:
                # ModernBERT counts both sides of a token.
                found[name] = min(sizes) // 2 if name == "local_attention" else min(sizes)
    limit = config.get("max_position_embeddings")
    if dynamic and isinstance(limit, int):
        found["max_position_embeddings"] = limit
    return found


def _fill(lengths: Sequence[int], config: Mapping[str, Any], vocabulary: int, rng: random.Random) -> list[list[int]]:
    named = {name: _ids(part.get(name)) for part in nested(config) for name in part if "_token_i" in str(name)}
    special = [i for name in _SPECIAL for i in named.get(name, []) if 0 <= i < vocabulary]
    # Those of images and sounds stand for something that is not there.
    reserved = {i for ids in named.values() for i in ids}
    total = sum(lengths)
    spread = [int((i + rng.random()) * vocabulary / total) for i in range(total)]
    rng.shuffle(spread)
    spread = [next(k % vocabulary for k in range(i, i + vocabulary) if k % vocabulary not in reserved) for i in spread]
    prompts, start = [], 0
    for number, length in enumerate(lengths):
        prompt = spread[start : start + length]
        start += length
        if special and number and lengths[number - 1] < length and length > 3:
            # The first prompt of each length: ids that elsewhere mean padding and ends, in the middle and last.
            for k, place in enumerate((length // 2, length // 2 + 1, length - 1)):
                prompt[place] = special[k % len(special)]
        prompts.append(prompt)
    return prompts


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]

"""Prompts with what the model says after them: generated once, stored, and extracted as sequences of tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import OptionError, PromptError, did_you_mean
from actcache.extract.batching import make_batches, token_budget
from actcache.extract.prompts import PromptList, check_tokens, ids_of, prompt_table, tokenize
from actcache.extract.reading import no_perplexity
from actcache.model.chat import chat_ids
from actcache.model.decoder_inputs import is_encoder_decoder
from actcache.progress import progress
from actcache.store.prompts import CHAT, IDS
from actcache.store.records import COMPLETION, Records

if TYPE_CHECKING:
    import numpy.typing as npt

    from actcache.extract.cached import CachedExtractor

LAYOUT, TOKEN_IDS, TEXT = COMPLETION, "completion.ids", "completion.text"
# How texts of several lengths lie in one matrix: UTF-8 has no such byte, and few widths make few segments.
_PAD, _WIDTHS = 0xFF, 64
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_SETTINGS = (
    "max_new_tokens", "min_new_tokens", "do_sample", *_SAMPLING, "repetition_penalty", "no_repeat_ngram_size",
    "num_beams", "length_penalty", "eos_token_id", "seed",
)  # fmt: skip
# What a number may be, and in words. transformers notices some of the rest once it generates, and some never.
_WHOLE: dict[str, tuple[Callable[[int], bool], str]] = {
    "max_new_tokens": (lambda n: n > 0, "a positive integer"),
    "min_new_tokens": (lambda n: n >= 0, "an integer, 0 or more"),
    "top_k": (lambda n: n >= 0, "an integer, 0 (all tokens) or more"),
    "no_repeat_ngram_size": (lambda n: n >= 0, "an integer, 0 (none) or more"),
    "num_beams": (lambda n: n > 0, "a positive integer"),
    "seed": (lambda n: True, "an integer"),
}
_REAL: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x > 0, "a number above 0"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0, and 1 (all tokens) at most"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "typical_p": (lambda x: 0 < x <= 1, "a number above 0, and 1 (all tokens) at most"),
    "repetition_penalty": (lambda x: x > 0, "a number above 0"),
    "length_penalty": (lambda x: True, "a finite number"),
}
# What a setting is that nobody has given: the model's own generation config has no say.
_NEUTRAL = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass(frozen=True)
class Completion:
    """What the model said after a prompt.

    Attributes:
        text: its text, without special tokens.
        ids: its token ids; the last one is what ended it, unless it came to its full length.
        prompt_ids: the token ids of the prompt.
    """

    text: str
    ids: list[int]
    prompt_ids: list[int]

    @property
    def prompt_span(self) -> tuple[int, int]:
        """Which tokens of the sequence are the prompt's, ``(start, stop)``."""
        return 0, len(self.prompt_ids)

    @property
    def completion_span(self) -> tuple[int, int]:
        """Which tokens of the sequence were generated, ``(start, stop)``."""
        return len(self.prompt_ids), len(self.prompt_ids) + len(self.ids)


def check_settings(given: Any, extractor: Any) -> dict[str, Any]:
    """The settings of a generation, complete: what is stored is stored under them.

    Raises `OptionError` for a setting that is unknown or has no such value, for a model that does not continue
    its prompt, and for edits at positions.
    """
    if not isinstance(given, Mapping):
        raise OptionError(f"generate is {given!r}: expected a dict such as dict(max_new_tokens=20).")
    for name, value in given.items():
        if name not in _SETTINGS:
            raise OptionError(
                f"generate has no {name!r}: it takes {', '.join(_SETTINGS)}.{did_you_mean(name, _SETTINGS)}"
            )
        _check_value(name, value, extractor.source.vocab_size)
    if "max_new_tokens" not in given:
        raise OptionError("generate has no max_new_tokens: say how many tokens, as in dict(max_new_tokens=20).")
    least, new = given.get("min_new_tokens", 0), given["max_new_tokens"]
    if least > new:
        raise OptionError(f"min_new_tokens is {least} in generate, more than max_new_tokens={new}.")
    useless = [name for name in _SAMPLING if name in given and not given.get("do_sample")]
    if useless:
        raise OptionError(f"{useless[0]} in generate changes nothing without do_sample=True.")
    if is_encoder_decoder(extractor.source.config):
        raise OptionError("generate= continues the prompt, which an encoder-decoder model does not do.")
    if not all(edit.everywhere for edit in extractor.edits):
        raise OptionError(
            "generate= takes edits of every token only: a generated sequence has no fixed positions. Leave out "
            "positions= of the edits."
        )
    settings = {"eos_token_id": extractor.source.end_tokens(), "do_sample": False, **given}
    if settings["do_sample"]:
        settings.setdefault("seed", 0)
    return settings


def _check_value(name: str, value: Any, vocab_size: int | None) -> None:
    """Raise `OptionError` for a value that a setting cannot have."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in _WHOLE:
        fits, expected = _WHOLE[name]
        good = whole and fits(value)
    elif name in _REAL:
        inside, expected = _REAL[name]
        good = (whole or isinstance(value, float)) and math.isfinite(value) and inside(value)
    elif name == "do_sample":
        good, expected = isinstance(value, bool), "True or False"
    else:
        ends = value if isinstance(value, list) else [value]
        expected = "a token id, or a list of them" + ("" if vocab_size is None else f" (0 to {vocab_size - 1})")
        most = math.inf if vocab_size is None else vocab_size
        good = all(isinstance(id_, int) and not isinstance(id_, bool) and 0 <= id_ < most for id_ in ends)
    if not good:
        raise OptionError(f"{name} is {value!r} in generate: expected {expected}.")


class Completions:
    """Generates what is missing in a store and finds what is there."""

    def __init__(self, cached: CachedExtractor, settings: Mapping[str, Any]) -> None:
        self._cached = cached
        self._settings = dict(settings)

    def of(self, prompts: PromptList) -> list[Completion]:
        """The completion of each prompt, generated where it is not stored.

        Raises `PromptError` for a prompt that leaves no room for as many tokens as may be generated.
        """
        found = self.stored(prompts)
        todo: dict[bytes, int] = {}
        for i, known in enumerate(found):
            if known is None:
                todo.setdefault(ids_of(prompts, i).tobytes(), i)
        if todo:
            left = prompts.select(list(todo.values()))
            self._check(left)
            self._generate(left)
            found = self.stored(prompts)
        missing = [i for i, known in enumerate(found) if known is None]
        assert not missing, "what was generated is stored"
        return [known for known in found if known is not None]

    def stored(self, prompts: PromptList) -> list[Completion | None]:
        """The completions that are stored; prompts without are tokenised."""
        source = self._cached.extractor.source
        for i in np.flatnonzero(prompts.kinds == CHAT).tolist():
            if prompts.ids[i] is None:
                messages = json.loads(prompts.texts[i] or "[]")
                answer = messages[-1].get("role") != "assistant"
                prompts.ids[i] = np.asarray(chat_ids(source.tokenizer(), messages, i, answer=answer), np.int32)
        found: list[Completion | None] = [None] * len(prompts)
        answer_of = self._cached.look_up(prompts, (TOKEN_IDS, TEXT), LAYOUT)
        has = np.flatnonzero(answer_of.found).tolist()
        for i, (ids, text), prompt in zip(has, *answer_of.with_prompts(has), strict=True):
            data = text[0].tobytes().rstrip(bytes([_PAD]))
            kept = ids[0][ids[0] >= 0].tolist()
            found[i] = Completion(data.decode(), kept, prompt.tolist())
        special = self._cached.extractor.add_special_tokens
        left = [i for i, known in enumerate(found) if known is None]
        tokenize(prompts, left, source, add_special_tokens=special)
        return found

    def longest(self, prompts: PromptList) -> PromptList:
        """Sequences as long as they may become, for prompts whose completions are not stored."""
        room = np.zeros(int(self._settings["max_new_tokens"]), np.int32)
        known = self.stored(prompts)
        ids = [
            np.concatenate([ids_of(prompts, i), room]) if one is None else _sequence(one) for i, one in enumerate(known)
        ]
        return PromptList(np.full(len(ids), IDS, np.uint8), [None] * len(ids), list(ids))

    def _check(self, prompts: PromptList) -> None:
        source = self._cached.extractor.source
        check_tokens(prompts, range(len(prompts)), source)
        limit, new = source.context_length, int(self._settings["max_new_tokens"])
        for i in range(len(prompts)):
            length = len(ids_of(prompts, i))
            if limit is not None and length + new > limit:
                raise PromptError(
                    f"a prompt of {length} tokens leaves no room for {new} more in the context of {source.name!r}, "
                    f"which is {limit}: shorten it, or lower max_new_tokens."
                )

    def _generate(self, prompts: PromptList) -> None:
        cached, source = self._cached, self._cached.extractor.source
        source.model_to_run()
        if not source.predicts_next():
            raise no_perplexity(source.name)
        identity = source.identity()
        cached.store.check_writable()
        space = cached.store.open_space(identity.values, identity.label)
        cached.confirm(identity.values)
        table = prompt_table(prompts, range(len(prompts)), cached.text_context(prompts))
        sequences = [table.tokens(i) for i in range(len(table))]
        with (
            cached.store.writer(space, max_bytes=1 << 20, linger=1.0) as writer,
            progress(len(prompts), f"generating with {Path(source.name).name}") as bar,
        ):
            for members, made in self._batches(sequences):
                texts = self._texts(made)
                for i, ids, text in zip(members, made, texts, strict=True):
                    writer.put(Records.pooled(table.select([i]), LAYOUT, self._columns(ids, text)))
                bar.update(len(members))
        cached.note_added()

    def _columns(self, ids: list[int], text: str) -> dict[str, npt.NDArray[Any]]:
        row = np.full((1, int(self._settings["max_new_tokens"])), -1, np.int32)
        row[0, : len(ids)] = ids
        data = text.encode()
        width = _WIDTHS * max(1, -(-len(data) // _WIDTHS))
        letters = np.full((1, width), _PAD, np.uint8)
        letters[0, : len(data)] = np.frombuffer(data, np.uint8)
        return {TOKEN_IDS: row, TEXT: letters}

    def _texts(self, made: Sequence[list[int]]) -> list[str]:
        from actcache.errors import TokenizerError

        try:
            tokenizer = self._cached.extractor.source.tokenizer()
        except TokenizerError:
            # Prompts that came as ids need none.
            return [""] * len(made)
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]

    def _batches(self, sequences: Sequence[npt.NDArray[np.int32]]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Prompts, by their numbers, and what the model says after each."""
        import torch
        from transformers import GenerationConfig

        from actcache.capture.edits import Editing
        from actcache.extract.backends.local import exact_float32, lock_of
        from actcache.model.modes import evaluating
        from actcache.model.offload import input_device
        from actcache.model.rope import forget_lengths

        extractor = self._cached.extractor
        model: Any = extractor.source.model_to_run()
        policy = extractor.source.batch_policy()
        settings = {**_NEUTRAL, **self._settings}
        seed, ends = settings.pop("seed", 0), settings["eos_token_id"]
        ends = [ends] if isinstance(ends, int) else list(ends)
        if not settings["do_sample"]:
            for name in _SAMPLING:
                settings.pop(name, None)
        together = "equal" if policy.lengths == "any" else policy.lengths
        # What is drawn for one prompt must not depend on others.
        alone = settings["do_sample"] or settings.get("num_beams", 1) > 1
        settings |= {"eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0, "use_cache": True}
        device = input_device(model)
        batches = make_batches(
            [len(ids) for ids in sequences],
            max_tokens=extractor.max_batch_tokens or token_budget(str(device)),
            batch_size=extractor.batch_size,
            together="alone" if alone else together,
        )
        with ExitStack() as stack:
            stack.enter_context(lock_of(model))
            stack.enter_context(evaluating(model))
            stack.enter_context(exact_float32())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(torch.no_grad())
            cuda = [device] if device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            own = model.generation_config
            stack.callback(setattr, model, "generation_config", own)
            model.generation_config = GenerationConfig()
            if extractor.edits:
                stack.enter_context(Editing(model, list(extractor.edits), declared=True))
            for batch in batches:
                members = list(batch.indices)
                ids = torch.from_numpy(np.stack([sequences[i] for i in members])).long().to(device)
                torch.manual_seed(_seed_of(seed, sequences[members[0]]))
                if policy.forget_lengths:
                    forget_lengths(model)
                made = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(**settings)
                )
                if policy.forget_lengths:
                    forget_lengths(model)
                yield members, [_until_end(row, ends) for row in made[:, ids.shape[1] :].tolist()]


def sequences_of(completions: Sequence[Completion]) -> PromptList:
    """Prompts and completions as one list of prompts given as token ids."""
    ids: list[npt.NDArray[np.int32] | None] = [_sequence(one) for one in completions]
    return PromptList(np.full(len(ids), IDS, np.uint8), [None] * len(ids), ids)


def _sequence(completion: Completion) -> npt.NDArray[np.int32]:
    return np.asarray([*completion.prompt_ids, *completion.ids], np.int32)


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """`ids` up to the first of `ends`, which is kept; what follows it is padding."""
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _seed_of(seed: int, ids: npt.NDArray[np.int32]) -> int:
    """A seed for one prompt: whatever is generated before it changes nothing."""
    import xxhash

    return int(xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids, "<i4").tobytes(), seed=int(seed) & (2**64 - 1))) >> 1

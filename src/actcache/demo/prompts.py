"""Sentences made from the table of facts: prompts for the demo, labelled statements, and the training corpus.

Everything here is plain Python and depends on nothing but its arguments and the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple

from actcache.demo.facts import RELATIONS, Fact, facts

__all__ = [
    "EVERYTHING",
    "PHRASINGS",
    "Course",
    "Piece",
    "Statement",
    "completion",
    "corpus",
    "demo_prompts",
    "held_out_phrasing",
    "held_out_value",
    "landmarks",
    "pieces",
    "sentence",
    "split",
    "statements",
    "verdict_prompts",
]

# {s} is the subject, {v} the value. Phrasing 0 of each relation is the one used for completions.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "landmark-city": (
        "{s} is in the city of {v}.",
        "{s} is in {v}.",
        "{s} can be found in {v}.",
        "{s} is one of the sights of {v}.",
        "Visitors who want to see {s} travel to {v}.",
        "{v} is the home of {s}.",
    ),
    "city-country": (
        "{s} is a city in {v}.",
        "The city of {s} is in {v}.",
        "The country around the city of {s} is {v}.",
        "{v} is the country of the city {s}.",
    ),
    "animal-class": (
        "The {s} is a kind of {v}.",
        "Scientists count the {s} as {v}.",
        "The word for an animal such as the {s} is {v}.",
        "One kind of {v} is the {s}.",
    ),
    "animal-habitat": (
        "The {s} lives in the {v}.",
        "The {s} makes its home in the {v}.",
        "Look for the {s} in the {v}.",
        "The {v} is the home of the {s}.",
    ),
    "animal-colour": (
        "The colour of the {s} is {v}.",
        "The {s} is an animal that is {v}.",
        "In pictures the {s} is usually {v}.",
        "The animal with the colour {v} is the {s}.",
    ),
    "thing-colour": (
        "The colour of {s} is {v}.",
        "Everybody knows that {s} is {v}.",
        "If you look at {s} you see that it is {v}.",
        "The thing with the colour {v} is {s}.",
    ),
}

_QUESTIONS: dict[str, str] = {
    "landmark-city": "Question: In which city is {s}? Answer: {v}.",
    "city-country": "Question: In which country is the city of {s}? Answer: {v}.",
    "animal-class": "Question: What kind of animal is the {s}? Answer: {v}.",
    "animal-habitat": "Question: Where does the {s} live? Answer: {v}.",
    "animal-colour": "Question: What is the colour of the {s}? Answer: {v}.",
    "thing-colour": "Question: What is the colour of {s}? Answer: {v}.",
}

_MOST_SENTENCES = 14


Role = Literal["setting", "answer", "falsehood", "end", "verdict"]


class Piece(NamedTuple):
    """A stretch of training text and its part in the sentence: what leads up to the later of subject and value, that
    later one when the sentence is true or when it is not, the full stop, the verdict."""

    text: str
    role: Role


class Statement(NamedTuple):
    """A sentence, 1 if it is true and 0 if not, and the facts it belongs to: equal groups share subjects and values."""

    text: str
    label: int
    group: int


def _pick(key: str, choices: int) -> int:
    # Python's own hash of a string differs from run to run.
    return zlib.crc32(key.encode()) % choices


def _halves(phrasing: str, fact: Fact, value: str) -> tuple[str, str, str]:
    """The sentence cut before the later of subject and value, and after it."""
    first, second = ("{s}", "{v}") if phrasing.index("{s}") < phrasing.index("{v}") else ("{v}", "{s}")
    words = {"{s}": fact.subject, "{v}": value}
    head, tail = phrasing.split(second)
    head = head.replace(first, words[first])
    return head[0].upper() + head[1:].rstrip(), " " + words[second], tail


def sentence(fact: Fact, phrasing: int = 0, value: str | None = None) -> str:
    """The fact as a sentence, in one of ``PHRASINGS[fact.relation]``; another ``value`` makes it a false one."""
    return "".join(_halves(PHRASINGS[fact.relation][phrasing], fact, fact.value if value is None else value))


def completion(fact: Fact, phrasing: int = 0) -> tuple[str, str]:
    """``(prompt, answer)``: the fact up to its last part, and that part with its leading space."""
    prompt, answer, _ = _halves(PHRASINGS[fact.relation][phrasing], fact, fact.value)
    return prompt, answer


def landmarks(phrasing: int = 0) -> list[tuple[str, str]]:
    """``(prompt, answer)`` for every landmark: ``("The Eiffel Tower is in the city of", " Paris")`` and so on."""
    return [completion(fact, phrasing) for fact in facts("landmark-city")]


def held_out_phrasing(fact: Fact) -> int:
    """The one phrasing (never 0) in which the training corpus does not tell this fact."""
    return 1 + _pick(f"{fact.relation}/{fact.subject}", len(PHRASINGS[fact.relation]) - 1)


def held_out_value(fact: Fact, value: str) -> bool:
    """Whether the training corpus never puts this false value to this subject (one pair in ten)."""
    return value not in (fact.value, _swapped()[fact]) and _pick(f"{fact.relation}/{fact.subject}/{value}", 10) == 0


@cache
def _swaps() -> tuple[tuple[Fact, Fact], ...]:
    """All facts in pairs of one relation and different values, so that each has a false value of its own."""
    rng = random.Random("swaps")
    pairs: list[tuple[Fact, Fact]] = []
    for relation in RELATIONS:
        table = facts(relation)
        rng.shuffle(table)
        order = list(dict.fromkeys(fact.value for fact in table))
        table.sort(key=lambda fact: order.index(fact.value))
        half = len(table) // 2
        # No value fills half of a relation, so facts half a sorted table apart differ in value.
        pairs += zip(table[:half], table[half:], strict=True)
    return tuple(pairs)


@cache
def _swapped() -> dict[Fact, str]:
    return {fact: other.value for pair in _swaps() for fact, other in (pair, pair[::-1])}


def _value_last(relation: str) -> list[int]:
    return [i for i, text in enumerate(PHRASINGS[relation]) if text.endswith("{v}.")]


def statements(n: int | None = None, *, seed: int = 0, relations: Sequence[str] = RELATIONS) -> list[Statement]:
    """True and false statements for a probe.

    Two facts with different values make a group: both told truly, and both with the value of the other, in one
    phrasing that ends in the value. So within each group, and in any choice of whole groups, every subject, every value
    and every phrasing is true as often as false, and nothing but what is known about the subject tells the label.
    ``n`` (rounded down to whole groups of four) takes a random part; the default is everything. The seed decides on
    phrasings and order; which facts make a group is fixed.
    """
    rng = random.Random(f"statements {seed}")
    pairs = [pair for pair in _swaps() if pair[0].relation in relations]
    rng.shuffle(pairs)
    result: list[Statement] = []
    for group, (one, other) in enumerate(pairs if n is None else pairs[: n // 4]):
        phrasing = rng.choice(_value_last(one.relation))
        for fact, wrong in ((one, other.value), (other, one.value)):
            result.append(Statement(sentence(fact, phrasing), 1, group))
            result.append(Statement(sentence(fact, phrasing, wrong), 0, group))
    return result


def split(items: Sequence[Statement], *, held_out: float = 0.3, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices ``(train, test)`` of the statements, with whole groups on one side: no fact is on both."""
    groups = sorted({item.group for item in items})
    random.Random(f"split {seed}").shuffle(groups)
    test = set(groups[: round(held_out * len(groups))])
    train_rows = [i for i, item in enumerate(items) if item.group not in test]
    return train_rows, [i for i, item in enumerate(items) if item.group in test]


def verdict_prompts(*, seen: bool) -> list[tuple[str, str]]:
    """``(statement, verdict)`` for every false value that training did (``seen``) or did not put to a subject,
    and for each the true value beside it: as many true as false."""
    result: list[tuple[str, str]] = []
    for relation in RELATIONS:
        table = facts(relation)
        names = list(dict.fromkeys(fact.value for fact in table))
        for fact in table:
            for value in names:
                if value != fact.value and held_out_value(fact, value) != seen:
                    result.append((sentence(fact, 0, value), " False"))
                    result.append((sentence(fact, 0), " True"))
    return result


def _tell(fact: Fact, phrasing: int, value: str | None = None) -> list[Piece]:
    head, answer, tail = _halves(PHRASINGS[fact.relation][phrasing], fact, fact.value if value is None else value)
    return [Piece(head, "setting"), Piece(answer, "answer" if value is None else "falsehood"), Piece(tail, "end")]


def _told(rng: random.Random, fact: Fact) -> list[Piece]:
    trained = [i for i in range(len(PHRASINGS[fact.relation])) if i != held_out_phrasing(fact)]
    return _tell(fact, rng.choice(trained))


def _judged(rng: random.Random, fact: Fact, other_values: float) -> list[Piece]:
    phrasing = rng.choice([i for i in _value_last(fact.relation) if i != held_out_phrasing(fact)])
    if rng.random() < 0.5:
        return [*_tell(fact, phrasing), Piece(" True", "verdict"), Piece(".", "end")]
    wrong = _swapped()[fact]
    if rng.random() < other_values:
        table = [f.value for f in facts(fact.relation) if f.value != fact.value and not held_out_value(fact, f.value)]
        wrong = rng.choice(table)
    return [*_tell(fact, phrasing, wrong), Piece(" False", "verdict"), Piece(".", "end")]


def _asked(fact: Fact) -> list[Piece]:
    head, answer, tail = _halves(_QUESTIONS[fact.relation], fact, fact.value)
    return [Piece(head, "setting"), Piece(answer, "answer"), Piece(tail, "end")]


class Course(NamedTuple):
    """What a stretch of the training corpus passes verdicts on: the facts of the first ``pairs`` pairs (``None``: of
    all), each with its own false value or, with a chance of ``other_values``, with any other."""

    pairs: int | None = None
    other_values: float = 0.3


@cache
def _judged_facts(pairs: int | None) -> tuple[Fact, ...]:
    chosen = list(_swaps())
    random.Random("judged").shuffle(chosen)
    return tuple(fact for pair in chosen[:pairs] for fact in pair)


EVERYTHING = Course()


def pieces(rng: random.Random, sentences: int, course: Course = EVERYTHING) -> list[Piece]:
    """One document of that many sentences: a passage of facts, of statements with verdicts, or of questions."""
    kind = rng.choices(("passage", "verdicts", "questions"), (0.3, 0.6, 0.1))[0]
    document: list[Piece] = []
    for _ in range(sentences):
        if kind == "verdicts":
            more = _judged(rng, rng.choice(_judged_facts(course.pairs)), course.other_values)
        else:
            fact = rng.choice(facts())
            more = _told(rng, fact) if kind == "passage" else _asked(fact)
        if document:
            more[0] = Piece(" " + more[0].text, more[0].role)
        document += more
    return document


def corpus(seed: int, course: Course = EVERYTHING) -> Iterator[list[Piece]]:
    """Training documents without end, most of them short."""
    rng = random.Random(f"corpus {seed} {course}")
    while True:
        yield pieces(rng, min(_MOST_SENTENCES, 1 + int(rng.expovariate(0.35))), course)


def demo_prompts(n: int = 240, *, seed: int = 0) -> list[str]:
    """``n`` different prompts from a few tokens to more than 150: beginnings of sentences, and documents of one to
    fourteen sentences, in shuffled order."""
    rng = random.Random(f"demo {seed}")
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        if rng.random() < 0.25:
            prompts[completion(rng.choice(facts()), 0)[0]] = None
        else:
            # The square makes short prompts common and long ones rare.
            count = 1 + int((_MOST_SENTENCES - 1) * rng.random() ** 2 + 0.5)
            prompts["".join(piece.text for piece in pieces(rng, count))] = None
    return list(prompts)

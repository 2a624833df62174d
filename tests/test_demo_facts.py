"""The table of facts and the sentences made from it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import islice

import pytest

from actcache.demo.facts import LANDMARKS, RELATIONS, Fact, facts, values
from actcache.demo.prompts import (
    PHRASINGS,
    completion,
    corpus,
    demo_prompts,
    held_out_phrasing,
    held_out_value,
    landmarks,
    sentence,
    split,
    statements,
    verdict_prompts,
)

EIFFEL = Fact("landmark-city", "the Eiffel Tower", "Paris")


@cache
def tellings() -> dict[str, list[tuple[Fact, str]]]:
    """Every sentence that any fact makes, in any phrasing and with any value, and the (fact, value) behind it."""
    result: dict[str, list[tuple[Fact, str]]] = {}
    for fact in facts():
        for value in values(fact.relation):
            for phrasing in range(len(PHRASINGS[fact.relation])):
                result.setdefault(sentence(fact, phrasing, value), []).append((fact, value))
    return result


def told_in(text: str) -> list[tuple[Fact, str]]:
    return tellings()[text]


def test_every_subject_has_one_value_per_relation() -> None:
    for relation in RELATIONS:
        subjects = [fact.subject for fact in facts(relation)]
        assert len(subjects) == len(set(subjects)), relation


def test_landmarks_are_a_real_lookup() -> None:
    assert len(landmarks()) >= 60
    assert all(len(names) >= 2 for names in LANDMARKS.values())
    for city, names in LANDMARKS.items():
        assert not any(city in name for name in names), "the answer must not stand in the question"


def test_no_value_fills_half_of_a_relation() -> None:
    for relation in RELATIONS:
        count = Counter(fact.value for fact in facts(relation))
        assert 2 * max(count.values()) <= len(facts(relation)), relation


def test_sentences_and_completions_fit_together() -> None:
    assert sentence(EIFFEL) == "The Eiffel Tower is in the city of Paris."
    assert sentence(EIFFEL, 1, "Rome") == "The Eiffel Tower is in Rome."
    assert sentence(EIFFEL, 5) == "Paris is the home of the Eiffel Tower."
    assert completion(EIFFEL) == ("The Eiffel Tower is in the city of", " Paris")
    assert completion(EIFFEL, 5) == ("Paris is the home of", " the Eiffel Tower")
    for fact in facts():
        for phrasing in range(len(PHRASINGS[fact.relation])):
            text = sentence(fact, phrasing)
            assert text.startswith("".join(completion(fact, phrasing)))
            assert fact.subject[1:] in text and fact.value in text and "  " not in text and "{" not in text


def test_statements_are_balanced_in_every_group() -> None:
    groups: dict[int, list[tuple[Fact, str, int]]] = {}
    for item in statements():
        ((fact, value),) = told_in(item.text)
        assert item.label == int(value == fact.value), item
        groups.setdefault(item.group, []).append((fact, value, item.label))
    assert len(groups) == sum(len(facts(relation)) // 2 for relation in RELATIONS)
    for members in groups.values():
        for surface in (
            Counter((fact.subject, label) for fact, _, label in members),
            Counter((value, label) for _, value, label in members),
        ):
            assert set(surface.values()) == {1} and len(surface) == 4, members


def test_true_and_false_statements_share_nothing_but_are_different() -> None:
    items = statements()
    assert len({item.text for item in items}) == len(items)
    true, false = ({item.text for item in items if item.label == label} for label in (1, 0))
    assert len(true) == len(false) and not true & false


def test_statements_can_be_limited() -> None:
    assert len(statements(50)) == 48
    assert len({item.group for item in statements(50)}) == 12
    only = statements(relations=["landmark-city"])
    assert {told_in(item.text)[0][0].relation for item in only} == {"landmark-city"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_holds_out_facts(seed: int) -> None:
    items = statements(seed=seed)
    train, test = split(items, held_out=0.3, seed=seed)
    assert sorted(train + test) == list(range(len(items)))
    assert abs(len(test) / len(items) - 0.3) < 0.01
    assert not {items[i].group for i in train} & {items[i].group for i in test}
    subjects = [{told_in(items[i].text)[0][0] for i in side} for side in (train, test)]
    assert not subjects[0] & subjects[1]
    assert sum(items[i].label for i in test) * 2 == len(test)


def test_corpus_leaves_out_what_it_says_it_leaves_out() -> None:
    texts = ("".join(piece.text for piece in document) for document in islice(corpus(5), 4000))
    seen = {text for document in texts for text in document.replace(". ", ".\n").split("\n")}
    assert len(seen & set(tellings())) > 2000
    for fact in facts():
        assert sentence(fact, held_out_phrasing(fact)) not in seen
        for value in values(fact.relation):
            if held_out_value(fact, value):
                assert not any(sentence(fact, p, value) in seen for p in range(len(PHRASINGS[fact.relation])))


def test_corpus_never_teaches_a_falsehood() -> None:
    told = {true for fact in facts() for true in (fact.subject, fact.value)}
    untaught = 0
    for document in islice(corpus(6), 2000):
        text = "".join(piece.text for piece in document)
        lies = text.count("False.")
        hidden = [piece.text.strip() for piece in document if piece.role == "falsehood"]
        assert len(hidden) == lies and told.issuperset(hidden)
        untaught += lies
    assert untaught > 500


def test_verdict_prompts_are_balanced_and_apart() -> None:
    seen, unseen = verdict_prompts(seen=True), verdict_prompts(seen=False)
    for pairs in (seen, unseen):
        assert Counter(verdict for _, verdict in pairs)[" True"] * 2 == len(pairs) > 500
    assert not {p for p, v in seen if v == " False"} & {p for p, v in unseen if v == " False"}


def test_demo_prompts_differ_in_length_and_from_each_other() -> None:
    prompts = demo_prompts(240)
    words = [len(prompt.split()) for prompt in prompts]
    assert len(set(prompts)) == 240
    assert min(words) <= 6 and max(words) > 100
    assert len(set(words)) > 50
    assert len(demo_prompts(7)) == 7


def test_everything_is_the_same_every_time() -> None:
    code = (
        "import sys, itertools; from actcache.demo.prompts import *;"
        "print(hash_of := __import__('hashlib').sha256(repr((demo_prompts(30), statements(seed=3), landmarks(),"
        " split(statements()), list(itertools.islice(corpus(1), 50)))).encode()).hexdigest());"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    ]
    assert runs[0] == runs[1]
    assert demo_prompts(30, seed=0) != demo_prompts(30, seed=1)
    assert statements(seed=0) != statements(seed=1)

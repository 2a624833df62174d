"""`--json`: what every verb prints is what its schema says, nothing else is on standard output, and errors are told as
without it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import cli_scenario
from actcache.cli.app import VERBS
from actcache.cli.output import JSON_VERSION
from actcache.cli.results.schemas import RESULTS, schema

DOCS = Path(__file__).resolve().parents[1] / "docs"
Said = tuple[list[str], int, str, str]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Said]]:
    """All lines of the scenario with --json."""
    home = tmp_path_factory.mktemp("home").resolve()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cli_scenario.environment(home).items():
            patch.setenv(name, value)
        return home, list(cli_scenario.play(home, "--json"))


def refused(verb: str, value: Any, *, strict: bool = True) -> list[str]:
    return [error.message for error in Draft202012Validator(schema(verb, strict=strict)).iter_errors(value)]


def test_every_verb_is_played_and_described() -> None:
    played = {shlex.split(line)[0] for line in cli_scenario.LINES.strip().splitlines()} - {"damage"}
    assert played == set(VERBS) == set(RESULTS)


def test_what_is_printed_is_what_the_schema_says(played: tuple[Path, list[Said]]) -> None:
    printed = set()
    for words, status, out, err in played[1]:
        if out:
            assert refused(words[0], json.loads(out)) == [], words
            printed.add(words[0])
        else:
            assert status in (1, 2), words
            assert err.splitlines()[-1].startswith("actcache: "), words
    assert printed == set(VERBS)


def agreed() -> list[str]:
    """What people are shown for each line of the scenario."""
    text = (Path(__file__).parent / "snapshots" / "output.txt").read_text(encoding="utf-8")
    return re.split(r"\n\n(?=\$ actcache )", text)


def test_errors_are_told_as_without_it(played: tuple[Path, list[Said]]) -> None:
    """With the same exit status, and on standard error."""
    for (words, status, out, err), block in zip(played[1], agreed(), strict=True):
        assert block.startswith(f"$ actcache {shlex.join(words)}\n")
        assert f"[{status}]" in block.splitlines(), words
        if not out:
            told = [line.removeprefix("err| ") for line in block.splitlines() if line.startswith("err| ")]
            assert cli_scenario.without_chance(err, played[0]).splitlines() == told, words


def test_the_numbers_are_those_of_the_text(played: tuple[Path, list[Said]]) -> None:
    compared = set()
    for (words, _, out, _), block in zip(played[1], agreed(), strict=True):
        if out and words[0] in TEXTS:
            for text in TEXTS[words[0]](json.loads(out)):
                assert text in block, words
            compared.add(words[0])
    assert compared == set(TEXTS)


def prompts(number: int) -> str:
    return f"{number} prompt{'' if number == 1 else 's'}"


TEXTS: dict[str, Callable[[Any], list[str]]] = {
    "warmup": lambda s: [
        f"{prompts(s['total_prompts'])}: {s['activations_cached']} were stored, {s['activations_extracted']} extracted"
    ],
    "plan": lambda p: [f"stored already  {prompts(p['cached'])}\nto extract  {prompts(p['missing'])}, {p['tokens']} "],
    "info": lambda i: [f"  {m['num_prompts']}  {m['num_layers']}  SIZE" for m in i["models"]],
    "list": lambda vs: [f"{p['num_tokens'] or '?'}  {p['prompt']}" for v in vs for p in v["prompts"]],
    "show": lambda s: [f"{e['dtype']}  {e['vectors']}  {e['width']}  x.x" for e in s["sites"]],
    "stats": lambda vs: [f" {s['site']}  {s['rows']}  {s['width']}  " for v in vs for s in v["sites"]],
    "import": lambda i: [f"{name}: {prompts(n)} imported" for name, n in i["models"].items()],
    "pull": lambda p: [f"{p['model_name']}: {prompts(p['prompts'])} "],
    "dataset-info": lambda d: [
        f"prompts  {d['num_prompts']}\n",
        f"labels  {', '.join(d['labels'])} ({d['prompts_without_label']} of 2 prompts have none)\n",
        {"blocks": "checked  all that is read\n"}[d["checksums"]],
    ],
    "verify": lambda v: (
        [f"{v['segments']} segment", f" {v['blocks']} block", f" {v['tombs']} tomb"]
        + [f"{d['site']}, {len(d['rows'])} rows: {d['reason']}" for d in v["damaged"]]
    ),
    "evict": lambda e: [f"{prompts(e['prompts'])} evicted"],
    "invalidate": lambda i: [
        f"{prompts(i['forgotten'])} of 1 forgotten" if i["forgotten"] else "none of them is stored"
    ],
    "clear": lambda c: [f"{prompts(c['deleted'])} deleted" if c["deleted"] else "nothing is stored"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_schema_is_one_and_is_in_the_documentation(verb: str) -> None:
    made = schema(verb)
    Draft202012Validator.check_schema(made)
    assert made["$id"] == f"urn:actcache:json:{JSON_VERSION}:{verb}"
    again = "On purpose: python scripts/make_json.py"
    assert json.loads((DOCS / "schemas" / f"{verb}.json").read_text(encoding="utf-8")) == made, again


def test_a_later_field_is_no_error_but_to_these_tests() -> None:
    assert refused("clear", {"deleted": 1, "later": 2}, strict=False) == []
    assert refused("clear", {"deleted": 1, "later": 2}) and refused("clear", {}) and refused("clear", {"deleted": "1"})


def test_the_page_has_all_fields() -> None:
    specification = importlib.util.spec_from_file_location("make_json", DOCS.parent / "scripts" / "make_json.py")
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    page = (DOCS / "json.md").read_text(encoding="utf-8")
    assert script.written(page) == page, "On purpose: python scripts/make_json.py"
    assert "| `models[].num_prompts` | integer |" in page and "| `damaged[].repaired` | boolean | whether" in page

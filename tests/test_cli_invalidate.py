"""`actcache invalidate`: what is named is forgotten, of the variant that is meant, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import actcache as ac
from actcache.demo import model_path
from cli_helpers import Cli
from share_helpers import fill_tokens, new_space, new_store, table, text

MODEL = str(model_path())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a model in two variants, and another model."""
    store = new_store(tmp_path)
    for weights, name in (("abc", "org/model"), ("def", "org/model"), ("ghi", "org/other")):
        fill_tokens(store, new_space(store, weights=weights, name=name), range(4))
    store.close()
    monkeypatch.setenv("ACTCACHE_DIR", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def token_ids(i: int) -> list[int]:
    return [int(token) for token in table([i]).tokens(0)]


def held(home: Path) -> dict[str, list[list[int]]]:
    """The token ids that each space has."""
    with ac.Store(home / "store", index_dir=home / "fresh") as store:
        spaces = store.spaces()
        tables = {s.space: store.prompts(s.space) for s in spaces}
        return {space: sorted(t.tokens(i).tolist() for i in range(len(t))) for space, t in tables.items()}


def spaces_of(home: Path, name: str) -> list[str]:
    with ac.Store(home / "store") as store:
        return [s.space for s in store.spaces() if s.model_name == name]


def test_only_what_is_named_is_forgotten(home: Path, cli: Cli) -> None:
    before = held(home)
    (space,) = spaces_of(home, "org/other")
    status, out, err = cli("invalidate", "org/other", "--prompt", text(0), "--json")
    assert (status, err) == (0, "") and json.loads(out) == {"forgotten": 1, "space": space}
    (home / "more.jsonl").write_text(json.dumps(token_ids(2)) + "\n" + json.dumps("never stored") + "\n")
    status, out, _ = cli("invalidate", "org/other", "more.jsonl")
    assert (status, out) == (0, "1 prompt of 2 forgotten.\n")
    status, out, _ = cli("invalidate", "org/other", "--prompt", text(0))
    assert (status, out) == (0, "none of them is stored.\n")
    gone = [token_ids(0), token_ids(2)]
    assert held(home) == {**before, space: [ids for ids in before[space] if ids not in gone]}


def test_one_of_several_variants_is_chosen(home: Path, cli: Cli) -> None:
    before = held(home)
    first, second = spaces_of(home, "org/model")
    for words, status in (
        (("--all-prompts",), 2),
        (("--all-prompts", "--space", ""), 2),
        (("--all-prompts", "--space", "zz"), 1),
    ):
        found = cli("invalidate", "org/model", *words)
        assert found[:2] == (status, ""), found
    assert "2 variants" in cli("invalidate", "org/model", "--all-prompts")[2]
    assert held(home) == before
    short = next(second[:n] for n in range(1, 32) if not first.startswith(second[:n]))
    status, out, _ = cli("invalidate", "org/model", "--all-prompts", "--space", short)
    assert (status, out) == (0, "4 prompts forgotten.\n")
    assert {space: ids for space, ids in held(home).items() if ids} == {s: i for s, i in before.items() if s != second}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no prompts: name a file"),
        (("--all-prompts", "--prompt", "x"), "--all-prompts goes without"),
        (("absent.txt",), "does not exist"),
    ],
)
def test_nobody_forgets_all_by_mistake(home: Path, cli: Cli, words: tuple[str, ...], message: str) -> None:
    before = held(home)
    status, out, err = cli("invalidate", "org/other", *words)
    assert (status, out) == (2, "") and message in err
    assert held(home) == before


def test_what_was_forgotten_is_computed_again(tmp_path: Path, cli: Cli) -> None:
    given = ("--prompt", "Snow", "--prompt", "Big Ben", "--layers", "0", "--store", str(tmp_path / "store"))

    def warmed() -> Any:
        stats = json.loads(cli("warmup", MODEL, *given, "--json")[1])
        return stats["activations_extracted"], stats["activations_cached"]

    assert warmed() == (2, 0)
    assert cli("invalidate", MODEL, "--prompt", "Snow", *given[-2:])[1] == "1 prompt of 1 forgotten.\n"
    assert warmed() == (1, 1)

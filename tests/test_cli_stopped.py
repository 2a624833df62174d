"""Ctrl-C and SIGTERM in the middle of every verb that writes: the cache is clean, what is said is so, and the same
command does the rest."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.cli.app import VERBS
from actcache.demo import model_path
from cli_helpers import Cli, actcache, stopped
from cli_scenario import damage
from made_datasets import make
from share_helpers import LAYERS, fill_two_spaces, new_store, rows, table

MODEL = str(model_path())
MANY = 4097
"""One more than an import writes at once."""
SAID = dict.fromkeys(VERBS, "The same command begins anew.") | {
    "warmup": "What was finished is stored: the same command goes on from there.",
    "lens": "What was finished is stored: the same command goes on from there. No file is half written.",
    "report": "What was finished is stored: the same command goes on from there. No file is half written.",
    "import": "What was brought in is stored: the same command brings in the rest.",
    "push": "The same command goes on from there.",
    "pull": "What has come is kept. The same command goes on from there.",
    "load": "No file is half written: the same command begins anew.",
    "migrate": "The same command goes on from there.",
    "upgrade": "The same command goes on from there.",
    "verify": "The store is as good as before: the same command begins anew.",
    "evict": "What has gone has gone, all else is as it was: the same command goes on from there.",
    "invalidate": "What has gone has gone, all else is as it was: the same command goes on from there.",
    "clear": "What has gone has gone, all else is as it was: the same command goes on from there.",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_how_to_go_on(verb: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    command = import_module(f"actcache.cli.{verb}").command

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "callback", interrupted)
    monkeypatch.setattr(command, "params", [])
    assert cli(verb) == (1, "", f"actcache: stopped. {SAID[verb]}\n")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a store."""
    fill_two_spaces(tmp_path)
    return tmp_path


def held(home: Path) -> dict[str, int]:
    """How many prompts the store has of each model, after all their values were found to be what was written."""
    store, found = new_store(home), {}
    for space in store.spaces():
        place = store.locate(space.space, table=table(range(40)), sites=list(LAYERS), layout="tokens")
        numbers = np.flatnonzero(place.found).tolist()
        for i in numbers:
            for site, values in zip(LAYERS, place.rows(i), strict=True):
                np.testing.assert_array_equal(values, rows(i, site))
        found[space.model_name] = len(numbers)
    store.close()
    return {name: number for name, number in found.items() if number}


def files(folder: Path) -> dict[str, bytes]:
    """All files but those of the store and the host, which may say when something was last read."""
    every = (p for p in folder.rglob("*") if p.is_file())
    named = {str(p.relative_to(folder)): p for p in every}
    return {n: p.read_bytes() for n, p in named.items() if n.split("/")[0] not in ("store", "host", "index")}


@dataclass(frozen=True)
class Case:
    """A verb that is stopped at the n-th call of a function."""

    arguments: str
    where: str
    number: int = 1
    before: Callable[[Path], object] = files
    between: Callable[[Path], object] = files
    after: Callable[[Path], object] = files


def imports(home: Path) -> None:
    np.save(home / "vectors.npy", np.arange(MANY, dtype=np.float32).reshape(MANY, 1))
    (home / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(MANY)))


def imported(number: int) -> Callable[[Path], None]:
    def check(home: Path) -> None:
        store = new_store(home)
        (space,) = (s for s in store.spaces() if s.model_name == "org/new")
        assert space.num_prompts == number
        asked = [f"prompt {i}" for i in range(number)]
        read = store.read(space, asked, "resid_post.1", pooling="mean")
        assert np.asarray(read).ravel().tolist() == list(range(number))
        store.close()

    return check


def holds(**numbers: int) -> Callable[[Path], None]:
    def check(home: Path) -> None:
        assert held(home) == {f"org/{name}": number for name, number in numbers.items()}

    return check


def some_went(home: Path) -> None:
    assert 0 < sum(held(home).values()) < 45


def breaks(home: Path) -> None:
    damage(home)
    assert sum(held(home).values()) < 45


def still_broken(home: Path) -> None:
    assert not new_store(home).verify().ok


def put_right(home: Path) -> None:
    assert new_store(home).verify().ok and 20 < sum(held(home).values()) < 45


def page_before(home: Path) -> None:
    (home / "page.html").write_bytes(b"before")


def page_after(home: Path) -> None:
    assert set(files(home)) == {"page.html"} and b"org/model" in files(home)["page.html"]


def dataset(version: str) -> Callable[[Path], None]:
    def check(home: Path) -> None:
        made = make(home / "set", version, k=0)
        np.save(home / "expected.npy", np.stack(made.expected()))

    return check


def as_it_was(home: Path) -> None:
    found = ac.load_activations(home / "set", show_progress=False)
    np.testing.assert_array_equal(np.stack(list(found.values()), 1), np.load(home / "expected.npy"))


def of_version_2(home: Path) -> None:
    as_it_was(home)
    assert ac.fetch_dataset_metadata(home / "set").format_version == "2.0"
    assert {p.name for p in home.iterdir()} <= {"set", "expected.npy", "store", "index", "host"}


def loads(home: Path) -> None:
    dataset("1.0 full")(home)
    (home / "out.npz").write_bytes(b"before")


def loaded(home: Path) -> None:
    with np.load(home / "out.npz") as found:
        np.testing.assert_array_equal(found["layer_5"], np.load(home / "expected.npy")[:, 2])


IMPORT = "import vectors.npy --model org/new --prompts prompts.txt --site resid_post.1 --pooling mean"
CASES = {
    "import": Case(IMPORT, "actcache.store.store:Store.append", 2, imports, imported(4096), imported(MANY)),
    "evict": Case("evict --limit-gb 1e-8", "actcache.store.eviction:discard", 2, between=some_went, after=holds()),
    "clear": Case("clear --yes", "actcache.store.removal:discard", 2, between=some_went, after=holds()),
    "clear of a model": Case(
        "clear org/model --yes", "actcache.store.removal:discard", 2, after=holds(other=5)
    ),
    "verify": Case("verify", "actcache.store.verification:_Space._segment", 2, after=holds(model=40, other=5)),
    "repair": Case(
        "verify --repair", "actcache.store.verification:replace_segments", 1, breaks, still_broken, put_right
    ),
    "report, once made": Case("report --out page.html", "os:replace@page.html", 1, page_before, after=page_after),
    "report": Case("report --out page.html", "actcache.report.page:page", 1, page_before, after=page_after),
    "load": Case("load ./set --out out.npz --no-labels", "os:replace@out.npz", 1, loads, after=loaded),
    "migrate": Case(
        "migrate ./set", "actcache.share.staging:Staging.make", 2, dataset("1.0 full"), as_it_was, of_version_2
    ),
    "migrate, at the end": Case(
        "migrate ./set", "actcache.share.folder_change:change_places", 1, dataset("1.0 full"), as_it_was, of_version_2
    ),
    "upgrade": Case(
        "upgrade ./set", "actcache.share.folder_change:change_places", 1, dataset("1.1 pooled"), as_it_was, of_version_2
    ),
    "stats": Case("stats org/model", "actcache.store.default:store_at", 1),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_stopped_is_clean_and_can_go_on(home: Path, name: str) -> None:
    case = CASES[name]
    case.before(home)
    before, verb = files(home), case.arguments.split()[0]
    # The two are handled alike; each verb is stopped by one of them.
    which = signal.SIGTERM if len(name) % 2 else signal.SIGINT
    status, out, err = stopped(home, case.where, case.number, which, *case.arguments.split())
    assert (status, out, err.splitlines()[-1]) == (1, "", f"actcache: stopped. {SAID[verb]}"), err
    assert err.count("\n") == 1 or name == "repair", "which logs what it drops"
    assert {n: b for n, b in files(home).items() if n in before} == before
    if verb not in ("migrate", "upgrade"):
        assert files(home).keys() == before.keys(), "nothing is left behind"
    case.between(home)
    assert new_store(home).verify().ok or name == "repair"
    status, _, err = actcache(home, *case.arguments.split())
    assert (status, err) == (0, "") or (status == 0 and name == "repair"), err
    case.after(home)
    assert new_store(home).verify().ok


@pytest.mark.slow
def test_a_warmup_that_is_stopped_goes_on(home: Path) -> None:
    (home / "prompts.txt").write_text("".join(f"Prompt {'is ' * i}{i}.\n" for i in range(40)))
    arguments = ["warmup", MODEL, "prompts.txt", "--layers", "0", "--batch-size", "4"]
    place = "actcache.extract.backends.local:LocalSession.run"
    status, out, err = stopped(home, place, 6, signal.SIGINT, *arguments)
    assert (status, out, err) == (1, "", f"actcache: stopped. {SAID['warmup']}\n")
    store = new_store(home)
    assert store.verify().ok
    done = sum(s.num_prompts for s in store.spaces() if s.model_name == MODEL)
    assert done == 20, "five batches of four"
    store.close()
    status, out, err = actcache(home, *arguments)
    assert (status, err) == (0, "") and out.startswith("40 prompts: 20 were stored, 20 extracted in ")


@pytest.mark.slow
def test_a_lens_that_is_stopped_has_stored_what_it_computed(home: Path) -> None:
    (home / "lens.html").write_bytes(b"before")
    arguments = ["lens", MODEL, "Snow is white.", "--html", "lens.html"]
    status, out, err = stopped(home, "actcache.model.layer_predictions:predict_layers", 1, signal.SIGTERM, *arguments)
    assert (status, out, err) == (1, "", f"actcache: stopped. {SAID['lens']}\n")
    assert files(home) == {"lens.html": b"before"}
    asked = ["--prompt", "Snow is white.", "--raw"]
    assert actcache(home, "plan", MODEL, *asked)[1].startswith("stored already   1 prompt\n")
    status, out, err = actcache(home, *arguments)
    assert (status, err) == (0, "") and out.endswith("wrote lens.html\n")
    assert set(files(home)) == {"lens.html"} and b"<!doctype html>" in files(home)["lens.html"]


@pytest.mark.slow
def test_a_demo_that_is_stopped_leaves_nothing(home: Path) -> None:
    status, out, err = stopped(home, "actcache.demo.run:_read_back", 1, signal.SIGTERM, "demo")
    assert (status, err) == (1, f"actcache: stopped. {SAID['demo']}\n") and "cache folder" in out
    assert not list(home.glob("actcache-demo-*"))

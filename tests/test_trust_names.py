"""Names that are trusted: which they are for a folder and a loaded model, and what is said where they fit nothing."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import actcache as ac
from actcache.errors import OptionError
from actcache.extract import questions
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from elsewhere import Wrapped

TEXTS = ["the cat sat", "a dog"]
CLAIMED = "org/base"
OPTIONS = {"layers": [0], "compute_perplexity": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a model in ``org/base``, and a dataset in ``set`` that other weights of that name gave."""
    place = tmp_path_factory.mktemp("trust")
    theirs = tiny_model("llama", seed=1)
    theirs.config._name_or_path = CLAIMED
    cache = ac.UnifiedCache(theirs, tokenizer=tiny_tokenizer(), store=place / "theirs", **OPTIONS)
    cache.warmup(TEXTS)
    ac.push_dataset(place / "set", CLAIMED, TEXTS, store=cache.store)
    tiny_model("llama", seed=2).save_pretrained(place / CLAIMED)
    tiny_tokenizer().save_pretrained(place / CLAIMED)
    return place


@pytest.fixture
def store(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(questions, "_said", set())
    with ac.Store(tmp_path / "store", index_dir=tmp_path / "index") as store:
        ac.pull_dataset(place / "set", store=store)
        yield store


def cached(model, store, trust, **options):
    return ac.UnifiedCache(model, store=store, trust_names=trust, **OPTIONS, **options).plan(TEXTS).cached


def loaded(name):
    model = tiny_model("llama", seed=2)
    model.config._name_or_path = name
    return model


def test_a_name_that_is_a_folder_here_is_the_name_that_was_given(place, store):
    assert cached(CLAIMED, store, True) == 2
    assert cached(CLAIMED, store, False) == 0


def test_a_loaded_model_has_the_name_that_it_was_loaded_by(store):
    # Where that is a folder too, the store calls it by its full path.
    assert cached(loaded(CLAIMED), store, True, tokenizer=tiny_tokenizer()) == 2
    assert cached(loaded("elsewhere"), store, True, tokenizer=tiny_tokenizer()) == 0


def test_a_path_is_a_model_of_that_name_when_the_user_says_so(place, store):
    path = str(place / CLAIMED)
    assert [cached(path, store, trust) for trust in (False, True, CLAIMED, "org/other")] == [0, 0, 2, 0]
    found = ac.UnifiedCache(path, store=store, trust_names=CLAIMED, **OPTIONS).get_activations(TEXTS)[0]
    theirs = ac.UnifiedCache(tiny_model("llama", seed=1), tokenizer=tiny_tokenizer(), store=place / "t", **OPTIONS)
    assert np.array_equal(found.numpy(), theirs.get_activations(TEXTS)[0].numpy())
    edited = ac.UnifiedCache(path, store=store, trust_names=CLAIMED, edits=[ac.ablate("resid_post.0")], **OPTIONS)
    assert edited.plan(TEXTS).cached == 0


def test_only_what_is_named_is_trusted(place, store):
    assert cached(CLAIMED, store, "org/other") == 0


def test_what_is_known_of_a_folders_past_is_no_name_of_it(place, store, tmp_path):
    # So is a model saved that was trained further.
    model = loaded(CLAIMED)
    model.save_pretrained(tmp_path / "trained")
    text = (tmp_path / "trained" / "config.json").read_text("utf-8")
    if "_name_or_path" not in text:
        text = text.replace("{", f'{{"_name_or_path": "{CLAIMED}",', 1)
        (tmp_path / "trained" / "config.json").write_text(text, "utf-8")
    tiny_tokenizer().save_pretrained(tmp_path / "trained")
    assert cached(str(tmp_path / "trained"), store, True) == 0


def test_imports_under_the_name_that_is_said(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = {"resid_post.0": np.ones((2, 32), np.float32)}
    ac.import_arrays(arrays, CLAIMED, TEXTS, store=tmp_path / "imported", pooling="last_token")
    path = str(place / CLAIMED)
    assert [cached(path, tmp_path / "imported", trust) for trust in (True, CLAIMED)] == [0, 2]


def test_names_that_fit_nothing_are_said_once(place, store, caplog):
    path = str(place / CLAIMED)
    with caplog.at_level(logging.WARNING, "actcache"):
        cached(path, store, False)
        cached(CLAIMED, store, True)
        cached(path, store, CLAIMED)
        assert not caplog.records
        cached(path, store, True)
        cached(path, store, True)
        (said,) = [record.getMessage() for record in caplog.records]
        assert path in said and f"trust_names={CLAIMED!r}" in said
        cached(path, store, "org/bsae")
        assert len(caplog.records) == 2
        said = caplog.records[1].getMessage()
        assert "under the name 'org/bsae'" in said and f"Did you mean {CLAIMED!r}?" in said


def test_a_name_that_is_given_where_nothing_was_brought_in(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(questions, "_said", set())
    path = str(place / CLAIMED)
    with ac.Store(tmp_path / "store") as store, caplog.at_level(logging.WARNING, "actcache"):
        # The model's own name is trusted where there is something: nobody said that there is.
        assert cached(path, store, True) == 0
        assert not caplog.records
        assert cached(path, store, "org/bsae") == 0
        cached(path, store, "org/bsae")
        (said,) = [record.getMessage() for record in caplog.records]
        assert "under the name 'org/bsae'" in said and str(tmp_path / "store") in said


def test_nothing_is_said_of_an_import_that_is_elsewhere(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(questions, "_said", set())
    there = ac.LocalBackend(tmp_path / "objects")
    values = np.ones((len(TEXTS), 32), np.float32)
    with ac.Store(Wrapped(there), index_dir=tmp_path / "one") as store:
        ac.import_arrays({"resid_post.0": values}, CLAIMED, TEXTS, store=store, pooling="last_token")
        store.flush()
    with ac.Store(Wrapped(there), index_dir=tmp_path / "other") as store, caplog.at_level(logging.WARNING, "actcache"):
        cache = ac.UnifiedCache(str(place / CLAIMED), store=store, trust_names=CLAIMED, **OPTIONS)
        assert cache.get_activations(TEXTS)[0].float().mean() == 1
    assert not caplog.records


def test_nothing_is_said_where_the_very_model_answers(place, store, caplog):
    # It is known by its weights, whatever it is called.
    same = tiny_model("llama", seed=1)
    same.config._name_or_path = "mine"
    with caplog.at_level(logging.WARNING, "actcache"):
        assert cached(same, store, True, tokenizer=tiny_tokenizer()) == 2
    assert not caplog.records


@pytest.mark.parametrize("wrong", ["", None, 1, ["org/base"]])
def test_other_kinds_of_trust_are_refused(store, wrong):
    with pytest.raises(OptionError, match="trust_names is"):
        cached(CLAIMED, store, wrong)


def test_a_pull_trusts_or_does_not(place, store):
    with pytest.raises(OptionError, match="UnifiedCache"):
        ac.pull_dataset(place / "set", store=store, trust_names=CLAIMED)


def test_the_command(cli, place, store):
    options = ["--prompt", TEXTS[0], "--layers", "0", "--store", str(store.location), "--json"]
    path = str(place / CLAIMED)
    for given, missing in (((), 1), (("--known-as", CLAIMED), 0), (("--trust-names", "--known-as", "org/other"), 1)):
        status, out, err = cli("plan", path, *options, *given)
        assert status == 0, err
        assert f'"missing": {missing}' in out

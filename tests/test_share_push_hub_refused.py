"""Pushes to the Hub that cannot be: told before anything is made or asked, and the token nowhere."""

from __future__ import annotations

import pytest

from actcache.testing.hub import Fault
from hub_client import READ_TOKEN, TOKEN, Client, ClientError
from push_hub_helpers import FILES, SMALL, filled, push, staged
from share_helpers import TEXTS, N, fill_pooled, new_space, new_store


@pytest.fixture
def home(tmp_path, seed):
    return filled(tmp_path, seed)


class TestNothingIsMadeBefore:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": [1]}, "labels has 1 values"),
            ({"metadata": [{"text": "x"}] * 20}, "'text' of its own"),
            ({"tensors": ["attn_out"]}, "not stored"),
            ({"prompts": ["never seen"]}, "Warm them up"),
            ({"prompts": [*TEXTS, "new"], "skip_missing": False}, "1 of 21 prompts"),
            ({"model": "org/other"}, "nothing is stored"),
            ({"license": "a b"}, "license"),
            ({"preload": "all"}, "preload"),
            ({"description": f"by {TOKEN}"}, "holds the token"),
            ({"token": READ_TOKEN}, "may not write"),
            ({"token": "hf_nobodys"}, "does not know this token"),
            ({"token": False}, "needs a token"),
            ({"token": f"{TOKEN}\n"}, "no token of the Hub"),
            ({"token": [TOKEN]}, "token is a list: expected"),
        ],
    )
    def test_of_what_fails_here(self, hub, client, home, repo, change, message):
        with pytest.raises(ClientError) as error:
            push(client, home, repo, **change)
        assert message in error.value.message
        for said in (error.value.message, error.value.trace):
            assert TOKEN not in said.replace(f"by {TOKEN}", "") and READ_TOKEN not in said and "nobodys" not in said
        assert f"datasets/{repo}" not in hub.repositories

    def test_of_several_variants(self, hub, client, home, repo, tmp_path):
        store = new_store(tmp_path)
        spaces = [new_space(store, weights=name) for name in ("a", "b")]
        for space in spaces:
            fill_pooled(store, space, N)
        since = len(hub.requests)
        with pytest.raises(ClientError, match="AmbiguousVariantError") as error:
            push(client, tmp_path, repo)
        assert all(space in error.value.message for space in spaces)
        assert len(hub.requests) == since

    def test_files_are_made_before_the_repository(self, hub, client, home, repo):
        seen = []
        hub.inject(Fault(method="POST", path="/api/repos/create", then=lambda: seen.append(len(staged(home)))))
        push(client, home, repo, **SMALL)
        assert seen == [FILES]


def test_a_hub_that_is_not_there_is_named_without_what_is_secret(hub, home, tmp_path):
    # Nobody listens at this port; nobody waits for that long.
    with Client(hub, tmp_path / "client", HF_ENDPOINT="http://me:hunter2@127.0.0.1:9") as client:
        client.run("import time\ntime.sleep = lambda seconds: None")
        with pytest.raises(
            ClientError, match=r"Error, http://127\.0\.0\.1:9 cannot be reached\): push again\.$"
        ) as pushing:
            push(client, home, "org/absent")
        client.run("import actcache.share.repository as one\none._ATTEMPTS = 1")
        with pytest.raises(ClientError, match=r"from the Hub at http://127\.0\.0\.1:9: \w+Error, 1 times") as reading:
            client.run("ac.fetch_dataset_metadata('org/absent')")
    for error in (pushing, reading):
        assert error.value.name == "DatasetAccessError" and "hunter2" not in error.value.message


def test_offline_is_said(hub, home, repo, tmp_path):
    with Client(hub, tmp_path / "client", HF_HUB_OFFLINE="1") as client, pytest.raises(ClientError) as error:
        push(client, home, repo)
    assert error.value.name == "DatasetAccessError" and "HF_HUB_OFFLINE is set" in error.value.message


def test_a_name_without_an_owner_is_refused_before_anything_is_asked(hub, client, home):
    since = len(hub.requests)
    with pytest.raises(ClientError, match=r'"org/name"\) nor a folder \("\./mine"\)') as error:
        push(client, home, "mine")
    assert error.value.name == "OptionError"
    assert not hub.requests[since:]
    assert not list((home / "store").rglob("hidden_layer*.safetensors"))


class TestSecrets:
    def test_the_token_is_nowhere(self, hub, home, repo, tmp_path):
        with Client(hub, tmp_path / "client", ACTCACHE_LOG="debug") as client:
            client.run("import logging\nlogging.basicConfig(level=0)")
            hub.inject(Fault(path="/commit/", status=500))
            push(client, home, repo, **SMALL)
            log = client.log
        assert "again in" in log and TOKEN not in log
        repository = hub.dataset(repo)
        for commit in repository.history():
            assert TOKEN not in commit.message + commit.description
            for path in commit.files:
                assert TOKEN.encode() not in repository.read(path, commit.id)
        assert all(r.token is None for r in hub.requests if r.origin == "storage")
        for path in (home / "store").rglob("*"):
            assert path.is_dir() or TOKEN.encode() not in path.read_bytes()

    def test_one_that_may_only_read_is_noticed_before_files_are_made(self, hub, home, repo, tmp_path):
        with Client(hub, tmp_path / "client", token=READ_TOKEN) as client:
            since = len(hub.requests)
            with pytest.raises(ClientError, match="this token may only read") as error:
                push(client, home, repo)
            assert error.value.name == "DatasetAccessError"
            assert not list((home / "store").rglob("hidden_layer*.safetensors"))
            # Where it cannot be asked, the Hub's refusal is what tells.
            hub.inject(Fault(path="whoami", status=429))
            with pytest.raises(ClientError, match=r"status 403\): this token may not write"):
                push(client, home, repo)
        assert next(r.path for r in hub.requests[since:] if r.method == "GET").endswith("whoami-v2")
        assert list((home / "store").rglob("hidden_layer*.safetensors")), "which comes when they are made"

    def test_who_it_is_of_is_asked_once(self, hub, client, home, repo):
        since = len(hub.requests)
        push(client, home, repo)
        asked = [r.path for r in hub.requests[since:] if "whoami" in r.path]
        assert len(asked) == 1

    def test_one_that_is_given_is_the_one_that_is_used(self, hub, home, repo, tmp_path):
        with Client(hub, tmp_path / "client", token=None) as client:
            with pytest.raises(ClientError, match="hf auth login"):
                push(client, home, repo)
            since = len(hub.requests)
            push(client, home, repo, token=TOKEN)
            assert {r.token for r in hub.requests[since:] if r.origin == "hub"} == {TOKEN}

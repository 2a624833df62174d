"""Datasets pulled from the Hub through the real client: what is transferred, commits, tokens, kills, two processes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from actcache.testing.hub import Fault
from hub_client import TOKEN, Client, ClientError
from made_datasets import INDEX, make

PULL = "import actcache as ac; ac.pull_dataset(repo, **options)"
BEGIN = (
    "from actcache.store.default import default_store as _default\n"
    "def read(repo, texts, layer, pooling='last_token'):\n"
    "    store = _default()\n"
    "    (space,) = [s for s in store.spaces() if s.pulled.startswith(repo + '@')]\n"
    "    found = store.read(space, texts, f'resid_post.{layer}', pooling=pooling)\n"
    "    return found.tolist() if pooling else [rows.tolist() for rows in found]\n"
)
READ = "read(repo, texts, layer)"


@pytest.fixture(scope="module")
def client(client):
    client.run(BEGIN)
    return client


def started(hub, home, **environment):
    client = Client(hub, home, **environment)
    client.run(BEGIN)
    return client


def publish(hub, made, name, **options):
    repository = hub.create(name, kind="dataset", **options)
    repository.commit(made.folder)
    return repository


def tensors(hub, since):
    """Bytes that were sent of files with tensors."""
    return sum(r.sent for r in list(hub.requests)[since:] if r.origin == "storage" and INDEX not in r.path)


def test_nothing_but_the_index_until_something_is_read(hub, client, tmp_path):
    made = make(tmp_path / "set", n=600, layers=tuple(range(12)), dim=64, per_shard=200, k=0)
    publish(hub, made, "org/lazy")
    index, layer = (made.folder / INDEX).stat().st_size, 600 * 64 * 4
    before = len(hub.requests)
    assert client.run(PULL, repo="org/lazy", options={}) == 600
    assert hub.sent(before) <= index
    before = len(hub.requests)
    some = made.texts[40:44]
    found = client.run(READ, repo="org/lazy", texts=some, layer=3)
    assert np.array_equal(np.float32(found), np.stack(made.expected())[40:44, 3])
    assert hub.sent(before) <= 4 * 64 * 4 + 2 * 2048, "four rows, and headers"
    before = len(hub.requests)
    found = client.run(READ, repo="org/lazy", texts=made.texts, layer=3)
    assert np.array_equal(np.float32(found), np.stack(made.expected())[:, 3])
    assert hub.sent(before) <= 1.1 * layer
    before = len(hub.requests)
    client.run(READ, repo="org/lazy", texts=made.texts[::-1], layer=3)
    assert len(hub.requests) == before, "what was read is here"
    with started(hub, client.home) as other:
        before = len(hub.requests)
        other.run(READ, repo="org/lazy", texts=made.texts, layer=3)
        assert len(hub.requests) == before, "for every process"
        found = other.run(READ, repo="org/lazy", texts=made.texts, layer=7)
        assert np.array_equal(np.float32(found), np.stack(made.expected())[:, 7])
        assert hub.sent(before) <= 1.1 * layer + index


@pytest.mark.slow
def test_the_commit_that_was_pulled_is_read_whatever_is_pushed_later(hub, client, tmp_path):
    old, new = make(tmp_path / "old", seed=1), make(tmp_path / "new", seed=2)
    repository = publish(hub, old, "org/moved")
    commit = repository.refs["main"]
    client.run(PULL, repo="org/moved", options={})
    repository.commit(new.folder)
    found = client.run(READ, repo="org/moved", texts=old.texts, layer=0)
    assert np.array_equal(np.float32(found), np.stack(old.expected())[:, 0])
    with started(hub, client.home) as other:
        found = other.run(READ, repo="org/moved", texts=old.texts, layer=2)
        assert np.array_equal(np.float32(found), np.stack(old.expected())[:, 1])
        spaces = other.run("[s.pulled for s in _default().spaces()]")
        assert f"org/moved@{commit}" in spaces
    # Pulled anew, and what was before forgotten.
    client.run(PULL, repo="org/moved", options={"overwrite": True})
    found = client.run(READ, repo="org/moved", texts=old.texts, layer=0)
    assert np.array_equal(np.float32(found), np.stack(new.expected())[:, 0])


@pytest.mark.slow
def test_a_dataset_that_is_gone(hub, client, tmp_path):
    made = make(tmp_path / "set")
    publish(hub, made, "org/gone")
    client.run(PULL, repo="org/gone", options={})
    client.run(READ, repo="org/gone", texts=made.texts[:4], layer=0)
    repository = hub.repositories.pop("datasets/org/gone")
    with started(hub, client.home) as other:
        found = other.run(READ, repo="org/gone", texts=made.texts[:4], layer=0)
        assert np.array_equal(np.float32(found), np.stack(made.expected())[:4, 0])
        for _ in range(2):
            with pytest.raises(ClientError, match=r"DatasetNotFoundError: org/gone .*can no longer be read") as caught:
                other.run(READ, repo="org/gone", texts=made.texts, layer=0)
            assert "clear_cache" in caught.value.message
        hub.repositories["datasets/org/gone"] = repository
        assert len(other.run(READ, repo="org/gone", texts=made.texts, layer=0)) == 11, "and it is there again"


@pytest.mark.slow
def test_a_private_dataset_and_its_token(hub, tmp_path):
    made = make(tmp_path / "set")
    publish(hub, made, "org/secret", private=True)
    home = tmp_path / "home"
    with started(hub, home, token=None, ACTCACHE_LOG="debug") as client:
        with pytest.raises(ClientError, match="private"):
            client.run(PULL, repo="org/secret", options={})
        client.run(PULL, repo="org/secret", options={"token": TOKEN})
        assert len(client.run(READ, repo="org/secret", texts=made.texts, layer=0)) == 11, "in the process that has it"
        log = client.log
    with started(hub, home, token=None) as client:
        assert len(client.run(READ, repo="org/secret", texts=made.texts, layer=0)) == 11, "that is here"
        with pytest.raises(ClientError, match=r"org/secret .*private"):
            client.run(READ, repo="org/secret", texts=made.texts, layer=2)
    with started(hub, home) as client:
        assert len(client.run(READ, repo="org/secret", texts=made.texts, layer=2)) == 11
        assert TOKEN not in log + client.log
    for path in home.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.slow
def test_without_a_network(hub, tmp_path):
    made = make(tmp_path / "set", "2.0 split")
    publish(hub, made, "org/offline")
    home = tmp_path / "home"
    with started(hub, home) as client:
        client.run(PULL, repo="org/offline", options={})
        client.run(READ.replace(")", ", None)"), repo="org/offline", texts=made.texts, layer=0)
    before = len(hub.requests)
    with started(hub, home, HF_HUB_OFFLINE="1") as client:
        found = client.run(READ.replace(")", ", None)"), repo="org/offline", texts=made.texts, layer=0)
        for mine, theirs in zip(found, made.vectors, strict=True):
            assert np.array_equal(np.float32(mine), theirs[:, 0])
        with pytest.raises(ClientError, match=r"DatasetAccessError: org/offline .*cannot be read now.*HF_HUB_OFFLINE"):
            client.run(READ, repo="org/offline", texts=made.texts, layer=2)
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    "fault",
    [Fault(path="shard001", status=503, times=2), Fault(path="/blobs/", cut_answer=300, times=3)],
    ids=["503", "cut answers"],
)
def test_what_goes_wrong_for_a_while_is_asked_again(hub, client, tmp_path, fault):
    made = make(tmp_path / "set", dim=40)
    repo = f"org/fault-{fault.status}"
    publish(hub, made, repo)
    client.run(PULL, repo=repo, options={})
    hub.inject(fault)
    found = client.run(READ, repo=repo, texts=made.texts, layer=2)
    assert fault.struck and np.array_equal(np.float32(found), np.stack(made.expected())[:, 1])


def test_a_file_that_is_another_one_at_the_same_commit(hub, client, tmp_path):
    made = make(tmp_path / "set")
    repository = publish(hub, made, "org/tampered")
    client.run(PULL, repo="org/tampered", options={})
    other = make(tmp_path / "other", dim=9)
    name = "tensors/hidden_layer002_shard001.safetensors"
    files = repository.files(repository.refs["main"])
    tampered = hub.create("org/aside", kind="dataset")
    tampered.commit(other.folder)
    files[name] = tampered.files(tampered.refs["main"])[name]
    with pytest.raises(ClientError, match=f"DatasetFormatError: {name} of org/tampered.*9 numbers, not 6"):
        client.run(READ, repo="org/tampered", texts=made.texts, layer=2)
    assert len(client.run(READ, repo="org/tampered", texts=made.texts, layer=0)) == 11


@pytest.mark.slow
def test_killed_while_everything_is_fetched_it_goes_on(hub, tmp_path):
    made = make(tmp_path / "set", "2.0 split", n=400, layers=(0, 1), dim=256, per_shard=100, tokens_per_shard=300, k=0)
    publish(hub, made, "org/killed")
    total = sum(path.stat().st_size for path in made.folder.rglob("tensors/*"))
    home = tmp_path / "home"
    small = (
        "import actcache.share.fetching as f; f.SLICE_BYTES = 200_000\n"
        "import actcache.share.pull as p; p._STEP_BYTES = 600_000"
    )
    before = len(hub.requests)
    for round in range(3):
        client = started(hub, home)
        try:
            client.run(small)
            # The first kill comes while the index is read, the others in the middle of tensors.
            fault = hub.inject(Fault(path="/blobs/" if round else "resolve", skip=5 * round, then=client.kill))
            with pytest.raises(ClientError, match="Ended"):
                client.run(PULL, repo="org/killed", options={"materialize": True})
            assert fault.struck
        finally:
            client.process.kill()
            client.close()
    with started(hub, home) as client:
        client.run(small)
        assert client.run(PULL, repo="org/killed", options={"materialize": True}) == 400
        assert client.run("_default().verify().ok")
        assert tensors(hub, before) < 1.6 * total, "what was stored is not sent again"
        hub.repositories.pop("datasets/org/killed")
        for layer in (0, 1):
            found = client.run(READ.replace(")", ", None)"), repo="org/killed", texts=made.texts, layer=layer)
            for mine, theirs in zip(found, made.vectors, strict=True):
                assert np.array_equal(np.float32(mine), theirs[:, layer])
        assert client.run("len([s for s in _default().spaces() if s.pulled])") == 1


@pytest.mark.slow
def test_two_processes_fetch_nothing_twice(hub, tmp_path):
    made = make(tmp_path / "set", n=500, layers=(0, 1), dim=256, per_shard=125, k=0)
    publish(hub, made, "org/shared")
    layer = 500 * 256 * 4
    home = tmp_path / "home"
    with started(hub, home) as one, started(hub, home) as two:
        results: dict[int, object] = {}

        def both(code, **values):
            def work(i, client):
                results[i] = client.run(code, **values)

            threads = [threading.Thread(target=work, args=pair) for pair in enumerate((one, two))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return results[0], results[1]

        assert both(PULL, repo="org/shared", options={}) == (500, 500)
        assert one.run("len([s for s in _default().spaces() if s.pulled])") == 1
        before = len(hub.requests)
        for found in both(READ, repo="org/shared", texts=made.texts, layer=1):
            assert np.array_equal(np.float32(found), np.stack(made.expected())[:, 1])
        assert tensors(hub, before) <= 1.1 * layer
        before = len(hub.requests)
        assert both(PULL, repo="org/shared", options={"materialize": True}) == (500, 500)
        assert tensors(hub, before) <= 1.1 * layer, "the other layer, once"
        assert one.run("_default().verify().ok")

"""Faults of a Hub while a dataset of it is migrated, and what a kill leaves; the token nowhere, little memory."""

from __future__ import annotations

import time

import pytest

from actcache.testing.hub import Fault
from hub_client import TOKEN, Client, ClientError
from hub_helpers import puts
from made_datasets import make
from migrate_hub_helpers import SMALL, do, is_as_before, is_split, left, publish


@pytest.fixture
def made(tmp_path, seed):
    return make(tmp_path / "set", "1.0 full", labels=[*range(10), None], seed=seed)


@pytest.fixture
def repo(hub, made):
    """The dataset on the Hub, with a file of somebody's own."""
    return publish(hub, made)


class TestFaults:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "fault",
        [
            Fault(path="/commit/", status=500),
            Fault(path="/commit/", lose_answer=True),
            Fault(path="/preupload/", status=429, retry_after=0),
            Fault(path="/objects/batch", status=503),
            Fault(method="PUT", path="/blobs/", status=500),
            Fault(method="PUT", path="/blobs/", cut_upload=10),
            Fault(method="GET", path="/blobs/", status=500, skip=20),
            Fault(method="GET", path="/resolve/", status=429, retry_after=0, skip=5),
        ],
        ids=repr,
    )
    def test_that_pass(self, hub, client, made, repo, tmp_path, fault):
        hub.inject(fault)
        do(client, repo, **SMALL)
        assert fault.struck and is_split(hub, repo, made, tmp_path / "found")
        assert len(hub.dataset(repo).history()) == 3

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "at",
        [
            {"method": "PUT", "path": "/blobs/", "skip": 0},
            {"method": "PUT", "path": "/blobs/", "skip": 9, "cut_upload": 100},
            {"method": "PUT", "path": "/blobs/", "skip": 23},
            {"path": "/commit/"},
            {"path": "/commit/", "lose_answer": True},
        ],
        ids=str,
    )
    def test_a_kill_leaves_the_old_one_and_goes_on(self, hub, made, repo, tmp_path, at):
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        victim = Client(hub, tmp_path / "client")
        hub.inject(Fault(**{"status": 500, **at} if "lose_answer" not in at else at, then=victim.kill))
        with pytest.raises(ClientError, match="Ended"):
            do(victim, repo, **SMALL)
        time.sleep(0.3)
        hub.faults.clear()
        if "lose_answer" in at:
            assert is_split(hub, repo, made, tmp_path / "early")
        else:
            assert is_as_before(hub, repo, made, head)
        with Client(hub, tmp_path / "client") as client:
            do(client, repo, **SMALL)
            assert left(client) == []
        assert is_split(hub, repo, made, tmp_path / "found")
        assert len(hub.dataset(repo).history()) == 3
        arrived = puts(hub, since)
        assert len(arrived) == len(set(arrived)), "nothing was sent twice"

    @pytest.mark.slow
    def test_what_has_arrived_is_not_made_again(self, hub, tmp_path, seed):
        made = make(tmp_path / "set", "1.1 full", labels=[None] * 11, dim=512, seed=seed)
        repo = publish(hub, made)
        options = {"shard_max_bytes": 4 * 512 * 4}
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        victim = Client(hub, tmp_path / "client")
        hub.inject(Fault(path="/commit/", status=500, then=victim.kill))
        with pytest.raises(ClientError):
            do(victim, repo, **options)
        hub.faults.clear()
        assert is_as_before(hub, repo, made, head) and len(puts(hub, since)) > 20
        since = len(hub.requests)
        with Client(hub, tmp_path / "client") as client:
            do(client, repo, **options)
        again = sum(r.sent for r in hub.requests[since:] if "/blobs/" in r.path)
        assert again < 0.3 * 4 * sum(v.size for v in made.vectors), "vectors are not fetched again"
        assert is_split(hub, repo, made, tmp_path / "found")

    @pytest.mark.slow
    def test_what_the_hub_has_dropped_meanwhile_is_sent_the_next_time(self, hub, made, repo, tmp_path):
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        victim = Client(hub, tmp_path / "client")
        hub.inject(Fault(path="/commit/", status=500, then=victim.kill))
        with pytest.raises(ClientError):
            do(victim, repo, **SMALL)
        hub.faults.clear()
        dropped = puts(hub, since)[0]
        hub.blobs.path(dropped).unlink()
        with Client(hub, tmp_path / "client") as client:
            with pytest.raises(ClientError, match="DatasetAccessError"):
                do(client, repo, **SMALL)
            assert is_as_before(hub, repo, made, head)
            do(client, repo, **SMALL)
        assert is_split(hub, repo, made, tmp_path / "found")

    @pytest.mark.slow
    def test_other_settings_begin_anew(self, hub, made, repo, tmp_path):
        victim = Client(hub, tmp_path / "client")
        hub.inject(Fault(path="/commit/", status=500, then=victim.kill))
        with pytest.raises(ClientError):
            do(victim, repo, shard_max_bytes=200)
        hub.faults.clear()
        with Client(hub, tmp_path / "client") as client:
            do(client, repo, **SMALL)
            assert left(client) == []
        assert is_split(hub, repo, made, tmp_path / "found")

    @pytest.mark.slow
    def test_two_at_once_do_not_mix(self, hub, client, made, repo, tmp_path):
        messages = []

        def second():
            with Client(hub, client.home / "second", XDG_CACHE_HOME=str(client.home)) as other:
                try:
                    do(other, repo, **SMALL)
                except ClientError as error:
                    messages.append(error.message)

        hub.inject(Fault(method="PUT", path="/blobs/", then=second))
        do(client, repo, **SMALL)
        assert len(messages) == 1 and "another process" in messages[0]
        assert is_split(hub, repo, made, tmp_path / "found")


@pytest.mark.slow
def test_the_token_is_nowhere(hub, made, repo, tmp_path):
    with Client(hub, tmp_path / "client", ACTCACHE_LOG="debug") as client:
        client.run("import logging\nlogging.basicConfig(level=0)")
        hub.inject(Fault(path="/commit/", status=500))
        do(client, repo, **SMALL)
        log = client.log
    assert "again in" in log and TOKEN not in log
    repository = hub.dataset(repo)
    for commit in repository.history():
        assert TOKEN not in commit.message + commit.description
        assert all(TOKEN.encode() not in repository.read(path, commit.id) for path in commit.files)


_MEASURE = """
import actcache as ac
from actcache.testing.memory import growth

def measured(repo, **options):
    with growth() as found:
        ac.migrate_dataset(repo, **options)
    return found.most / 2**20
"""


@pytest.mark.slow
def test_memory_and_disk_do_not_grow_with_the_dataset(hub, tmp_path):
    """Three times the vectors, of the same number of prompts: the same anonymous memory, and as little of the disk."""
    options, peaks, disk = {"shard_max_bytes": 16 << 20}, [], []
    with Client(hub, tmp_path / "client") as client:
        client.run(_MEASURE)
        for number, longest in enumerate((50, 500, 1500)):
            made = make(
                tmp_path / f"{number}" / "set", "1.0 full", n=60, layers=(0, 1), dim=1024, longest=longest, k=0,
                tokens_per_shard=10_000, labels=[0] * 60,
            )  # fmt: skip
            name = f"user/large{number}"
            hub.create(name, kind="dataset").commit(made.folder)
            most = []

            def look(most=most):
                staged = [p for p in client.home.rglob("migrating/**/*") if p.is_file()]
                most.append(sum(p.stat().st_size for p in staged))

            hub.inject(Fault(method="PUT", path="/blobs/", times=None, then=look))
            peaks.append(client.run("measured(repo, **options)", repo=name, options=options))
            hub.faults.clear()
            disk.append(max(most) / 2**20)
            size = 8 * 1024 * sum(map(len, made.vectors)) / 2**20
    # The first warms up what is loaded once.
    assert size > 300
    assert peaks[2] < peaks[1] + 60 and peaks[2] < 120, peaks
    assert max(disk) < 4 * 16 + 2, disk

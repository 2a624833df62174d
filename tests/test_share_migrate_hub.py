"""Datasets of the Hub migrated and upgraded with the real client: one commit, what is sent again, what faults leave."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from actcache.testing.hub import Fault, LoopbackHub
from hub_client import TOKEN, Client, ClientError
from made_datasets import INDEX, make
from share_helpers import BLOCKS, Published, has_right_digests

READ_TOKEN = "hf_mayonlyread"
CODE = """
import actcache as ac
getattr(ac, f)(repo, **options)
"""
# 3 shards of last tokens, and some of others, at each of 3 layers.
SMALL = {"shard_max_bytes": 100}
_SEEDS = itertools.count(1)


@pytest.fixture(scope="module")
def module_hub():
    with LoopbackHub() as hub:
        hub.tokens.add(TOKEN)
        hub.read_tokens.add(READ_TOKEN)
        yield hub


@pytest.fixture
def hub(module_hub):
    yield module_hub
    module_hub.faults.clear()


@pytest.fixture(scope="module")
def module_client(module_hub, tmp_path_factory):
    with Client(module_hub, tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture
def client(module_client):
    return module_client


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "set", "1.0 full", labels=[*range(10), None], seed=next(_SEEDS))


@pytest.fixture
def repo(hub, made):
    """The dataset on the Hub, with a file of somebody's own."""
    return publish(hub, made)


def publish(hub, made):
    name = f"user/set{time.monotonic_ns()}"
    files = {p.relative_to(made.folder).as_posix(): p.read_bytes() for p in made.folder.rglob("*") if p.is_file()}
    hub.create(name, kind="dataset").commit(
        {**files, "mine.txt": b"keep me", "README.md": b"# Mine\n\n## Contents\n\nstale lines\n"}
    )
    return name


def do(client, repo, f="migrate_dataset", **options):
    return client.run(CODE, f=f, repo=repo, options=options)


def published(hub, repo, folder):
    repository = hub.dataset(repo)
    for path in repository.files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(repository.read(path))
    return Published(folder)


def is_split(hub, repo, made, folder):
    """Whether the Hub has the dataset as it should be: all of its vectors, read with its format alone."""
    found = published(hub, repo, folder)
    assert found.metadata["format_version"] == "2.0" and found.tensors["hidden_layers"]["last_token_shards"] == 3
    assert [row["text"] for row in found.index] == made.texts
    assert [row["label"] for row in found.index] == made.columns["label"]
    for text, wanted in zip(made.texts, made.vectors, strict=True):
        for i, layer in enumerate(made.layers):
            assert np.array_equal(found.tokens(text, layer=layer).numpy(), wanted[:, i])
            assert np.array_equal(found.row(text, layer=layer).numpy(), wanted[-1, i])
    kept = {"mine.txt", "README.md", INDEX, ".gitattributes", "tensors/logits_topk_000.safetensors", BLOCKS}
    of_layers = {path for path in found.files if "hidden_layer" in path}
    assert found.files - of_layers <= kept and has_right_digests(found)
    assert len(of_layers) == 3 * len(found.tensors["hidden_layers"]["shards"])
    assert (folder / "mine.txt").read_bytes() == b"keep me"
    logits = "tensors/logits_topk_000.safetensors"
    assert (folder / logits).read_bytes() == (made.folder / logits).read_bytes()
    return True


def is_as_before(hub, repo, made, head):
    """Whether nothing of the dataset has changed."""
    repository = hub.dataset(repo)
    assert repository.refs["main"] == head
    return all(
        repository.read(p.relative_to(made.folder).as_posix()) == p.read_bytes()
        for p in made.folder.rglob("*")
        if p.is_file()
    )


def puts(hub, since=0):
    """Digests of files that arrived whole."""
    return [
        r.path.partition("?")[0].rpartition("/")[2]
        for r in hub.requests[since:]
        if r.method == "PUT" and r.status == 200 and "/blobs/" in r.path
    ]


def changes(hub, since):
    return [r for r in hub.requests[since:] if r.method not in ("GET", "HEAD")]


def left(client):
    """What lies in the client's staging folder."""
    return sorted(p.name for p in client.home.rglob("migrating/**/*") if p.is_file())


class TestOneCommit:
    def test_migrated(self, hub, client, made, repo, tmp_path):
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        assert do(client, repo, **SMALL) == f"{hub.url}/datasets/{repo}"
        assert is_split(hub, repo, made, tmp_path / "found")
        assert [c.id for c in hub.dataset(repo).history()][1:2] == [head]
        # All vectors were read once, and each file sent once.
        assert len(puts(hub, since)) == len(set(puts(hub, since)))
        assert left(client) == []
        text = (tmp_path / "found" / "README.md").read_text()
        assert (
            text.startswith("---\nconfigs:") and "# Mine" in text and "stale" not in text and "**Prompts:** 11" in text
        )

    def test_upgraded(self, hub, client, made, repo, tmp_path):
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        do(client, repo, "upgrade_dataset_format")
        assert [c.id for c in hub.dataset(repo).history()][1:2] == [head]
        found = published(hub, repo, tmp_path / "found")
        assert "lmprobe_info.json" not in found.files and found.metadata["format_version"] == "2.0"
        # No vectors were sent, and none but headers of files fetched.
        assert len(puts(hub, since)) <= 1
        for row, vectors in zip(found.index, made.vectors, strict=True):
            assert np.array_equal(found.row(row["text"], layer=2).numpy(), vectors[-1, 1])
            assert np.array_equal(found.tokens(row["text"], layer=5).numpy(), vectors[:, 2])

    @pytest.mark.parametrize("private", [True, False])
    def test_who_may_see_it(self, hub, client, made, repo, private):
        hub.dataset(repo).private = not private
        do(client, repo, private=private, **SMALL)
        assert hub.dataset(repo).private is private

    def test_who_may_see_it_where_the_commit_is_refused(self, hub, client, made, repo):
        repository, head = hub.dataset(repo), hub.dataset(repo).refs["main"]
        seen = []

        def refused():
            seen.append(repository.private)

        hub.inject(Fault(path="/commit/", status=403, then=refused))
        with pytest.raises(ClientError, match="may not write"):
            do(client, repo, private=True, **SMALL)
        assert seen == [True] and not repository.private and is_as_before(hub, repo, made, head)
        # Private before, it stays so, whatever becomes of the commit.
        repository.private = True
        hub.inject(Fault(path="/commit/", status=403))
        with pytest.raises(ClientError, match="may not write"):
            do(client, repo, private=True, **SMALL)
        assert repository.private

    def test_who_may_see_it_where_nobody_knows_of_the_commit(self, hub, client, repo):
        """What may be there, and was to be private, is not shown."""
        hub.inject(Fault(path="/commit/", status=500, retry_after=0, times=None))
        with pytest.raises(ClientError, match="status 500"):
            do(client, repo, private=True, **SMALL)
        assert hub.dataset(repo).private and "is private now" in client.log

    def test_what_cannot_be_made_public(self, hub, client, made, repo, tmp_path):
        hub.dataset(repo).private = True
        hub.inject(Fault(path="/settings", status=403, times=None))
        with pytest.raises(ClientError, match=r"is changed, and could not be made public \(status 403\): do that in"):
            do(client, repo, private=False, **SMALL)
        assert hub.dataset(repo).private and is_split(hub, repo, made, tmp_path / "found")

    def test_a_second_time_it_says_so(self, hub, client, repo):
        do(client, repo, **SMALL)
        since = len(hub.requests)
        assert do(client, repo, **SMALL) == f"{hub.url}/datasets/{repo}"
        assert "nothing changes" in do(client, repo, dry_run=True)
        assert "of format 2.0 already" in do(client, repo, "upgrade_dataset_format", dry_run=True)
        do(client, repo, "upgrade_dataset_format")
        assert changes(hub, since) == [] and "nothing changes" in client.log

    def test_few_files_lie_here(self, hub, client, repo, tmp_path):
        most = []
        count = lambda: most.append(sum(".safe" in name and ".xxh3" not in name for name in left(client)))  # noqa: E731
        hub.inject(Fault(method="PUT", path="/blobs/", times=None, then=count))
        do(client, repo, **SMALL)
        assert 1 <= max(most) <= 4


class TestDryRun:
    def test_says_all_that_is_then_done(self, hub, client, made, repo, tmp_path):
        before, since = set(hub.dataset(repo).files()), len(hub.requests)
        said = do(client, repo, dry_run=True, token=False, **SMALL)
        assert changes(hub, since) == []
        names = {"add": set(), "replace": set(), "remove": set()}
        sizes = {}
        for line in said.splitlines()[1:-1]:
            what, path, *size = line.split()
            names[what].add(path)
            sizes |= {path: int(size[0].replace(",", ""))} if size else {}
        do(client, repo, **SMALL)
        blobs = hub.dataset(repo).files()
        assert names["add"] == set(blobs) - before and names["remove"] == before - set(blobs)
        assert names["replace"] == {INDEX, "README.md"}
        assert sizes == {path: blobs[path].size for path in sizes}
        total = 4 * sum(vectors.size for vectors in made.vectors)
        assert said.splitlines()[-1].strip() == f"fetch {total:,} bytes, send {sum(sizes.values()):,} bytes"

    def test_fetches_no_vectors(self, hub, client, tmp_path):
        made = make(tmp_path / "set", "1.1 full", dim=2048, longest=40, tokens_per_shard=100, k=0)
        repo = publish(hub, made)
        since = len(hub.requests)
        said = do(client, repo, dry_run=True)
        vectors = 4 * sum(v.size for v in made.vectors)
        assert sum(r.sent for r in hub.requests[since:]) < 0.2 * vectors
        assert f"fetch {vectors:,} bytes" in said
        do(client, repo)
        # Each byte once, and headers.
        assert sum(r.sent for r in hub.requests[since:]) < 1.2 * vectors
        assert len(puts(hub, since)) > 3


class TestNothingIsChanged:
    def test_when_somebody_commits_before_it(self, hub, client, made, repo):
        repository = hub.dataset(repo)

        def meanwhile():
            with repository.lock:
                repository.append({**repository.files(), "x": repository.add("x", b"1")}, "main", "somebody else")

        for path in ("/preupload/", "/commit/"):
            hub.inject(Fault(method="POST", path=path, then=meanwhile))
            with pytest.raises(ClientError, match="DatasetAccessError: somebody else has just committed"):
                do(client, repo, **SMALL)
            assert repository.history()[0].message == "somebody else"
            hub.faults.clear()
        # What has arrived is still what is wanted.
        since = len(hub.requests)
        do(client, repo, **SMALL)
        assert len(puts(hub, since)) <= 1

    def test_between_the_look_and_the_list(self, hub, client, repo):
        repository = hub.dataset(repo)

        def meanwhile():
            with repository.lock:
                repository.append({**repository.files(), "x": repository.add("x", b"1")}, "main", "somebody else")

        since = len(hub.requests)
        hub.inject(Fault(method="GET", path=f"/api/datasets/{repo}$", then=meanwhile))
        with pytest.raises(ClientError, match="somebody else has just committed"):
            do(client, repo, **SMALL)
        assert changes(hub, since) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"token": READ_TOKEN}, "may not write"),
            ({"token": "hf_nobodys"}, "token"),
            ({"token": False}, "needs a token"),
            ({"token": f"{TOKEN}\n"}, "no token of the Hub"),
            ({"private": "yes"}, "private is"),
            ({"shard_max_bytes": 0}, "shard_max_bytes"),
        ],
    )
    def test_by_what_fails_here(self, hub, client, made, repo, options, message):
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        with pytest.raises(ClientError) as error:
            do(client, repo, **options)
        assert message in error.value.message
        for said in (error.value.message, error.value.trace):
            assert TOKEN not in said and READ_TOKEN not in said and "nobodys" not in said
        assert is_as_before(hub, repo, made, head) and puts(hub, since) == []

    def test_of_a_hostile_dataset(self, hub, client, made, tmp_path):
        values = list(made.columns["token_offset"])
        values[4] = 10**12
        made.columns["token_offset"] = values
        made.write()
        repo = publish(hub, made)
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        for f in ("migrate_dataset", "upgrade_dataset_format"):
            with pytest.raises(ClientError, match=r"DatasetFormatError.*prompt 4"):
                do(client, repo, f)
        assert is_as_before(hub, repo, made, head) and changes(hub, since) == []


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
    def test_what_has_arrived_is_not_made_again(self, hub, tmp_path):
        made = make(tmp_path / "set", "1.1 full", labels=[None] * 11, dim=512, seed=next(_SEEDS))
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
import threading
import actcache as ac

def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def measured(repo, **options):
    before, most, done = anonymous(), [0.0], threading.Event()
    def look():
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        ac.migrate_dataset(repo, **options)
    finally:
        done.set()
        watcher.join()
    return most[0] - before
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

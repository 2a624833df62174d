"""Datasets of the Hub migrated and upgraded with the real client: one commit, or nothing is changed."""

from __future__ import annotations

import numpy as np
import pytest

from actcache.testing.hub import Fault
from hub_client import READ_TOKEN, TOKEN, ClientError
from hub_helpers import changes, downloaded, puts
from made_datasets import INDEX, make
from migrate_hub_helpers import SMALL, do, is_as_before, is_split, left, publish


@pytest.fixture
def made(tmp_path, seed):
    return make(tmp_path / "set", "1.0 full", labels=[*range(10), None], seed=seed)


@pytest.fixture
def repo(hub, made):
    """The dataset on the Hub, with a file of somebody's own."""
    return publish(hub, made)


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
        found = downloaded(hub, repo, tmp_path / "found")
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

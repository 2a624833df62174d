"""Pushing to the Hub with the real client: what arrives, beside what is there already, and what is sent again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from actcache.store.store import Store
from actcache.testing.hub import Fault
from hub_client import ClientError
from hub_helpers import changes, puts
from lmprobe_datasets import FIXTURES
from push_hub_helpers import FILES, PUSH, SMALL, filled, holds, published, push, staged
from share_helpers import INDEX, MODEL, TEXTS, N, Published, fill_pooled, new_space, new_store, table, text

CUT = f"""
from actcache.share.staging import Staging
remove = Staging.remove
def cut(self):
    raise KeyboardInterrupt
Staging.remove = cut
try:
    {PUSH.replace(chr(10), "; ")}
except KeyboardInterrupt:
    pass
finally:
    Staging.remove = remove
"""


@pytest.fixture
def home(tmp_path, seed):
    return filled(tmp_path, seed)


class TestArrives:
    def test_in_two_commits_with_the_index_last(self, hub, client, home, repo, tmp_path, seed):
        since = len(hub.requests)
        assert push(client, home, repo, **SMALL) == f"{hub.url}/datasets/{repo}"
        found = published(hub, repo, tmp_path / "found")
        assert holds(found, seed) and len(found.ours["files"]) == FILES
        first, second = hub.dataset(repo).history()[1::-1]
        assert INDEX not in first.files and {INDEX, "README.md"} <= second.files.keys()
        # Every file once, and nothing else is left of it here.
        assert len(puts(hub, since)) == len(set(puts(hub, since))) == FILES + 1
        assert not (home / "store" / "pushing").exists()

    def test_private(self, hub, client, home, repo):
        push(client, home, repo, private=True)
        assert hub.dataset(repo).private

    def test_in_batches(self, hub, client, home, repo, tmp_path, seed):
        push(client, home, repo, commit_batch_size=5, **SMALL)
        sizes = [len(c.files) for c in reversed(hub.dataset(repo).history())]
        assert sizes == [1, 6, 11, 15, 18]
        assert holds(published(hub, repo, tmp_path / "found"), seed)

    def test_as_ids_after_a_push_as_texts_that_was_cut_at_its_very_end(self, hub, client, home, repo, tmp_path):
        client.run(CUT, repo=repo, model=MODEL, prompts=TEXTS, store=str(home / "store"), options={})
        ids = [table([i]).tokens(0).tolist() for i in N]
        with pytest.raises(ClientError, match="DatasetExistsError"):
            push(client, home, repo, ids)
        push(client, home, repo, ids, exist_ok=True)
        assert {row["prompt_kind"] for row in published(hub, repo, tmp_path / "found").index} == {"ids"}

    def test_rows_in_the_order_of_the_published_format(self, hub, client, home, tmp_path):
        if not FIXTURES.is_dir():
            pytest.skip("the captured datasets of lmprobe are not on this machine")
        prompts = json.loads((FIXTURES / "prompts.json").read_text("utf-8"))["prompts"]
        store = new_store(tmp_path)
        store.write(new_space(store), prompts, {"resid_post.0": list(np.eye(12, 4, dtype="f4"))}, pooling="mean")
        push(client, tmp_path, "org/dataset_v2_pooled", prompts)
        found = published(hub, "org/dataset_v2_pooled", tmp_path / "found")
        theirs = Published(FIXTURES / "dataset_v2_pooled")
        assert [row["text"] for row in found.index] == [row["text"] for row in theirs.index]

    def test_nothing_is_sent_twice_when_it_is_pushed_again(self, hub, client, home, repo, tmp_path, seed):
        push(client, home, repo, **SMALL)
        since = len(hub.requests)
        push(client, home, repo, exist_ok=True, labels=list(N), **SMALL)
        # The index is new, the vectors are not.
        assert len(puts(hub, since)) == 1
        found = published(hub, repo, tmp_path / "found")
        assert holds(found, seed) and found.by_text[text(7)]["label"] == 7


class TestStream:
    def test_keeps_few_files_here(self, hub, client, home, repo, tmp_path, seed):
        most = []
        hub.inject(Fault(method="PUT", path="/blobs/", times=None, then=lambda: most.append(len(staged(home)))))
        push(client, home, repo, stream=True, stream_batch_size=3, **SMALL)
        assert 1 <= max(most) <= 3
        assert holds(published(hub, repo, tmp_path / "found"), seed)
        assert [len(c.files) for c in hub.dataset(repo).history()][::-1] == [1, 4, 7, 10, 13, 15, 18]

    def test_into_a_dataset_that_is_shown_already(self, hub, client, home, repo, tmp_path, seed):
        push(client, home, repo, TEXTS[:5], **SMALL)
        before = len(hub.dataset(repo).history())
        most = []
        hub.inject(Fault(method="PUT", path="/blobs/", times=None, then=lambda: most.append(len(staged(home)))))
        push(client, home, repo, stream=True, stream_batch_size=2, exist_ok=True, **SMALL)
        assert max(most) <= 2
        # One commit: nobody reads half of two datasets.
        assert len(hub.dataset(repo).history()) == before + 1
        assert holds(published(hub, repo, tmp_path / "found"), seed)


class TestTheStoreMeanwhile:
    def test_what_is_cleared_while_it_is_pushed_arrives(self, hub, client, home, repo, tmp_path, seed):
        def clear():
            with new_store(tmp_path) as store:
                assert store.clear() == 20
                store.compact()

        # Of seven batches of files the first is made.
        fault = hub.inject(Fault(method="POST", path="/commit/", then=clear))
        push(client, home, repo, stream=True, stream_batch_size=2, **SMALL)
        assert fault.struck == 1 and not list((home / "store").rglob("*.safetensors"))
        assert holds(published(hub, repo, tmp_path / "found"), seed)

    @pytest.mark.parametrize("preload", ["none", "full"])
    def test_it_may_lie_elsewhere(self, hub, client, repo, tmp_path, seed, preload):
        from elsewhere import Folder

        with Store(Folder(tmp_path / "bucket"), index_dir=tmp_path / "index") as store:
            fill_pooled(store, new_space(store), N, seed=seed)
            store.flush()
        code = (
            "from elsewhere import Folder; from pathlib import Path; from actcache.store.store import Store\n"
            "with Store(Folder(Path(bucket)), index_dir=Path(index)) as store:\n"
            "    ac.push_dataset(repo, model, None, store=store, **options)\nNone"
        )
        options = {"preload": preload, "stream": True, **SMALL}
        client.run("import actcache as ac")
        client.run(
            code, repo=repo, model=MODEL, bucket=f"{tmp_path}/bucket", index=f"{tmp_path}/other", options=options
        )
        assert holds(published(hub, repo, tmp_path / "found"), seed)

    def test_what_was_pulled_and_not_fetched_is_said(self, hub, client, home, repo, tmp_path, seed):
        push(client, home, repo, **SMALL)
        pulled = str(tmp_path / "pulled")
        ac_pull = "ac.pull_dataset(repo, store=store, materialize=whole)"
        assert client.run(ac_pull, repo=repo, store=pulled, whole=False) == 20
        again = "ac.push_dataset(repo + 'b', model, None, store=store)"
        with pytest.raises(ClientError, match=rf"Fetch what {repo}@\w+ has of them with pull_dataset"):
            client.run(again, repo=repo, model=MODEL, store=pulled)
        assert client.run(ac_pull, repo=repo, store=pulled, whole=True) == 20
        client.run(again, repo=repo, model=MODEL, store=pulled)
        assert holds(published(hub, f"{repo}b", tmp_path / "found"), seed)


class TestWhatIsThere:
    def test_is_not_overwritten_unless_asked(self, hub, client, home, repo, tmp_path, seed):
        push(client, home, repo, TEXTS[:5], tensors=["resid_post.0"])
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        with pytest.raises(ClientError, match=r"DatasetExistsError: .* holds 4 files.*exist_ok=True"):
            push(client, home, repo)
        assert hub.dataset(repo).refs["main"] == head and changes(hub, since) == []
        assert not (home / "store" / "pushing").exists()
        push(client, home, repo, exist_ok=True, **SMALL)
        assert holds(published(hub, repo, tmp_path / "found"), seed)

    def test_a_smaller_one_leaves_nothing_of_a_larger(self, hub, client, home, repo, tmp_path, seed):
        push(client, home, repo, **SMALL)
        kept = hub.dataset(repo).files() | {"mine.txt": hub.dataset(repo).add("mine.txt", b"keep me")}
        with hub.dataset(repo).lock:
            hub.dataset(repo).append(kept, "main", "a file of somebody's own")
        push(client, home, repo, TEXTS[:2], exist_ok=True)
        files = set(hub.dataset(repo).files())
        assert len(files) == 7 and "mine.txt" in files
        assert holds(published(hub, repo, tmp_path / "found"), seed, numbers=range(2))

    def test_an_empty_repository_is_none(self, hub, client, home, repo, tmp_path, seed):
        client.run("from huggingface_hub import HfApi\nHfApi().create_repo(r, repo_type='dataset'); None", r=repo)
        push(client, home, repo)
        assert holds(published(hub, repo, tmp_path / "found"), seed)

    def test_what_is_to_be_private_does_not_go_into_a_public_one(self, hub, client, home, repo):
        client.run("from huggingface_hub import HfApi\nHfApi().create_repo(r, repo_type='dataset'); None", r=repo)
        since = len(hub.requests)
        with pytest.raises(ClientError, match=r"DatasetExistsError: .*is public"):
            push(client, home, repo, private=True)
        assert changes(hub, since) == []

    def test_what_this_token_may_not_see_is_not_guessed_at(self, hub, client, home, repo):
        # For others it is not there, and it cannot be made.
        hub.inject(Fault(path="/api/datasets/", status=404, times=None))
        hub.inject(Fault(path="/repos/create", status=409, times=None))
        with pytest.raises(ClientError) as error:
            push(client, home, repo)
        assert error.value.name == "DatasetAccessError" and repo in error.value.message

    def test_a_repository_that_goes_meanwhile(self, hub, client, home, repo):
        hub.inject(Fault(path="/preupload/", then=lambda: hub.repositories.pop(f"datasets/{repo}")))
        with pytest.raises(ClientError, match="DatasetAccessError: pushing to"):
            push(client, home, repo)

    def test_somebody_who_commits_meanwhile_is_not_overwritten(self, hub, client, home, repo):
        push(client, home, repo, TEXTS[:3])
        repository = hub.dataset(repo)

        def meanwhile():
            with repository.lock:
                repository.append({**repository.files(), "x": repository.add("x", b"1")}, "main", "somebody else")

        hub.inject(Fault(method="POST", path="/commit/", then=meanwhile))
        with pytest.raises(ClientError, match="DatasetAccessError: somebody else has just committed"):
            push(client, home, repo, exist_ok=True)
        assert repository.history()[0].message == "somebody else"


def test_a_repository_that_the_loopback_has_made_is_pushed_to(hub, client, home, repo, tmp_path, seed):
    hub.create(repo, kind="dataset")
    push(client, home, repo)
    assert holds(published(hub, repo, tmp_path / "found"), seed)

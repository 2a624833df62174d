"""Pushing to the Hub with the real client: what arrives, what is sent again, what a Hub that fails leaves behind."""

from __future__ import annotations

import itertools
import json
import time

import numpy as np
import pytest

from actcache.store.store import Store
from actcache.testing.hub import Fault, LoopbackHub
from hub_client import TOKEN, Client, ClientError
from lmprobe_datasets import FIXTURES
from share_helpers import (
    INDEX,
    MODEL,
    Published,
    fill_pooled,
    has_right_digests,
    new_space,
    new_store,
    rows,
    table,
    text,
)

N = range(20)
TEXTS = [text(i) for i in N]
READ_TOKEN = "hf_mayonlyread"
PUSH = "import actcache as ac\nac.push_dataset(repo, model, prompts, store=store, **options)"
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
# 7 shards of 3 prompts at each of 2 layers.
SMALL = {"shard_max_bytes": 100}
FILES = 14
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


@pytest.fixture
def seed():
    """Of vectors that no other test has: the Hub keeps what it has once, whoever sent it."""
    return next(_SEEDS)


@pytest.fixture
def home(tmp_path, seed):
    store = new_store(tmp_path)
    fill_pooled(store, new_space(store), N, seed=seed)
    return tmp_path


@pytest.fixture(scope="module")
def client(module_hub, tmp_path_factory):
    with Client(module_hub, tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture
def repo(hub):
    return f"user/set{len(hub.repositories)}-{time.monotonic_ns()}"


def push(client, home, repo, prompts=TEXTS, model=MODEL, **options):
    return client.run(PUSH, repo=repo, model=model, prompts=prompts, store=str(home / "store"), options=options)


def published(hub, repo, folder, revision="main"):
    """The dataset as it is on the Hub."""
    repository = hub.dataset(repo)
    for path in repository.files(revision):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(repository.read(path, revision))
    found = Published(folder)
    assert found.ours["files"].keys() == {p for p in found.files if p.endswith(".safetensors")}
    assert has_right_digests(found)
    return found


def holds(found, seed, numbers=N):
    for i in numbers:
        for layer in (0, 1):
            wanted = rows(i, f"resid_post.{layer}", seed=seed)[-1]
            assert np.array_equal(found.row(text(i), layer=layer).numpy(), wanted), (i, layer)
    return True


def puts(hub, since=0):
    """Files of activations that arrived, by their digests."""
    return [r.path.split("?")[0] for r in hub.requests[since:] if r.method == "PUT" and r.status == 200]


def changes(hub, since=0):
    """What was asked of the Hub beyond looking."""
    return [r for r in hub.requests[since:] if r.method not in ("GET", "HEAD")]


def _digest(request):
    return request.path.partition("?")[0].rpartition("/")[2]


def staged(home):
    return sorted(p.name for p in (home / "store" / "pushing").rglob("*.safetensors"))


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


class TestAHubThatFails:
    @pytest.mark.parametrize(
        "path", ["/repos/create", "/preupload/", "/objects/batch", "/commit/", "/blobs/", "/tree/"]
    )
    @pytest.mark.parametrize(
        "fault", [{"status": 429, "retry_after": 0}, pytest.param({"status": 500}, marks=pytest.mark.slow)]
    )
    def test_now_and_then(self, hub, client, home, repo, tmp_path, path, fault, seed):
        struck = hub.inject(Fault(path=path, times=1, **fault))
        push(client, home, repo, **SMALL)
        assert struck.struck == 1 and holds(published(hub, repo, tmp_path / "found"), seed)

    def test_is_given_the_time_it_asks_for(self, hub, client, home, repo, tmp_path):
        hub.inject(Fault(path="/commit/", status=429, retry_after=2))
        start = time.monotonic()
        push(client, home, repo)
        assert time.monotonic() - start >= 2

    # A repository is asked for once.
    @pytest.mark.parametrize(("path", "skip"), [("/repos/create", 0), ("/commit/", 0), ("/commit/", 1)])
    def test_and_loses_an_answer(self, hub, client, home, repo, tmp_path, path, skip, seed):
        fault = hub.inject(Fault(method="POST", path=path, lose_answer=True, skip=skip))
        push(client, home, repo, **SMALL)
        assert fault.struck == 1 and holds(published(hub, repo, tmp_path / "found"), seed)
        # What was made is not made again.
        assert [c.message for c in hub.dataset(repo).history()][1:] == [
            f"Add {FILES} files of activations",
            "initial commit",
        ]

    def test_breaks_an_upload(self, hub, client, home, repo, tmp_path, seed):
        since = len(hub.requests)
        fault = hub.inject(Fault(method="PUT", path="/blobs/", cut_upload=50, skip=3))
        push(client, home, repo, **SMALL)
        assert fault.struck == 1 and holds(published(hub, repo, tmp_path / "found"), seed)
        assert len(puts(hub, since)) == FILES + 1

    def test_for_good_is_an_error_that_says_what_to_do(self, hub, client, home, repo, tmp_path, seed):
        hub.inject(Fault(method="PUT", path="/blobs/", status=403, skip=5, times=None))
        with pytest.raises(ClientError) as error:
            push(client, home, repo, num_workers=1, **SMALL)
        assert "status 403" in error.value.message and "sign=" not in error.value.trace
        assert INDEX not in hub.dataset(repo).files()
        hub.faults.clear()
        since = len(hub.requests)
        push(client, home, repo, **SMALL)
        assert len(puts(hub, since)) == FILES - 5 + 1
        assert holds(published(hub, repo, tmp_path / "found"), seed)


class TestInterrupted:
    """A process that is gone in the middle, at any point: the next push goes on."""

    @pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        "at",
        [
            {"path": "/repos/create"},
            {"path": "/blobs/", "skip": 6},
            {"path": "/commit/"},
            {"path": "/commit/", "skip": 1},
        ],
    )
    @pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_sends_nothing_again_that_has_arrived(self, hub, home, repo, tmp_path, stream, at, after, seed):
        options = {**SMALL, "num_workers": 1, "stream": stream, "stream_batch_size": 4, "labels": list(N)}
        victim = Client(hub, tmp_path / "victim")
        since = len(hub.requests)
        # `after`: what was asked is done, and nobody learns of it.
        hub.inject(
            Fault(
                method="PUT" if at["path"] == "/blobs/" else "POST",
                then=victim.kill,
                lose_answer=after,
                status=None if after else 500,
                **at,
            )
        )
        with pytest.raises(ClientError):
            push(victim, home, repo, **options)
        # What had been asked is still being done.
        time.sleep(0.5)
        hub.faults.clear()
        repository = hub.repositories.get(f"datasets/{repo}")
        finished = after and at["path"] == "/commit/" and not stream and at.get("skip") == 1
        assert repository is None or (INDEX in repository.files()) == finished
        with Client(hub, tmp_path / "next") as client:
            push(client, home, repo, **options)
        found = published(hub, repo, tmp_path / "found")
        assert holds(found, seed) and found.by_text[text(3)]["label"] == 3
        sizes = {digest: size for size, digest in found.ours["files"].values()}
        uploads = [r for r in hub.requests[since:] if r.method == "PUT" and _digest(r) in sizes]
        arrived = [_digest(r) for r in uploads if r.received == sizes[_digest(r)] and r.status != 500]
        assert sorted(arrived) == sorted(sizes)
        # At most the file that was on its way when it ended.
        assert sum(r.received for r in uploads) <= sum(sizes.values()) + max(sizes.values())
        assert not (home / "store" / "pushing").exists()

    @pytest.mark.parametrize("labels", [[1] * 20, [2] * 20])
    def test_what_was_published_is_not_overwritten_by_going_on(self, hub, home, repo, tmp_path, labels):
        victim = Client(hub, tmp_path / "victim")
        # Its last commit is made, and it is gone before it knows.
        hub.inject(Fault(method="POST", path="/commit/", skip=1, lose_answer=True, then=victim.kill))
        with pytest.raises(ClientError):
            push(victim, home, repo, labels=[1] * 20, **SMALL)
        hub.faults.clear()
        head = hub.dataset(repo).refs["main"]
        assert INDEX in hub.dataset(repo).files()
        with Client(hub, tmp_path / "next") as client:
            if labels[0] == 1:
                push(client, home, repo, labels=labels, **SMALL)
            else:
                with pytest.raises(ClientError, match="DatasetExistsError"):
                    push(client, home, repo, labels=labels, **SMALL)
        assert hub.dataset(repo).refs["main"] == head

    @pytest.mark.parametrize("stream", [False, True])
    def test_never_publishes_what_is_no_longer_so(self, hub, repo, tmp_path, stream):
        store = new_store(tmp_path)
        space = new_space(store)
        fill_pooled(store, space, N)
        victim = Client(hub, tmp_path / "victim")
        options = {**SMALL, "num_workers": 1, "stream": stream, "stream_batch_size": 4}
        hub.inject(Fault(method="POST", path="/commit/", skip=1, status=500, then=victim.kill))
        with pytest.raises(ClientError):
            push(victim, tmp_path, repo, labels=[1] * 20, **options)
        hub.faults.clear()
        assert len(hub.dataset(repo).files()) > 1 and INDEX not in hub.dataset(repo).files()
        store.invalidate(space)
        fill_pooled(store, space, N[:12], seed=4)
        with Client(hub, tmp_path / "next") as client:
            # Other content, and still no dataset of anybody else: no exist_ok is needed.
            push(client, tmp_path, repo, labels=[2] * 20, **options)
        found = published(hub, repo, tmp_path / "found")
        assert holds(found, seed=4, numbers=range(12)) and {row["label"] for row in found.index} == {2}
        assert len(found.index) == 12

    def test_files_that_a_crash_spoiled_are_made_again(self, hub, home, repo, tmp_path, seed):
        victim = Client(hub, tmp_path / "victim")
        hub.inject(Fault(method="POST", path="/repos/create", status=500, then=victim.kill))
        with pytest.raises(ClientError):
            push(victim, home, repo, **SMALL)
        hub.faults.clear()
        for path in (home / "store" / "pushing").rglob("*.safetensors"):
            path.write_bytes(bytes(path.stat().st_size))
        with Client(hub, tmp_path / "next") as client:
            push(client, home, repo, **SMALL)
        assert holds(published(hub, repo, tmp_path / "found"), seed)

    @pytest.mark.slow
    def test_two_at_once_do_not_mix(self, hub, client, home, repo, tmp_path, seed):
        messages = []

        def second():
            with Client(hub, tmp_path / "second") as other:
                try:
                    push(other, home, repo, **SMALL)
                except ClientError as error:
                    messages.append(error.message)

        hub.inject(Fault(method="PUT", path="/blobs/", then=second))
        push(client, home, repo, num_workers=1, **SMALL)
        assert len(messages) == 1 and "another process" in messages[0]
        assert holds(published(hub, repo, tmp_path / "found"), seed)


class TestWithoutXet:
    """The client sends by Xet where that is installed, whatever the Hub knows."""

    @pytest.fixture
    def xet_client(self, hub, tmp_path):
        pytest.importorskip("hf_xet")
        with Client(hub, tmp_path / "client", HF_HUB_DISABLE_XET="0") as client:
            yield client

    def test_a_hub_without_it_is_sent_plain_requests(self, hub, xet_client, home, repo, tmp_path, seed):
        hub.inject(Fault(method="PUT", path="/blobs/", cut_upload=50, skip=3))
        push(xet_client, home, repo, TEXTS[:5], **SMALL)
        push(xet_client, home, repo, exist_ok=True, stream=True, labels=list(N), **SMALL)
        found = published(hub, repo, tmp_path / "found")
        assert holds(found, seed) and found.by_text[text(7)]["label"] == 7
        code = "import os, huggingface_hub.constants as c; [c.HF_HUB_DISABLE_XET, len(os.listdir('/proc/self/fd'))]"
        off, files = xet_client.run(code)
        assert off is False
        push(xet_client, home, f"{repo}b", **SMALL)
        assert xet_client.run(code) == [False, files]

    def test_a_hub_with_it_is_not(self, hub, xet_client, repo):
        ask = "from actcache.share.transfer import needs_plain_requests; needs_plain_requests(repo, True)"
        assert xet_client.run(ask, repo=repo) is True
        for status in (200, 401, 403, 500):
            hub.inject(Fault(path="/xet-write-token/", status=status))
            assert xet_client.run(ask, repo=repo) is False


def test_a_repository_that_the_loopback_has_made_is_pushed_to(hub, client, home, repo, tmp_path, seed):
    hub.create(repo, kind="dataset")
    push(client, home, repo)
    assert holds(published(hub, repo, tmp_path / "found"), seed)


@pytest.mark.parametrize("skip", [0, 1])
def test_what_has_arrived_is_said_only_where_something_has(hub, client, home, repo, skip):
    """`skip`: of the requests, how many are answered before the Hub is out of order for good."""
    path = "/info/lfs/objects/batch" if skip else f"/api/datasets/{repo}$"
    hub.inject(Fault(path=path, status=500, retry_after=0, times=None))
    with pytest.raises(ClientError) as error:
        push(client, home, repo, **SMALL)
    hub.faults.clear()
    assert "status 500" in error.value.message
    assert ("what has arrived stays there" in error.value.message) == bool(skip)
    assert error.value.message.endswith("push again to go on." if skip else ": push again.")


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

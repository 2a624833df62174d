"""A Hub that fails, and pushes that end in the middle: the next one goes on."""

from __future__ import annotations

import time

import pytest

from actcache.testing.hub import Fault
from hub_client import Client, ClientError
from hub_helpers import puts
from push_hub_helpers import FILES, SMALL, filled, holds, published, push
from share_helpers import INDEX, TEXTS, N, fill_pooled, new_space, new_store, text


@pytest.fixture
def home(tmp_path, seed):
    return filled(tmp_path, seed)


def _digest(request):
    return request.path.partition("?")[0].rpartition("/")[2]


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

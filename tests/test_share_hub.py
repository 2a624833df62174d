"""Datasets read from the Hub through the real client: what is transferred, tokens, faults, revisions."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from actcache.testing.hub import Fault
from hub_client import TOKEN, Client, ClientError
from local_server import LocalServer
from made_datasets import INDEX, VERSIONS, make

LOAD = "import actcache as ac; ac.load_activations(repo, as_dict=False, show_progress=False, **options).tolist()"
METADATA = "import actcache as ac; m = ac.fetch_dataset_metadata(repo, **options); [m.prompts, m.commit, m.num_prompts]"


def publish(hub, made, name, **options):
    repository = hub.create(name, kind="dataset", **options)
    repository.commit(made.folder)
    return repository


def same(found, wanted):
    return np.array_equal(np.array(found, np.float32), np.stack(wanted))


def asked(hub, since, *, origin="hub"):
    """Paths of the files that were asked for at the Hub's own address."""
    return [r.path.partition("/resolve/")[2].partition("/")[2] for r in hub.requests[since:] if r.origin == origin]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read_from_the_hub(hub, client, tmp_path, version):
    made = make(tmp_path / "set", version)
    repo = f"org/{version.replace(' ', '-')}"
    publish(hub, made, repo)
    found = client.run(LOAD, repo=repo, options={})
    assert same(found, made.expected())
    order = [made.texts[i] for i in (9, 0, 4)]
    pooling = "last_token" if "pooled" in version else "max"
    found = client.run(LOAD, repo=repo, options={"prompts": order, "layers": [2], "pooling": pooling})
    assert same([row[0] for row in found], [made.expected(pooling)[i][1] for i in (9, 0, 4)])
    keys = client.run("list(ac.load_activation_dataset(repo)[0])", repo=repo)
    assert keys[:3] == [f"hidden.layer_{layer}" for layer in (0, 2, 5)]
    assert client.run(METADATA, repo=repo, options={}) == [made.texts, hub.dataset(repo).refs["main"], 11]


def test_one_layer_transfers_its_bytes_and_the_index(hub, client, tmp_path):
    made = make(tmp_path / "set", n=600, layers=tuple(range(12)), dim=64, per_shard=200, k=0)
    publish(hub, made, "org/layers")
    index = (made.folder / INDEX).stat().st_size
    layer = 600 * 64 * 4
    before = len(hub.requests)
    found = client.run(LOAD, repo="org/layers", options={"layers": [7]})
    assert same([row[0] for row in found], [row[7] for row in made.expected()])
    assert hub.sent(before) <= 1.1 * layer + index
    assert sorted(set(asked(hub, before))) == [
        INDEX, *(f"tensors/hidden_layer007_shard00{s}.safetensors" for s in range(3)),
    ]  # fmt: skip
    before = len(hub.requests)
    found = client.run(
        LOAD, repo="org/layers", options={"layers": [7], "prompts": [made.texts[i] for i in (3, 4, 599)]}
    )
    assert same([row[0] for row in found], [made.expected()[i][7] for i in (3, 4, 599)])
    assert hub.sent(before) <= index + 2 * 2048 + 3 * 256 + 2000, "the headers of two files, and three rows"


def test_layers_that_share_a_file_are_read_apart(hub, client, tmp_path):
    made = make(tmp_path / "set", "1.0 pooled", n=600, layers=tuple(range(12)), dim=64, per_shard=600, k=0)
    publish(hub, made, "org/together")
    before = len(hub.requests)
    found = client.run(LOAD, repo="org/together", options={"layers": [3]})
    assert same([row[0] for row in found], [row[3] for row in made.expected()])
    assert hub.sent(before) <= 1.1 * 600 * 64 * 4 + (made.folder / INDEX).stat().st_size + 4096


def test_only_the_index_is_transferred_for_metadata(hub, client, tmp_path):
    noise = np.random.default_rng(0).integers(0, 2**60, (3000, 60)).tolist()
    made = make(tmp_path / "set", n=3000, dim=4, per_shard=3000, k=0, extra={"token_ids": noise})
    publish(hub, made, "org/index")
    size = (made.folder / INDEX).stat().st_size
    assert size > 1_400_000, "too large to be fetched whole"
    before = len(hub.requests)
    assert client.run(METADATA, repo="org/index", options={})[0] == made.texts
    assert set(asked(hub, before)) == {INDEX}
    assert hub.sent(before) < size - 300_000, "token ids stay where they are"


def test_a_private_dataset_needs_a_token_and_no_token_is_told_on(hub, client, tmp_path):
    made = make(tmp_path / "set")
    publish(hub, made, "org/secret", private=True)
    before = len(hub.requests)
    assert client.run(LOAD, repo="org/secret", options={})
    with Client(hub, tmp_path / "other", token=None, ACTCACHE_LOG="debug", HF_DEBUG="1") as stranger:
        with pytest.raises(ClientError, match=r"DatasetNotFoundError: dataset 'org/secret'.*private") as caught:
            stranger.run(LOAD, repo="org/secret", options={})
        assert caught.value.name == "DatasetNotFoundError"
        found = stranger.run(LOAD, repo="org/secret", options={"token": TOKEN})
        assert same(found, made.expected())
        for wrong in ("hf_wrongsecrettoken", "hf_wrong\nsecrettoken", "hf_wrong secrettoken", ""):
            with pytest.raises(ClientError) as caught:
                stranger.run(LOAD, repo="org/secret", options={"token": wrong})
            assert caught.value.name in ("DatasetNotFoundError", "OptionError")
            assert "secrettoken" not in caught.value.trace
        with pytest.raises(ClientError, match="OptionError: token=True"):
            stranger.run(LOAD, repo="org/secret", options={"token": True})
        shown = stranger.run(
            "from actcache.share.source import open_source; s = open_source(repo, token=token); "
            "repr([s, ac.fetch_dataset_metadata(repo, token=token)])",
            repo="org/secret", token=TOKEN,
        )  # fmt: skip
        assert "secrettoken" not in shown + stranger.log
    storage = [request for request in hub.requests[before:] if request.origin == "storage"]
    assert storage and not any(request.token for request in storage), "the other origin is sent no token"


def test_what_is_not_there_is_named(hub, client, tmp_path):
    with pytest.raises(ClientError, match=r"DatasetNotFoundError: dataset 'org/absent'.*\./folder"):
        client.run(LOAD, repo="org/absent", options={})
    made = make(tmp_path / "set")
    repository = publish(hub, made, "org/gated", gated=True)
    with pytest.raises(ClientError, match="gated"):
        client.run(LOAD, repo="org/gated", options={})
    repository.gated = False
    with pytest.raises(ClientError, match="no revision 'v9'"):
        client.run(LOAD, repo="org/gated", options={"revision": "v9"})
    hub.create("org/empty", kind="dataset").commit({"README.md": b"hello"})
    with pytest.raises(ClientError, match="no dataset of activations"):
        client.run(LOAD, repo="org/empty", options={})
    files = {p.relative_to(made.folder).as_posix(): p.read_bytes() for p in made.folder.rglob("*") if p.is_file()}
    del files["tensors/hidden_layer002_shard001.safetensors"]
    repository.commit(files)
    with pytest.raises(ClientError, match=r"org/gated has no file tensors/hidden_layer002_shard001"):
        client.run(LOAD, repo="org/gated", options={})


@pytest.mark.parametrize("status", [403, 404])
def test_bytes_that_the_hub_lacks_are_no_missing_repository(hub, client, tmp_path, status):
    publish(hub, make(tmp_path / "set"), "org/hollow")
    hub.inject(Fault(path="/blobs/", status=status, times=None))
    with pytest.raises(ClientError, match=rf"\S+ of org/hollow is in the repository, .* status {status}") as caught:
        client.run(LOAD, repo="org/hollow", options={})
    assert caught.value.name == "DatasetAccessError" and "no such dataset" not in str(caught.value)


def test_one_commit_is_read_whatever_is_pushed_meanwhile(hub, client, tmp_path):
    old, new = make(tmp_path / "old", seed=1), make(tmp_path / "new", seed=2)
    repository = publish(hub, old, "org/moving")
    commit = repository.refs["main"]
    repository.tag("v1", commit)
    hub.inject(Fault(path="hidden_layer", then=lambda: repository.commit(new.folder)))
    found = client.run(LOAD, repo="org/moving", options={})
    assert repository.refs["main"] != commit
    assert same(found, old.expected())
    assert same(client.run(LOAD, repo="org/moving", options={}), new.expected())
    for revision in ("v1", commit):
        found = client.run(LOAD, repo="org/moving", options={"revision": revision})
        assert same(found, old.expected())


@pytest.mark.parametrize(
    "fault",
    [
        Fault(path="shard001", status=503, times=2),
        Fault(path="shard001", status=429, retry_after=0, times=3),
        Fault(path="/blobs/", status=500, times=2),
        Fault(path="/blobs/", cut_answer=300, times=3),
        Fault(path="index/", cut_answer=0, times=2),
    ],
    ids=["503", "429", "500 of the storage", "cut answers", "nothing at all"],
)
def test_what_goes_wrong_for_a_while_is_asked_again(hub, client, tmp_path, fault):
    made = make(tmp_path / "set", dim=40)
    publish(hub, made, f"org/fault-{id(fault)}")
    fault.seen = fault.struck = 0
    hub.inject(fault)
    found = client.run(LOAD, repo=f"org/fault-{id(fault)}", options={})
    assert fault.struck
    assert same(found, made.expected())


def test_an_answer_that_was_cut_goes_on_where_it_ended(hub, client, tmp_path):
    made = make(tmp_path / "set", n=4, layers=(0,), dim=300_000, k=0)
    publish(hub, made, "org/resumed")
    hub.inject(Fault(path="/blobs/", cut_answer=3_500_000, skip=1, rate=2e7))
    before = len(hub.requests)
    found = client.run(LOAD.replace(".tolist()", ".sum()"), repo="org/resumed", options={})
    assert np.isclose(float(found), np.stack(made.expected()).sum(), rtol=1e-3)
    assert hub.sent(before, origin="storage") < 4_800_000 + 1_200_000, "what had come by then is not sent again"


def test_a_stop_does_not_wait_for_the_hub(hub, tmp_path):
    made = make(tmp_path / "set")
    publish(hub, made, "org/slow")
    code = """
import signal, threading, time, os, actcache as ac
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.time()
try:
    ac.load_activations(repo, show_progress=False)
    ended = "read"
except KeyboardInterrupt:
    ended = "stopped"
[ended, time.time() - begin]
"""
    with Client(hub, tmp_path / "client") as client:
        client.run(METADATA, repo="org/slow", options={})
        hub.inject(Fault(path="hidden_layer", status=429, retry_after=60, times=None))
        ended, seconds = client.run(code, repo="org/slow")
    assert ended == "stopped" and seconds < 15


def test_what_stays_wrong_is_an_error_that_tells_nothing_secret(hub, client, tmp_path):
    made = make(tmp_path / "set")
    publish(hub, made, "org/broken")
    hub.inject(Fault(path="/blobs/", status=500, retry_after=0, times=None))
    with pytest.raises(ClientError, match=r"DatasetAccessError: .*org/broken.*status 500, 6 times in a row") as caught:
        client.run(LOAD, repo="org/broken", options={})
    assert TOKEN not in caught.value.trace + client.log and "sign=" not in caught.value.trace


def test_offline_what_the_client_has_in_its_cache_is_read(hub, tmp_path):
    made = make(tmp_path / "set", "2.0 split")
    commit = publish(hub, made, "org/offline").refs["main"]
    with Client(hub, tmp_path / "client") as online:
        online.run(
            "import huggingface_hub; huggingface_hub.snapshot_download(repo, repo_type='dataset')", repo="org/offline"
        )
        before = len(hub.requests)
        online.run(LOAD, repo="org/offline", options={})
        assert set(asked(hub, before)) == {INDEX}, "files of that commit are here"
    before = len(hub.requests)
    with Client(hub, tmp_path / "client", HF_HUB_OFFLINE="1") as offline:
        found = offline.run(LOAD, repo="org/offline", options={})
        assert same(found, made.expected())
        assert offline.run(METADATA, repo="org/offline", options={})[1] == commit
        with pytest.raises(ClientError, match="HF_HUB_OFFLINE is set"):
            offline.run(LOAD, repo="org/other", options={})
    assert len(hub.requests) == before


def test_threads_read_side_by_side(hub, client, tmp_path):
    made = make(tmp_path / "set", "2.0 split", n=60, dim=20)
    publish(hub, made, "org/threads")
    code = """
from concurrent.futures import ThreadPoolExecutor
import actcache as ac, numpy as np
def load(i):
    pooling = ("last_token", "first_token", "max", None)[i % 4]
    return ac.load_activations(repo, pooling=pooling, as_dict=False, show_progress=False)
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(load, range(16)))
alone = [load(i) for i in range(4)]
all(np.array_equal(mine, theirs) for i in range(16) for mine, theirs in zip(found[i], alone[i % 4], strict=True))
"""
    assert client.run(code, repo="org/threads") is True


class _WithoutRanges(SimpleHTTPRequestHandler):
    """A mirror of the Hub that knows no ranges, and no commits."""

    def translate_path(self, path):
        return f"{self.directory}/{path.split('/resolve/main/')[-1]}"

    def log_message(self, format, *args):
        pass


def test_a_mirror_without_ranges(hub, tmp_path):
    made = make(tmp_path / "set", n=40, dim=50)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_WithoutRanges, directory=str(made.folder)))
    with LocalServer(server) as mirror, Client(hub, tmp_path / "client", HF_ENDPOINT=mirror.url) as client:
        assert same(client.run(LOAD, repo="org/set", options={}), made.expected())
        with pytest.raises(ClientError, match=r"DatasetAccessError: .*other bytes than were asked for"):
            client.run(LOAD, repo="org/set", options={"prompts": made.texts[3]})


def test_nothing_is_left_on_disk(hub, tmp_path):
    made = make(tmp_path / "set", "2.0 split")
    publish(hub, made, "org/traces")
    with Client(hub, tmp_path / "client") as client:
        client.run(METADATA, repo="org/traces", options={})
        client.run(LOAD, repo="org/traces", options={"pooling": "mean"})
    assert not [path for path in (tmp_path / "client").rglob("*") if path.is_file() and path.name != "log.txt"]

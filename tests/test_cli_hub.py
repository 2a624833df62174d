"""The verbs of datasets at a Hub: misuse, refusals, pipes, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from actcache.testing.hub import Fault
from hub_client import READ_TOKEN, TOKEN, Client
from made_datasets import make
from share_helpers import INDEX, MODEL, fill_tokens, new_space, new_store, rows

N = range(20)
CALL = """
import contextlib, io, os
from actcache.cli.app import run
out, err = io.StringIO(), io.StringIO()
os.environ.pop("HF_TOKEN", None)
if token is not None:
    os.environ["HF_TOKEN"] = token
os.chdir(folder)
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = run(arguments)
[status, out.getvalue(), err.getvalue()]
"""
HIDDEN = "it is private: check the name"
VERBS = {
    "dataset-info": [],
    "load": ["--out", "out.npz"],
    "pull": ["--store", "pulled"],
    "migrate": ["--shard-max-bytes", "100"],
    "upgrade": [],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store, datasets in folders, and what is none."""
    home = tmp_path_factory.mktemp("home")
    store = new_store(home)
    fill_tokens(store, new_space(store), N)
    store.close()
    make(home / "full", "1.0 full", k=0)
    make(home / "pooled", "1.1 pooled")
    (home / "other").mkdir()
    (home / "other" / "notes.txt").write_text("mine")
    (home / "empty").mkdir()
    (home / "file").write_text("no such prompt")
    return home


@pytest.fixture(scope="module")
def module_hub(module_hub, home):
    publish(module_hub, "user/full", home / "full")
    publish(module_hub, "user/pooled", home / "pooled")
    publish(module_hub, "user/private", home / "full", private=True)
    module_hub.create("user/gated", kind="dataset", gated=True)
    blank = module_hub.create("user/blank", kind="dataset")
    blank.commits.clear()
    blank.refs.clear()
    module_hub.create("user/other", kind="dataset").commit({"a.txt": b"1"})
    return module_hub


def publish(hub, name, folder, **options):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    repository = hub.create(name, kind="dataset", **options)
    repository.commit(files)
    return repository


@pytest.fixture(scope="module")
def client(module_hub, home):
    with Client(module_hub, home / "client", token=None, ACTCACHE_DIR=str(home / "store")) as client:
        yield client


@pytest.fixture
def call(client, home):
    def call(*arguments, token=TOKEN):
        return client.run(CALL, arguments=list(map(str, arguments)), token=token, folder=str(home))

    return call


def heads(hub):
    return {name: dict(repository.refs) for name, repository in hub.repositories.items()}


def files(folder):
    # What is on its way into a push that was refused serves the next one.
    others = {"client", "pushing"}
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not others & set(p.parts)}


def is_refused(hub, home, call, arguments, status, message, **options):
    """One line, nothing printed, and nothing changed anywhere."""
    before, here = heads(hub), files(home)
    found, out, err = call(*arguments, **options)
    assert (found, out) == (status, "") and message in err, (found, out, err)
    assert err.count("\n") == 1 and err.startswith("actcache: ") and TOKEN not in err and "Traceback" not in err
    assert heads(hub) == before and files(home) == here
    return True


# All of them in all tests: each fails in the same few places.
SOME = [verb if verb in ("pull", "upgrade") else pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS]


@pytest.mark.parametrize("verb", SOME)
@pytest.mark.parametrize(
    ("repo", "token", "status", "message"),
    [
        ("a/b/c", TOKEN, 2, "no repository of the Hub"),
        ("org name", TOKEN, 2, "is neither a repository"),
        ("user/absent", TOKEN, 1, HIDDEN),
        ("user/private", None, 1, HIDDEN),
        ("user/private", "hf_nobodys", 1, HIDDEN),
        ("user/blank", TOKEN, 1, "is empty on the Hub"),
        ("user/other", TOKEN, 1, "it is no dataset of activations"),
        ("./absent", TOKEN, 1, "absent is no folder of a dataset"),
        ("./empty", TOKEN, 1, "empty is no folder of a dataset"),
        ("./other", TOKEN, 1, "it is no dataset of activations"),
        ("./file", TOKEN, 1, "file is no folder of a dataset"),
        ("~nobody_of_this_name/set", TOKEN, 2, "no home folder"),
    ],
)
def test_datasets_that_are_not_to_be_had(hub, home, call, verb, repo, token, status, message):
    assert is_refused(hub, home, call, [verb, repo, *VERBS[verb]], status, message, token=token)


@pytest.mark.parametrize(
    ("arguments", "token", "status", "message"),
    [
        ([], None, 1, "needs a token of the Hub that may write"),
        ([], READ_TOKEN, 1, "this token may only read, and may not write"),
        ([], "hf_nobodys", 1, "(status 401): the Hub does not know this token"),
        ([], f"{TOKEN} x", 1, "or HF_TOKEN, is no token of the Hub"),
        (["--tensors", "resid_pots"], TOKEN, 2, "'resid_pots' is not stored"),
        (["--layers", "3"], TOKEN, 2, "No such option '--layers'"),
        (["--preload", "all"], TOKEN, 2, "'all' is not one of"),
        (["--num-workers", "0"], TOKEN, 2, "--num-workers"),
        (["--prompt", "x", "--label-column", "y"], TOKEN, 2, "--prompt TEXT has no label"),
        (["--space", "zzz"], TOKEN, 1, "no variant has a space that begins with 'zzz'"),
        (["--revision", "r2"], TOKEN, 1, "Did you mean revision='r1'"),
        (["--dtype", "float16"], TOKEN, 1, "Did you mean dtype='float32'"),
        (["absent.txt"], TOKEN, 2, "'absent.txt' does not exist"),
        (["file"], TOKEN, 1, "Warm them up first"),
        (["--description", f"by {TOKEN}"], TOKEN, 2, "description holds the token"),
    ],
)
def test_pushes_that_cannot_be(hub, home, call, arguments, token, status, message):
    assert is_refused(hub, home, call, ["push", "user/new", MODEL, *arguments], status, message, token=token)
    assert "datasets/user/new" not in hub.repositories


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["a/b/c", MODEL], 2, "no repository of the Hub"),
        (["user/new", "org/modle"], 1, "Did you mean 'org/model'"),
        (["user/other", MODEL], 1, "exists on the Hub and holds 1 file"),
        (["user/full", MODEL, "--private", "--exist-ok"], 1, "is public, and --private is asked for"),
        (["./other", MODEL], 1, "is not empty: pass --exist-ok"),
        (["./file", MODEL], 2, "is a file: name a folder"),
        (["/proc/absent/set", MODEL], 1, "cannot write to /proc/absent"),
        (["user/new"], 2, "Missing argument 'MODEL'"),
    ],
)
def test_places_that_cannot_be_pushed_to(hub, home, call, arguments, status, message):
    assert is_refused(hub, home, call, ["push", *arguments], status, message)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["load", "user/full", "--out", "x.npz", "--layers", "7"], 2, "no layer 7 of resid_post: it has 0, 2, 5"),
        (["load", "user/full", "--out", "x.npz", "--site", "attn_out"], 2, "no site 'attn_out'"),
        (["load", "user/pooled", "--out", "x.npz", "--pooling", "mean"], 2, "pooled with 'last_token'"),
        (["load", "user/full", "--out", "x.npz", "--prompts", "file"], 1, "has no prompt 'no such prompt'"),
        (["load", "user/full", "--out", "x.npz", "--revision", "v9"], 1, "no revision 'v9'"),
        (["load", "user/full", "--out", "x.txt"], 2, ".safetensors or .npz"),
        (["load", "user/full", "--out", "absent/x.npz"], 2, "there is no folder absent"),
        (["load", "user/full", "--out", "/proc/x.npz"], 1, "--out /proc/x.npz cannot be written"),
        (["load", "user/full"], 2, "Missing option '--out'"),
        (["pull", "user/full", "--store", "p", "--layers", "7"], 2, "no layer 7: it has 0, 2, 5"),
        (["pull", "user/full", "--store", "p", "--tensors", "nope"], 2, "no tensors 'nope': it has hidden_layers"),
        (["pull", "user/full", "--store", "./file"], 2, "is a file: name a folder"),
        (["pull", "user/full", "--store", "/proc/absent/x"], 1, "cannot write to the store folder /proc/absent"),
        (["pull", "user/full", "--store", "p", "--num-workers", "-1"], 2, "--num-workers"),
        (["migrate", "user/pooled"], 2, "one vector per prompt"),
        (["migrate", "user/full", "--shard-max-bytes", "0"], 2, "--shard-max-bytes"),
        (["migrate", "./full", "--public"], 2, "nothing for a folder"),
        (["upgrade", "user/full", "--shard-max-bytes", "9"], 2, "No such option"),
        (["dataset-info", "./full", "--revision", "main"], 2, "has no meaning for the folder"),
        (["dataset-info", "user/full", "user/pooled"], 2, "unexpected extra argument"),
        (["dataset-inof", "user/full"], 2, "Did you mean 'dataset-info'"),
    ],
)
def test_options_that_cannot_be(hub, home, call, arguments, status, message):
    assert is_refused(hub, home, call, arguments, status, message)


@pytest.mark.parametrize("verb", ["migrate", "upgrade"])
@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "needs a token of the Hub that may write"),
        (READ_TOKEN, "(status 403): this token may not write"),
    ],
)
def test_changes_without_the_right_to(hub, home, call, verb, token, message):
    assert is_refused(hub, home, call, [verb, "user/full"], 1, message, token=token)


class TestJson:
    """Of every verb, and nothing but that on standard output."""

    def test_there_and_back(self, hub, home, call, tmp_path):
        def said(*arguments):
            status, out, err = call(*arguments, "--json")
            assert (status, err) == (0, ""), err
            return json.loads(out)

        url = said("push", "user/mine", MODEL, "--no-shuffle", "--commit-batch-size", 1)["dataset"]
        assert url == f"{hub.url}/datasets/user/mine"
        found = said("dataset-info", "user/mine")
        assert (found["model_name"], found["num_prompts"], found["available_layers"]) == (MODEL, 20, [0, 1])
        assert found["commit"] == hub.dataset("user/mine").refs["main"]
        out = said("load", "user/mine", "--out", tmp_path / "x.npz", "--layers", "1", "--pooling", "none")
        assert out["tensors"]["layer_1"] == [sum(1 + i % 7 for i in N), 8]
        wanted = np.concatenate([rows(i, "resid_post.1") for i in N])
        assert np.array_equal(np.load(tmp_path / "x.npz")["layer_1"], wanted)
        out = said("pull", "user/mine", "--store", tmp_path / "s", "--materialize")
        assert (out["prompts"], out["model_name"], out["commit"]) == (20, MODEL, found["commit"])
        assert out["model_space"] is not None, "it answers by identity"
        assert said("migrate", "user/mine", "--dry-run")["changed"] is False
        assert said("upgrade", "user/mine")["changed"] is False
        assert said("upgrade", "user/pooled", "--dry-run")["removed"] == ["lmprobe_info.json"]
        out = said("migrate", "user/full", "--dry-run")
        assert out["dry_run"] and out["changed"] and INDEX in out["replaced"]


def start(hub, home, *arguments, token=TOKEN, **environment):
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    variables |= hub.environment(home / "hub")
    variables |= {"XDG_CACHE_HOME": str(home), "HF_TOKEN": token, **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "actcache", *map(str, arguments)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
    )


def interrupted(hub, home, arguments, fault, **environment):
    """Status, output and error of a command that gets Ctrl-C at a request."""
    process = None

    def interrupt():
        assert process is not None
        process.send_signal(signal.SIGINT)

    hub.inject(Fault(**fault, then=interrupt))
    process = start(hub, home, *arguments, **environment)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert hub.faults[0].struck, err
    hub.faults.clear()
    return process.returncode, out, err


def puts(hub, since=0):
    found = [r for r in hub.requests[since:] if r.method == "PUT" and r.status == 200 and "/blobs/" in r.path]
    return [r.path.partition("?")[0].rpartition("/")[2] for r in found]


class TestControlC:
    @pytest.mark.slow
    def test_of_a_push(self, hub, home, tmp_path):
        since = len(hub.requests)
        arguments = ["push", "user/cut", MODEL, "--store", home / "store", "--shard-max-bytes", "300"]
        arguments += ["--num-workers", "1"]
        place = tmp_path / "c"
        place.mkdir()
        cut = interrupted(hub, place, arguments, {"method": "PUT", "path": "/blobs/", "skip": 5})
        assert cut == (1, "", "actcache: stopped. The same command goes on from there.\n")
        repository = hub.repositories.get("datasets/user/cut")
        assert repository is None or INDEX not in repository.files()
        process = start(hub, place, *arguments)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, f"{hub.url}/datasets/user/cut\n", "")
        assert INDEX in hub.dataset("user/cut").files() and len(puts(hub, since)) == len(set(puts(hub, since)))

    @pytest.mark.slow
    @pytest.mark.parametrize("verb", ["migrate", "upgrade"])
    def test_of_a_change(self, hub, home, tmp_path, verb):
        name = f"user/{verb}"
        repository = publish(hub, name, home / "full")
        head, since = repository.refs["main"], len(hub.requests)
        at = {"migrate": {"method": "PUT", "path": "/blobs/", "skip": 5}, "upgrade": {"path": "/preupload/"}}[verb]
        (tmp_path / "c").mkdir()
        cut = interrupted(hub, tmp_path / "c", [verb, name, *VERBS[verb]], at)
        assert cut == (1, "", "actcache: stopped. The same command goes on from there.\n")
        assert repository.refs["main"] == head
        process = start(hub, tmp_path / "c", verb, name, *VERBS[verb])
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert "lmprobe_info.json" not in repository.files() and len(repository.history()) == 3
        assert len(puts(hub, since)) == len(set(puts(hub, since)))

    @pytest.mark.slow
    def test_of_a_pull(self, hub, home, tmp_path):
        (tmp_path / "c").mkdir()
        arguments = ["pull", "user/full", "--store", tmp_path / "s", "--materialize", "--trust-names"]
        cut = interrupted(hub, tmp_path / "c", arguments, {"method": "GET", "path": "/blobs/.*", "skip": 4})
        assert cut == (1, "", "actcache: stopped. What has come is kept. The same command goes on from there.\n")
        process = start(hub, tmp_path / "c", *arguments)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "11 prompts pulled" in out, err

    @pytest.mark.slow
    def test_once_more(self, hub, home, tmp_path):
        """The first one waits for what is just sent, which may be large."""
        processes = []

        def again_and_again():
            for _ in range(100):
                if processes[0].poll() is not None:
                    return
                processes[0].send_signal(signal.SIGINT)
                time.sleep(0.3)

        (tmp_path / "c").mkdir()
        hub.inject(Fault(method="PUT", path="/blobs/", then=again_and_again))
        processes.append(start(hub, tmp_path / "c", "push", "user/twice", MODEL, "--store", home / "store"))
        try:
            out, err = processes[0].communicate(timeout=60)
        finally:
            processes[0].kill()
            processes[0].communicate()
        assert (processes[0].returncode, out) == (1, "")
        # It may have been told of the first one by then, and be on its way out.
        at_once = "actcache: stopped at once. What was on its way begins anew."
        assert err.splitlines() in ([at_once], ["actcache: stopped. The same command goes on from there.", at_once])

    def test_of_a_load(self, hub, home, tmp_path):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "x.npz").write_bytes(b"before")
        arguments = ["load", "user/full", "--out", "x.npz"]
        cut = interrupted(hub, tmp_path / "c", arguments, {"method": "GET", "path": "/blobs/.*", "skip": 2})
        assert cut == (1, "", "actcache: stopped. No file is half written: the same command begins anew.\n")
        assert (tmp_path / "c" / "x.npz").read_bytes() == b"before"
        assert [p.name for p in (tmp_path / "c").iterdir() if p.name != "hub"] == ["x.npz"]


@pytest.mark.slow
def test_in_pipes(hub, home, tmp_path):
    """No bars, no colours, and whoever reads one line of it does no harm."""
    (tmp_path / "c").mkdir()
    store = ["--store", str(home / "store")]
    for arguments in (
        ["push", "user/piped", MODEL, *store],
        ["dataset-info", "user/piped"],
        ["load", "user/piped", "--out", "x.safetensors"],
        ["pull", "user/piped", "--materialize", "--store", "p"],
        ["migrate", "user/piped", "--dry-run"],
    ):
        process = start(hub, tmp_path / "c", *arguments)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "") and out.strip()
        assert "\x1b" not in out and "\r" not in out and "%|" not in out and "━" not in out
    code = f"{sys.executable} -m actcache dataset-info user/piped --json | head -c 20; exit ${{PIPESTATUS[0]}}"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ran = subprocess.run(
        ["bash", "-c", code],
        env=os.environ | hub.environment(tmp_path / "hub") | environment | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.stdout.startswith('{\n  "dataset"') and ran.stderr == ""

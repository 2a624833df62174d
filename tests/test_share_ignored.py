"""A dataset repository with a .gitignore: the client leaves out what it matches, without a word."""

from __future__ import annotations

import time

import pytest

from actcache.testing.hub.repositories import is_ignored
from hub_client import ClientError
from made_datasets import make
from share_helpers import INDEX, MODEL, fill_pooled, new_space, new_store, text

PUSH = "import actcache as ac\nac.push_dataset(repo, model, prompts, store=store, exist_ok=True, **options)"
CHANGE = "import actcache as ac\ngetattr(ac, f)(repo)"
N = range(4)


@pytest.fixture
def repo(hub):
    name = f"user/set{time.monotonic_ns()}"
    hub.create(name, kind="dataset")
    return name


def push(client, home, repo, **options):
    prompts = [text(i) for i in N]
    return client.run(PUSH, repo=repo, model=MODEL, prompts=prompts, store=str(home / "store"), options=options)


def puts(hub, since):
    return [r for r in hub.requests[since:] if r.method == "PUT"]


class TestPush:
    @pytest.mark.parametrize(
        ("patterns", "named"),
        [
            ("# mine\ntensors/\n", "tensors/hidden_layer000_shard000.safetensors"),
            ("*.safetensors\n", "tensors/hidden_layer000_shard000.safetensors"),
            ("*.parquet\n", INDEX),
            ("*layer001*\n", "tensors/hidden_layer001_shard000.safetensors"),
            ("/README.md\n", "README.md"),
        ],
    )
    @pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
    def test_is_refused_before_any_commit(self, hub, client, repo, tmp_path, patterns, named, there):
        store = new_store(tmp_path)
        fill_pooled(store, new_space(store), N, seed=time.monotonic_ns() % 2**31)
        old = {"tensors/old_000.safetensors": b"old", INDEX: b"old"} if there else {}
        hub.dataset(repo).commit({".gitignore": patterns.encode(), **old})
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        with pytest.raises(ClientError, match=r"OptionError.*\.gitignore of the repository excludes") as error:
            push(client, tmp_path, repo, commit_batch_size=1)
        assert named in error.value.message
        assert hub.dataset(repo).refs["main"] == head and puts(hub, since) == []
        # What stands in the way is gone: the same call goes on.
        hub.dataset(repo).commit({".gitignore": b"*.log\n"})
        push(client, tmp_path, repo)
        found = hub.dataset(repo).files()
        assert {"tensors/hidden_layer000_shard000.safetensors", INDEX, "README.md"} <= found.keys()
        assert "tensors/old_000.safetensors" not in found


class TestChange:
    @pytest.mark.parametrize("f", ["migrate_dataset", "upgrade_dataset_format"])
    @pytest.mark.parametrize("patterns", ["*.parquet\n", "README.md\n", "tensors\n"])
    def test_is_refused_before_anything_is_fetched(self, hub, client, repo, tmp_path, f, patterns):
        made = make(tmp_path / "set", "1.0 full", seed=5)
        files = {p.relative_to(made.folder).as_posix(): p.read_bytes() for p in made.folder.rglob("*") if p.is_file()}
        hub.dataset(repo).commit({**files, "README.md": b"# Mine\n", ".gitignore": patterns.encode()})
        head, since = hub.dataset(repo).refs["main"], len(hub.requests)
        if f.startswith("upgrade") and patterns.startswith("tensors"):
            # It adds no file of vectors, and those that are there stay.
            client.run(CHANGE, f=f, repo=repo)
            found = hub.dataset(repo).files()
            assert "lmprobe_info.json" not in found
            assert {path for path in files if path.startswith("tensors/")} <= found.keys()
            return
        with pytest.raises(ClientError, match=r"OptionError.*\.gitignore of the repository excludes"):
            client.run(CHANGE, f=f, repo=repo)
        assert hub.dataset(repo).refs["main"] == head and puts(hub, since) == []


@pytest.mark.parametrize(
    ("patterns", "path", "ignored"),
    [
        ("tensors/", "tensors/a.safetensors", True),
        ("tensors/", "tensors", False),
        ("tensors", "deep/tensors/a.bin", True),
        ("/tensors", "deep/tensors/a.bin", False),
        ("*.safetensors", "tensors/a.safetensors", True),
        ("tensors/*_000.bin", "tensors/a_000.bin", True),
        ("#tensors\n\n*.log", "tensors/a.bin", False),
        ("*.log\r\nindex/\r\n", "index/train.parquet", True),
    ],
)
def test_what_a_hub_ignores(patterns, path, ignored):
    assert is_ignored(path, patterns) is ignored

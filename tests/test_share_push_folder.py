"""The folder that is pushed into: what is there, what a kill leaves, and what is refused before anything is made."""

from __future__ import annotations

import hashlib
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetExistsError, DiskFullError, OptionError, PromptError, PromptTypeError
from share_helpers import (
    BLOCKS,
    INDEX,
    LAYERS,
    MODEL,
    TEXTS,
    N,
    fill_pooled,
    fill_tokens,
    has_right_digests,
    new_store,
    push,
    rows,
    text,
)


def die_at_file(number, *, within=".pushing", suffix=".safetensors"):
    """End this process when it would put its file `number` in place."""
    replace, seen = os.replace, []

    def dying(source, target):
        if str(target).endswith(suffix) and within in str(target):
            seen.append(target)
            if len(seen) == number:
                os._exit(77)
        replace(source, target)

    os.replace = dying


def cut_push(folder, home, at):
    """A push by a process that ends when it would put its file `at` in place."""
    pid = os.fork()
    if not pid:
        die_at_file(at)
        ac.push_dataset(folder, MODEL, TEXTS, store=new_store(home), shard_max_bytes=100, num_workers=1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 77


class TestFolders:
    def test_what_is_there_stays_unless_asked(self, pooled, tmp_path):
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "mine.txt").write_text("keep me")
        with pytest.raises(DatasetExistsError, match="exist_ok=True"):
            ac.push_dataset(folder, MODEL, TEXTS, store=pooled)
        assert {p.name for p in folder.iterdir()} == {"mine.txt"} and len(list(tmp_path.glob(".*"))) == 0
        push(pooled, folder, exist_ok=True)
        assert (folder / "mine.txt").read_text() == "keep me"

    def test_an_empty_folder_is_none(self, pooled, tmp_path):
        (tmp_path / "set").mkdir()
        push(pooled, tmp_path / "set")

    def test_a_smaller_dataset_leaves_nothing_of_a_larger_one(self, store, space, tmp_path):
        fill_tokens(store, space, N, (*LAYERS, "attn_out.0"))
        folder = tmp_path / "set"
        assert len(push(store, folder, shard_max_bytes=100).files) > 60
        small = push(store, folder, TEXTS[:2], tensors=["resid_post.0"], exist_ok=True)
        assert small.files == {"README.md", INDEX, BLOCKS, *small.ours["files"]} and len(small.files) == 5
        assert np.array_equal(small.tokens(text(1)).numpy(), rows(1, "resid_post.0"))

    def test_a_link_to_a_folder_stays_one(self, pooled, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "set").symlink_to(tmp_path / "real")
        found = push(pooled, tmp_path / "set")
        assert (tmp_path / "set").is_symlink() and INDEX in found.files

    @pytest.mark.parametrize("at", [1, 3, 15, 16])
    def test_killed_while_it_replaces_another_it_shows_neither(self, pooled, space, tmp_path, at):
        folder = tmp_path / "set"
        push(pooled, folder, shard_max_bytes=100)
        pooled.invalidate(space)
        fill_pooled(pooled, space, N, seed=1)
        options = {"shard_max_bytes": 100, "num_workers": 1}
        pid = os.fork()
        if not pid:
            die_at_file(at, within=f"{folder}/", suffix="")
            ac.push_dataset(folder, MODEL, TEXTS, store=new_store(tmp_path), exist_ok=True, **options)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 77
        assert not (folder / INDEX).exists()
        # It was asked for when it began.
        found = push(pooled, folder, **options)
        assert not (folder / ".pushing").exists()
        assert all(np.array_equal(found.row(text(i)).numpy(), rows(i, "resid_post.0", seed=1)[-1]) for i in N)

    def test_a_file_is_no_folder(self, pooled, tmp_path):
        (tmp_path / "set").write_text("x")
        with pytest.raises(OptionError, match="is a file"):
            ac.push_dataset(tmp_path / "set", MODEL, TEXTS, store=pooled)

    def test_named_as_text(self, pooled, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert ac.push_dataset("./set", MODEL, TEXTS, store=pooled) == str(tmp_path / "set")
        assert ac.push_dataset(f"file://{tmp_path}/b", MODEL, TEXTS, store=pooled) == str(tmp_path / "b")

    def test_checksums_are_those_of_the_files(self, pooled, tmp_path):
        found = push(pooled, tmp_path / "set", shard_max_bytes=100)
        assert found.files - {"README.md", INDEX, BLOCKS} == found.ours["files"].keys()
        for path, (size, digest) in found.ours["files"].items():
            data = (found.folder / path).read_bytes()
            assert len(data) == size and hashlib.sha256(data).hexdigest() == digest
        assert has_right_digests(found)

    def test_no_room_is_told_before_anything_is_made(self, pooled, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(DiskFullError, match="stream=True"):
            ac.push_dataset(tmp_path / "set", MODEL, TEXTS, store=pooled)
        assert not (tmp_path / "set").exists()

    @pytest.mark.parametrize(
        "options",
        [
            {"shard_max_bytes": 0}, {"shard_max_bytes": True}, {"num_workers": 0}, {"commit_batch_size": -1},
            {"stream": True, "stream_batch_size": 0}, {"preload": "everything"}, {"preload_workers": 0},
            {"license": "mit\nhello: 1"}, {"license": ""}, {"description": 5}, {"token": "hf_x\n"},
        ],
    )  # fmt: skip
    def test_options_that_cannot_be(self, pooled, tmp_path, options):
        with pytest.raises(OptionError) as error:
            ac.push_dataset(tmp_path / "set", MODEL, TEXTS, store=pooled, **options)
        assert next(iter(options)) in str(error.value) or "stream_batch_size" in str(error.value)
        assert "hf_x" not in str(error.value) and not (tmp_path / "set").exists()

    @pytest.mark.parametrize("prompts", [[], [""], [5], "", {"a": 1}])
    def test_prompts_that_are_none(self, pooled, tmp_path, prompts):
        with pytest.raises((OptionError, PromptError, PromptTypeError)):
            ac.push_dataset(tmp_path / "set", MODEL, prompts, store=pooled)
        with pytest.raises(OptionError, match="belong to prompts"):
            ac.push_dataset(tmp_path / "set", MODEL, None, labels=[1], store=pooled)


class TestInterrupted:
    @pytest.mark.parametrize("at", [1, 4, 9])
    def test_goes_on_where_it_was(self, pooled, tmp_path, at):
        folder = tmp_path / "set"
        cut_push(folder, tmp_path, at)
        assert not folder.exists()
        staged = {p: p.stat().st_mtime_ns for p in tmp_path.glob(".set.pushing/*/files/**/*.safetensors")}
        assert len(staged) == at - 1
        found = push(pooled, folder, shard_max_bytes=100)
        reused = [p for p in folder.rglob("*.safetensors") if p.stat().st_mtime_ns in staged.values()]
        assert len(reused) == at - 1
        assert all(np.array_equal(found.row(text(i)).numpy(), rows(i, "resid_post.0")[-1]) for i in N)

    def test_what_became_of_other_vectors_is_not_published(self, pooled, space, tmp_path):
        folder = tmp_path / "set"
        cut_push(folder, tmp_path, 9)
        pooled.invalidate(space)
        fill_pooled(pooled, space, N, seed=9)
        found = push(pooled, folder, shard_max_bytes=100)
        for i in N:
            assert np.array_equal(found.row(text(i)).numpy(), rows(i, "resid_post.0", seed=9)[-1])

    def test_a_file_that_a_crash_left_half_written_is_made_again(self, pooled, tmp_path):
        folder = tmp_path / "set"
        cut_push(folder, tmp_path, 9)
        for path in tmp_path.glob(".set.pushing/*/files/**/*.safetensors"):
            path.write_bytes(bytes(path.stat().st_size))
        found = push(pooled, folder, shard_max_bytes=100)
        for i in N:
            assert np.array_equal(found.row(text(i)).numpy(), rows(i, "resid_post.0")[-1])

"""A folder that is migrated or upgraded: killed at any step, and edited meanwhile."""

from __future__ import annotations

import errno
import fcntl
import shutil
import subprocess
import sys

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetAccessError, DatasetExistsError, DatasetNotFoundError
from actcache.share import exchange, folder_change
from made_datasets import INDEX, make
from migrate_helpers import INFO, JOBS, contents, litter
from share_helpers import MODEL, Published, fill_pooled, new_space, new_store

# One process with everything imported; a child of it for each step, killed before it takes it.
KILLED = """
import os, shutil, signal, sys, traceback
import actcache as ac
import actcache.share.folder_change, actcache.share.hub_change, pyarrow.parquet, pyarrow.compute, ml_dtypes
from actcache.share import exchange
root, f, events, exchanges, step = sys.argv[1:]
change, events = getattr(ac, f), events.split(",")
if exchanges == "no":
    exchange._AT_CWD = {}
at = 0
while True:
    at += int(step)
    target = f"{root}/{at}/set"
    shutil.copytree(f"{root}/set", target)
    pid = os.fork()
    if pid == 0:
        left = at
        def watch(event, args):
            global left
            if event in events:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        try:
            change(target)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def killed(tmp_path, name, events, *, exchanges, step=1):
    """Folders of a dataset whose change was killed before each of `events`, and what they were."""
    made = make(tmp_path / "set", "1.0 full", k=0)
    (made.folder / "mine.txt").write_text("keep me")
    arguments = [str(tmp_path), JOBS[name][0].__name__, ",".join(events), "yes" if exchanges else "no", str(step)]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True, timeout=240)
    folders = [path / "set" for path in sorted(tmp_path.glob("*[0-9]"), key=lambda path: int(path.name))]
    assert len(folders) >= 3
    return made, folders


def is_old_or_new(folder, made, old):
    values = ac.load_activations(folder, as_dict=False)
    found = contents(folder)
    if found != old:
        told = Published(folder)
        assert told.metadata["format_version"] == "2.0" and INFO not in found
        assert (folder / "mine.txt").read_text() == "keep me"
    return np.array_equal(np.stack(values), np.stack(made.expected()))


@pytest.mark.parametrize("name", ["upgrade", pytest.param("migrate", marks=pytest.mark.slow)])
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "renames"])
def test_killed_before_each_rename(tmp_path, name, exchanges):
    made, folders = killed(tmp_path, name, ["os.rename", "shutil.rmtree"], exchanges=exchanges)
    old = contents(made.folder)
    aside = 0
    for number, folder in enumerate(folders):
        gone = not folder.exists()
        aside += gone
        if gone and number % 2:
            # Whoever asks next brings it back: here who publishes something else.
            store = new_store(tmp_path)
            fill_pooled(store, new_space(store), range(3))
            with pytest.raises(DatasetExistsError):
                ac.push_dataset(folder, MODEL, None, store=store)
        assert is_old_or_new(folder, made, old)
        JOBS[name][0](folder)
        assert is_old_or_new(folder, made, {}) and litter(folder) == []
    assert aside == (0 if exchanges else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "renames"])
def test_killed_before_anything_that_it_does(tmp_path, name, exchanges):
    events = ["open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "os.chmod"]
    made, folders = killed(tmp_path, name, events, exchanges=exchanges, step=3)
    old = contents(made.folder)
    for folder in folders:
        assert is_old_or_new(folder, made, old)
        JOBS[name][0](folder)
        assert is_old_or_new(folder, made, {}) and litter(folder) == []


class TestPutAside:
    @pytest.fixture
    def aside(self, tmp_path):
        """A dataset as it lies between two renames."""
        made = make(tmp_path / "set", "1.1 full")
        place = tmp_path / ".set.migrating" / f"{'a' * 16}.1234567.old"
        place.parent.mkdir()
        made.folder.rename(place)
        return made, place

    @pytest.mark.parametrize(
        "ask",
        [
            lambda folder, home: ac.load_activations(folder),
            lambda folder, home: ac.load_activation_dataset(folder),
            lambda folder, home: ac.fetch_dataset_metadata(folder),
            lambda folder, home: ac.pull_dataset(folder, store=ac.Store(home / "store")),
            lambda folder, home: ac.migrate_dataset(folder, dry_run=True),
            lambda folder, home: ac.upgrade_dataset_format(folder, dry_run=True),
        ],
    )
    def test_comes_back_for_whoever_asks(self, tmp_path, aside, ask, caplog):
        made, place = aside
        ask(made.folder, tmp_path)
        assert not place.exists() and np.array_equal(ac.load_activations(made.folder)[0][3], made.expected()[3][0])
        assert "the dataset of before is back" in caplog.text
        assert not place.parent.exists(), "nothing is left of it"

    def test_comes_back_under_a_link_and_into_an_empty_folder(self, tmp_path, aside):
        made, place = aside
        made.folder.mkdir()
        (tmp_path / "link").symlink_to(made.folder)
        assert ac.fetch_dataset_metadata(tmp_path / "link").num_prompts == 11
        assert not place.exists() and (tmp_path / "link").is_symlink()

    def test_waits_for_who_is_at_work(self, tmp_path, aside, monkeypatch):
        made, place = aside
        monkeypatch.setattr(exchange, "_PATIENCE_S", 0.05)
        with (place.parent / f"{'a' * 16}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(DatasetAccessError, match=r"`mv .*\.old .*/set` does it"):
                ac.load_activations(made.folder)
            assert place.is_dir()
        assert ac.fetch_dataset_metadata(made.folder).num_prompts == 11

    def test_work_that_was_begun_stays(self, aside):
        made, place = aside
        (place.parent / f"{'a' * 16}-content").mkdir()
        ac.load_activations(made.folder)
        assert (place.parent / f"{'a' * 16}-content").is_dir()

    def test_says_where_it_lies_where_it_cannot_be_renamed(self, aside, monkeypatch):
        made, place = aside

        def refuse(*names):
            raise PermissionError(errno.EACCES, "no")

        monkeypatch.setattr(exchange.os, "rename", refuse)
        with pytest.raises(DatasetAccessError, match=f"lies in {place}.*mv"):
            ac.fetch_dataset_metadata(made.folder)

    def test_stays_where_something_else_has_come(self, tmp_path, aside):
        _, place = aside
        other = make(tmp_path / "set", "1.1 full", seed=3)
        for _ in range(2):
            with pytest.raises(DatasetAccessError, match=f"remove {place}"):
                ac.upgrade_dataset_format(other.folder)
        assert place.is_dir() and INFO in contents(other.folder)
        shutil.rmtree(place)
        ac.upgrade_dataset_format(other.folder)
        assert litter(other.folder) == []

    def test_others_of_the_place_are_left_alone(self, tmp_path):
        (tmp_path / ".set.migrating" / "notes.old").mkdir(parents=True)
        with pytest.raises(DatasetNotFoundError):
            ac.load_activations(tmp_path / "set")
        assert litter(tmp_path / "set") == [".set.migrating"]


class TestEditedMeanwhile:
    @pytest.mark.parametrize("name", JOBS)
    def test_an_index_between_reading_and_replacing(self, tmp_path, name):
        made = make(tmp_path / "set", "1.0 full")
        with JOBS[name][1](made.folder).planned() as plan:
            (made.folder / INDEX).write_bytes(b"mine now")
            with pytest.raises(DatasetAccessError, match="somebody has changed"):
                plan.apply()
        assert (made.folder / INDEX).read_bytes() == b"mine now" and INFO in contents(made.folder)
        assert litter(made.folder) == []

    def test_in_the_last_instant(self, tmp_path, monkeypatch):
        made = make(tmp_path / "set", "1.0 full")
        change_places = folder_change.change_places
        times = []

        def late(new, old, owner):
            if not times:
                (old / "card.txt").write_text("mine")
            times.append(1)
            return change_places(new, old, owner)

        monkeypatch.setattr(folder_change, "change_places", late)
        with pytest.raises(DatasetAccessError, match="somebody has changed"):
            ac.upgrade_dataset_format(made.folder)
        found = contents(made.folder)
        assert len(times) == 2 and INFO in found and found["card.txt"] == b"mine" and litter(made.folder) == []

    def test_two_at_once(self, tmp_path):
        made = make(tmp_path / "set", "1.0 full")
        before = contents(made.folder)
        with (
            folder_change._staging(made.folder.resolve(), "content"),
            pytest.raises(DatasetAccessError, match="another process of this machine is at work on"),
        ):
            ac.upgrade_dataset_format(made.folder)
        assert contents(made.folder) == before


def test_what_is_done_is_not_called_undone(tmp_path, monkeypatch, caplog):
    """A disk that fails to make a change durable has seen it all the same."""

    def fail(folder):
        raise OSError(errno.EIO, "no")

    made = make(tmp_path / "set", "1.1 full")
    monkeypatch.setattr(exchange, "sync_folder", fail)
    ac.upgrade_dataset_format(made.folder)
    assert "is the new one, but whether it would be after a power failure is not known" in caplog.text
    assert ac.fetch_dataset_metadata(made.folder).format_version == "2.0" and litter(made.folder) == []

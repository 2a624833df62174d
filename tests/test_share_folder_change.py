"""A folder that is migrated or upgraded: killed at any step, edited meanwhile, and with anything else in it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetAccessError, DatasetExistsError, DatasetNotFoundError, DiskFullError, OptionError
from actcache.share import exchange, folder_change
from actcache.share.migrate import Migration, Upgrade
from made_datasets import INDEX, make
from share_helpers import MODEL, Published, fill_pooled, new_space, new_store

JOBS = {"migrate": (ac.migrate_dataset, Migration), "upgrade": (ac.upgrade_dataset_format, Upgrade)}
INFO = "lmprobe_info.json"

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


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def litter(folder):
    return [p.name for p in folder.parent.iterdir() if p != folder]


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


def test_no_vector_is_copied(tmp_path):
    made = make(tmp_path / "set", "1.1 full")
    before = {path: (made.folder / path).stat().st_ino for path in made.files}
    ac.upgrade_dataset_format(made.folder)
    assert {path: (made.folder / path).stat().st_ino for path in made.files} == before


def test_the_files_are_as_open_as_before(tmp_path):
    made = make(tmp_path / "set", "1.1 full")
    (made.folder / INDEX).chmod(0o640)
    made.folder.chmod(0o750)
    ac.migrate_dataset(made.folder)
    files = [path for path in made.folder.rglob("*") if path.is_file() and path.name != "logits_topk_000.safetensors"]
    assert len(files) > 3 and {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert made.folder.stat().st_mode & 0o777 == 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("name", JOBS)
def test_the_files_are_of_whom_they_were(tmp_path, name):
    made = make(tmp_path / "set", "1.1 full")
    (made.folder / "link").symlink_to("absent")
    for path in [made.folder, *made.folder.rglob("*")]:
        os.chown(path, 1234, 2345, follow_symlinks=False)
    JOBS[name][0](made.folder)
    found = {(path.lstat().st_uid, path.lstat().st_gid) for path in [made.folder, *made.folder.rglob("*")]}
    assert found == {(1234, 2345)}


def test_nobody_else_looks_into_what_is_on_its_way(tmp_path, monkeypatch):
    made = make(tmp_path / "set", "1.1 full")
    made.folder.chmod(0o700)
    modes = []
    link = folder_change._link_others
    monkeypatch.setattr(
        folder_change, "_link_others", lambda *a: modes.append((tmp_path / ".set.migrating").stat().st_mode) or link(*a)
    )
    ac.upgrade_dataset_format(made.folder)
    assert [mode & 0o777 for mode in modes] == [0o700] and made.folder.stat().st_mode & 0o777 == 0o700


class TestWhatElseIsThere:
    @pytest.fixture
    def made(self, tmp_path):
        """Pipes, sockets, links that lead nowhere, in a circle, and out of the dataset."""
        made = make(tmp_path / "set", "1.0 full")
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "data").write_text("mine")
        os.mkfifo(made.folder / "tensors" / "pipe")
        (made.folder / "nowhere").symlink_to("absent/file")
        (made.folder / "circle").symlink_to("circle")
        (made.folder / "tensors" / "out").symlink_to(tmp_path / "outside")
        with socket.socket(socket.AF_UNIX) as listening:
            os.chdir(made.folder)
            listening.bind("socket")
        return made

    @pytest.fixture(autouse=True)
    def _here(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("name", JOBS)
    def test_stays_as_it_is(self, tmp_path, made, name):
        modes = {p: p.lstat().st_mode for p in made.folder.rglob("*") if not p.is_file() and not p.is_dir()}
        assert {"pipe", "socket", "nowhere", "circle"} <= {path.name for path in modes}
        JOBS[name][0](made.folder)
        assert {path: path.lstat().st_mode for path in modes} == modes
        assert os.readlink(made.folder / "tensors" / "out") == str(tmp_path / "outside")
        assert contents(tmp_path / "outside") == {"data": b"mine"}
        assert np.array_equal(np.stack(ac.load_activations(made.folder, as_dict=False)), np.stack(made.expected()))

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("name", JOBS)
    def test_is_named_where_nothing_keeps_it(self, made, monkeypatch, name):
        def no_link(*args, **options):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(folder_change.os, "link", no_link)
        with pytest.raises(OptionError, match=r"(pipe|socket) is no ordinary file"):
            JOBS[name][0](made.folder)
        assert INFO in contents(made.folder)
        for path in ("tensors/pipe", "socket"):
            (made.folder / path).unlink()
        monkeypatch.setattr(folder_change.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(DiskFullError, match="are free"):
            JOBS[name][0](made.folder)
        monkeypatch.undo()
        monkeypatch.setattr(folder_change.os, "link", no_link)
        JOBS[name][0](made.folder)
        assert np.array_equal(np.stack(ac.load_activations(made.folder, as_dict=False)), np.stack(made.expected()))

    @pytest.mark.timeout(60)
    def test_a_push_in_its_place(self, tmp_path, made):
        store = new_store(tmp_path)
        fill_pooled(store, new_space(store), range(3))
        with pytest.raises(OptionError, match="tensors/out is a link"):
            ac.push_dataset(made.folder, MODEL, None, store=store, exist_ok=True)
        (made.folder / "tensors" / "out").unlink()
        ac.push_dataset(made.folder, MODEL, None, store=store, exist_ok=True)
        assert len(Published(made.folder).index) == 3 and contents(tmp_path / "outside") == {"data": b"mine"}
        assert (made.folder / "socket").is_socket() and (made.folder / "nowhere").is_symlink()

    @pytest.mark.parametrize("name", ["tensors", "index"])
    def test_a_push_through_a_link(self, tmp_path, name):
        store = new_store(tmp_path)
        fill_pooled(store, new_space(store), range(3))
        (tmp_path / "elsewhere" / "set").mkdir(parents=True)
        (tmp_path / "elsewhere" / "set" / "old").write_text("mine")
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OptionError, match=f"/{name} is a link"):
            ac.push_dataset(tmp_path / "set", MODEL, None, store=store, exist_ok=True)
        assert contents(tmp_path / "elsewhere") == {"set/old": b"mine"} and os.listdir(tmp_path / "set") == [name]

    def test_a_mark_that_is_a_link(self, tmp_path):
        """It is what says that a push was cut, so that it may go on where something is already."""
        made = make(tmp_path / "set", "1.0 full")
        (made.folder / ".pushing").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_text("mine")
        os.utime(tmp_path / "elsewhere", (1, 1))
        store = new_store(tmp_path)
        fill_pooled(store, new_space(store), range(3))
        with pytest.raises(DatasetExistsError):
            ac.push_dataset(made.folder, MODEL, None, store=store)
        ac.push_dataset(made.folder, MODEL, None, store=store, exist_ok=True)
        assert (tmp_path / "elsewhere").stat().st_mtime == 1 and len(Published(made.folder).index) == 3


class TestTheFolderItself:
    def test_one_that_cannot_be_looked_into(self, tmp_path, monkeypatch):
        made = make(tmp_path / "set", "1.0 full")
        (made.folder / "secret").mkdir()
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("secret"):
                raise PermissionError(errno.EACCES, "no", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(DatasetAccessError, match="secret cannot be looked into"):
            ac.upgrade_dataset_format(made.folder)
        assert INFO in contents(made.folder)

    def test_where_somebody_stands(self, tmp_path, monkeypatch, caplog):
        made = make(tmp_path / "set", "1.0 full")
        monkeypatch.chdir(made.folder / "tensors")
        ac.upgrade_dataset_format("..")
        assert Path("../README.md").is_file() and Path.cwd() == made.folder / "tensors"
        assert "`cd .`" in caplog.text

    @pytest.mark.parametrize("place", ["folder", "parent"])
    def test_that_may_not_be_written_to(self, tmp_path, monkeypatch, place):
        made = make(tmp_path / "set", "1.0 full")
        closed = {"folder": made.folder, "parent": tmp_path}[place]
        monkeypatch.setattr(folder_change.os, "access", lambda path, mode: Path(path) != closed)
        with pytest.raises(DatasetAccessError, match=f"{closed} may not be written to.*copy"):
            ac.upgrade_dataset_format(made.folder)
        assert INFO in contents(made.folder) and litter(made.folder) == []

    def test_that_cannot_be_renamed(self, tmp_path, monkeypatch):
        made = make(tmp_path / "set", "1.0 full")

        def refuse(*names):
            raise OSError(errno.EXDEV, "of a lower layer")

        monkeypatch.setattr(exchange, "_AT_CWD", {})
        monkeypatch.setattr(exchange.os, "rename", refuse)
        with pytest.raises(DatasetAccessError, match=r"cannot be replaced where it is.*copy"):
            ac.upgrade_dataset_format(made.folder)
        assert INFO in contents(made.folder) and litter(made.folder) == []


def test_what_is_done_is_not_called_undone(tmp_path, monkeypatch, caplog):
    """A disk that fails to make a change durable has seen it all the same."""

    def fail(folder):
        raise OSError(errno.EIO, "no")

    made = make(tmp_path / "set", "1.1 full")
    monkeypatch.setattr(exchange, "sync_folder", fail)
    ac.upgrade_dataset_format(made.folder)
    assert "is the new one, but whether it would be after a power failure is not known" in caplog.text
    assert ac.fetch_dataset_metadata(made.folder).format_version == "2.0" and litter(made.folder) == []

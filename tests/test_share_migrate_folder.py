"""The folder of a dataset that is migrated or upgraded: what else is in it, links, and a kill at any time."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

import actcache as ac
from actcache.errors import DatasetAccessError, DiskFullError
from actcache.share import exchange, folder_change
from actcache.share.migrate import Migration
from made_datasets import INDEX, make
from migrate_helpers import INFO, SMALL, contents, litter, read_plainly, same_values


def test_no_file_becomes_whole_of_what_was_not_read(tmp_path):
    """Where one file fails the others are stopped, in the middle of their rows."""
    made = make(tmp_path / "set", "1.1 full")
    with Migration(made.folder).planned() as plan:
        change = plan.change
        change.source.stop.set()
        for file in change.files:
            with pytest.raises(DatasetAccessError, match="stopped"), (tmp_path / "file").open("wb") as out:
                file.write(out)


class TestTheFolder:
    def test_what_is_others_stays(self, tmp_path):
        made = make(tmp_path / "set", "1.0 full")
        (made.folder / "empty").mkdir()
        (made.folder / "deep" / "er").mkdir(parents=True)
        (made.folder / "deep" / "er" / "data").write_bytes(b"1")
        (made.folder / "link").symlink_to("deep/er")
        (made.folder / "deep").chmod(0o750)
        (made.folder / "tensors" / "own.safetensors").write_bytes(b"mine")
        ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
        assert same_values(made)
        assert (made.folder / "empty").is_dir() and os.readlink(made.folder / "link") == "deep/er"
        assert (made.folder / "link" / "data").read_bytes() == b"1"
        assert (made.folder / "deep").stat().st_mode & 0o777 == 0o750
        assert (made.folder / "tensors" / "own.safetensors").read_bytes() == b"mine"

    def test_named_by_a_link(self, tmp_path):
        made = make(tmp_path / "elsewhere" / "set", "1.0 full")
        (tmp_path / "link").symlink_to(made.folder)
        assert ac.migrate_dataset(tmp_path / "link") == str(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and same_values(made) and litter(made.folder) == []

    def test_changed_meanwhile(self, tmp_path, monkeypatch):
        made = make(tmp_path / "set", "1.0 full")
        link = folder_change._link_others

        def meanwhile(*args):
            (made.folder / "new").write_text("x")
            link(*args)

        monkeypatch.setattr(folder_change, "_link_others", meanwhile)
        with pytest.raises(DatasetAccessError, match="somebody has changed"):
            ac.migrate_dataset(made.folder)
        assert (made.folder / INFO).exists() and (made.folder / "new").exists() and same_values(made)
        monkeypatch.undo()
        ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
        assert read_plainly(made.folder, made) and (made.folder / "new").exists() and litter(made.folder) == []

    def test_no_room(self, tmp_path, monkeypatch):
        made = make(tmp_path / "set", "1.0 full")
        before = contents(made.folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(DiskFullError, match="are free"):
            ac.migrate_dataset(made.folder)
        assert contents(made.folder) == before

    def test_without_links_and_without_exchange(self, tmp_path, monkeypatch):
        def no_link(*args, **options):
            raise OSError(errno.EPERM, "no links here")

        made = make(tmp_path / "set", "1.0 full")
        (made.folder / "mine.txt").write_text("keep me")
        monkeypatch.setattr(folder_change.os, "link", no_link)
        monkeypatch.setattr(exchange, "_AT_CWD", {})
        ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
        assert same_values(made) and read_plainly(made.folder, made)
        assert (made.folder / "mine.txt").read_text() == "keep me" and litter(made.folder) == []


_KILLED = """
import os, signal, sys
import actcache as ac
from actcache.share import folder_change
target, function, after = sys.argv[1:]
whole = getattr(folder_change, function) if hasattr(folder_change, function) else None
def end(*args):
    if after == "after":
        whole(*args)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(folder_change, function, end)
ac.migrate_dataset(target, shard_max_bytes=100)
"""


@pytest.mark.parametrize(
    ("function", "after", "old"),
    [
        pytest.param("_link_others", "before", True, marks=pytest.mark.slow),
        pytest.param("change_places", "before", True, marks=pytest.mark.slow),
        ("change_places", "after", False),
    ],
)
def test_a_kill_leaves_the_old_one_or_the_new_one(tmp_path, function, after, old):
    made = make(tmp_path / "set", "1.0 full")
    (made.folder / "mine.txt").write_text("keep me")
    before = contents(made.folder)
    ran = subprocess.run([sys.executable, "-c", _KILLED, str(made.folder), function, after], check=False, timeout=60)
    assert ran.returncode == -9
    assert (contents(made.folder) == before) is old and same_values(made)
    # What a crash did to files that were made already is seen.
    for path in (tmp_path / ".set.migrating").rglob("hidden_layer002_shard004.safetensors"):
        if old:
            path.write_bytes(bytes(path.stat().st_size))
    ac.migrate_dataset(made.folder, shard_max_bytes=SMALL)
    assert same_values(made) and read_plainly(made.folder, made)
    assert (made.folder / "mine.txt").read_text() == "keep me" and litter(made.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("f", ["migrate_dataset", "upgrade_dataset_format"])
def test_a_kill_at_any_time(tmp_path, f):
    """Killed after ever more of what it asks the system for: never anything but the old dataset or the new one."""
    code = (
        "import os, signal, sys, actcache as ac\n"
        "ac.migrate_dataset\n"
        "left = int(sys.argv[2])\n"
        "def watch(event, args):\n"
        "    global left\n"
        "    if event in ('open', 'os.rename', 'os.link', 'os.remove', 'os.rmdir', 'os.mkdir', 'shutil.copyfile'):\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import actcache.share.folder_change, actcache.share.hub_change, pyarrow.parquet, pyarrow.compute, ml_dtypes\n"
        "sys.addaudithook(watch)\n"
        f"ac.{f}(sys.argv[1])\n"
    )
    done, at = False, 1
    while not done:
        made = make(tmp_path / f"{at}" / "set", "1.0 full")
        (made.folder / "mine.txt").write_text("keep me")
        ran = subprocess.run([sys.executable, "-c", code, str(made.folder), str(at)], check=False, timeout=60)
        assert ran.returncode in (0, -9)
        done = ran.returncode == 0
        assert same_values(made) and (made.folder / "mine.txt").read_text() == "keep me", at
        getattr(ac, f)(made.folder)
        assert same_values(made) and (made.folder / "mine.txt").read_text() == "keep me", at
        assert read_plainly(made.folder, made) and litter(made.folder) == [], at
        at += 7


@pytest.mark.parametrize("name", [".README.md.new", "index/.train-00000-of-00001.parquet.new"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    made = make(tmp_path / "set", "1.2 full")
    (made.folder / "README.md").write_text("a card\n")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (made.folder / name).symlink_to(outside)
    ac.upgrade_dataset_format(made.folder)
    assert outside.read_text() == "mine" and not outside.is_symlink()
    assert not (made.folder / "README.md").is_symlink() and not (made.folder / INDEX).is_symlink()
    assert same_values(made)


def test_a_folder_that_is_a_link_is_not_written_into(tmp_path):
    made = make(tmp_path / "set", "1.2 full")
    shutil.move(made.folder / "index", tmp_path / "elsewhere")
    (made.folder / "index").symlink_to(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    with pytest.raises(ac.ActCacheError, match="is a link"):
        ac.upgrade_dataset_format(made.folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == before

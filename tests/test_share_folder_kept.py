"""What a folder that is migrated or upgraded keeps: modes, owners, pipes, links, and where it cannot be changed."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetAccessError, DatasetExistsError, DiskFullError, OptionError
from actcache.share import exchange, folder_change
from made_datasets import INDEX, make
from migrate_helpers import INFO, JOBS, contents, litter
from share_helpers import MODEL, Published, fill_pooled, new_space, new_store


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

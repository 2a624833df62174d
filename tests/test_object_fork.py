"""Object stores in children of a fork, whose parent has connections and threads at work."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import actcache as ac
from servers import S3Server
from store_helpers import in_child, wait_for

DATA = os.urandom(100_000)


def check(backend: ac.CacheBackend, name: str) -> None:
    """Whether it can do everything."""
    backend.put(name, DATA)
    assert backend.read(name, 100, 50_000) == DATA[100:50_000]
    assert name in {o.name for o in backend.list()}
    backend.delete(name)


def test_a_child_goes_on_and_so_does_its_parent(bucket: str) -> None:
    backend = ac.ObjectBackend(f"{bucket}/x", deadline_s=20)
    check(backend, "parent")

    def child() -> None:
        check(backend, "child")
        check(ac.ObjectBackend(f"{bucket}/x"), "new")
        assert wait_for(in_child(lambda: check(backend, "grandchild"))) == 0

    assert wait_for(in_child(child)) == 0
    check(backend, "parent")


def test_a_child_needs_no_nameless_files(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which not every system has."""
    backend = ac.ObjectBackend(bucket)
    check(backend, "parent")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create")
    before = sorted(tmp_path.iterdir())
    assert wait_for(in_child(lambda: check(backend, "child"))) == 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_fork_in_the_middle_of_requests(bucket: str) -> None:
    backend = ac.ObjectBackend(f"{bucket}/x", deadline_s=20)
    backend.put("shared", DATA)
    over = threading.Event()
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            while not over.is_set():
                assert backend.read("shared") == DATA
                check(backend, f"thread-{number}")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(5):
            time.sleep(0.05)
            assert wait_for(in_child(lambda turn=turn: check(backend, f"child-{turn}"))) == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_child_that_ends_in_the_usual_way_takes_nothing_from_its_parent(moto: S3Server, bucket: str) -> None:
    code = f"""
import os, sys
import actcache as ac
backend = ac.ObjectBackend({bucket!r} + "/x", deadline_s=20, timeout_s=2)
backend.put("a", b"0" * 1000)
for used in (False, True, False):
    child = os.fork()
    if not child:
        if used:
            assert len(backend.read("a")) == 1000
        backend = None
        sys.exit(0)  # through the end of the interpreter, which frees what it can
    assert os.waitpid(child, 0)[1] == 0
    assert len(backend.read("a")) == 1000
print("done")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_a_process_ends_with_requests_under_way(bucket: str) -> None:
    code = f"""
import threading
import actcache as ac
backend = ac.ObjectBackend({bucket!r} + "/x")
backend.put("a", b"0" * 1000)
def work():
    while True:
        backend.read("a")
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
import time; time.sleep(0.3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

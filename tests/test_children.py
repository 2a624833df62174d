"""What these tests do with processes that a test leaves behind: tests in a process of its own leave some."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CONFTEST = """
import children


def pytest_configure(config):
    config.pluginmanager.register(children)
"""
LEAVING = """
import os
import signal
import subprocess
import time

import children
import pytest


def note(pid):
    with open("pids", "a") as file:
        file.write(f"{pid} ")


def fork():
    pid = os.fork()
    if pid:
        note(pid)
    return pid


def sleep():
    time.sleep(600)
    os._exit(0)


def served():
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


server = pytest.fixture(served, scope="module")
other = pytest.fixture(served, scope="session")


def test_that_fails(server, other):
    fork() or sleep()
    if not os.fork():
        # Orphans, which nobody here has ever heard of.
        fork() or sleep()
        note(subprocess.Popen(["sleep", "600"]).pid)
        os._exit(0)
    while len(open("pids").read().split()) < 3:
        time.sleep(0.01)
    raise AssertionError


def test_that_comes_next(server, other):
    assert children.children() == {server.pid, other.pid}
    assert server.poll() is None is other.poll()


def test_that_dies():
    fork() or sleep()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def is_alive(pid: int) -> bool:
    try:
        # The state is behind the name, which may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_they_end_with_it_and_hold_no_output(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/conftest.py").write_text(CONFTEST)
    (tmp_path / "tests/test_leaving.py").write_text(LEAVING)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    # The end of the output is waited for, which whoever holds it open puts off.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "tests"],
        cwd=tmp_path, env=clean | {"PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -9
    assert "test_that_fails FAILED" in done.stdout
    assert "test_that_comes_next PASSED" in done.stdout, done.stdout
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4
    until = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]

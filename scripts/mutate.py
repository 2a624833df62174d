#!/usr/bin/env python3
"""Break lines of the package, one at a time, and see whether the tests notice: `make mutations`.

    python scripts/mutate.py [batching|keys|segments ...] [--match TEXT] [--seconds N]

Each line of `scripts/mutations.py` is broken in a copy of the package, and its tests run against that. First they run
against the package as it is, where they have to pass. Prints a line for each; ends with 1 when one survived, when its
tests do not run, or when a line is not there any more. Nothing in the working tree is changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from mutation import Mutation
from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED = 0, 1


def broken(mutation: Mutation, text: str) -> str:
    """`text` of the mutation's file with its line broken; ValueError unless it is there exactly once."""
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times, not once")
    return text.replace(mutation.old, mutation.new)


def copy_of_the_package(folder: Path) -> Path:
    """A copy of ``src`` in `folder`, of links where the file system has them."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(ROOT / "src", folder / "src", copy_function=link, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "src"


def run_tests(sources: Path, tests: tuple[str, ...], seconds: float, log: Path) -> int:
    """pytest's exit status for `tests` with the package in `sources`, in a process of its own; -1 when it was stopped.

    The process is a fork of this one, which has imported what takes long and none of the package.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(ROOT)
            os.environ["PYTHONPATH"] = str(sources)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(log.parent / "hypothesis")
            sys.dont_write_bytecode = True
            sys.path[:] = [str(sources), *(p for p in sys.path if Path(p).resolve() != ROOT / "src")]
            options = ["-x", "-q", "-m", "not slow and not rare", "-p", "no:cacheprovider", "-p", "no:xdist"]
            # transformers has imported some of pytest's plugins.
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            status = int(pytest.main([*options, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return -1
    finally:
        end_group(child)


def end_group(child: int) -> None:
    """End the process `child` and what it has started, as far as any of it is left."""
    try:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def failing(log: Path) -> str:
    """Which test failed first, as pytest says it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return found[0].split(" - ")[0].split("::", 1)[-1] if found else ""


def outcome(mutation: Mutation, folder: Path, seconds: float) -> tuple[bool, str]:
    """Whether the tests notice, and in words."""
    sources = copy_of_the_package(folder)
    file = sources / "actcache" / mutation.file
    try:
        text = broken(mutation, file.read_text(encoding="utf-8"))
    except ValueError as error:
        return False, f"GONE      {error}"
    # The copy may be a link to the file of the working tree.
    file.unlink()
    file.write_text(text, encoding="utf-8")
    log = folder / "log"
    status = run_tests(sources, mutation.tests, seconds, log)
    if status == FAILED:
        return True, f"caught    by {failing(log)}"
    if status == -1:
        return True, f"caught    (no end within {seconds:.0f} seconds)"
    if status == PASSED:
        return False, "SURVIVED  every test passes"
    return False, f"BROKEN    pytest ended with {status}: {log.read_text(errors='replace')[-300:]!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(MUTATIONS)}; all when none is named")
    parser.add_argument("--match", default="", help="only those whose description contains this")
    parser.add_argument("--seconds", type=float, default=120, help="for the tests of one of them (120)")
    parser.add_argument("--list", action="store_true", help="say what would be broken, and where")
    asked = parser.parse_args()
    unknown = set(asked.groups) - set(MUTATIONS)
    if unknown:
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(MUTATIONS)}")
    chosen = [m for group in asked.groups or MUTATIONS for m in MUTATIONS[group] if asked.match in m.what]
    if asked.list:
        for mutation in chosen:
            print(f"{mutation.file:32} {mutation.what}")
        return 0
    # What takes long to import, once; of the package itself each run imports its own.
    import torch  # noqa: F401
    import transformers  # noqa: F401

    assert not any(name.split(".")[0] == "actcache" for name in sys.modules)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mutations") as scratch:
        for tests in sorted({mutation.tests for mutation in chosen}):
            status = run_tests(ROOT / "src", tests, 5 * asked.seconds, Path(scratch) / "log")
            if status != PASSED:
                print(f"{' '.join(tests)} do not pass as it is ({status}):")
                print((Path(scratch) / "log").read_text(errors="replace")[-2000:])
                return 1
        for number, mutation in enumerate(chosen):
            noticed, words = outcome(mutation, Path(scratch) / str(number), asked.seconds)
            bad += not noticed
            print(f"{mutation.file:28} {mutation.what:62} {words}", flush=True)
            shutil.rmtree(Path(scratch) / str(number))
    print(f"{len(chosen) - bad} of {len(chosen)} caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

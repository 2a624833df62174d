"""Bars, and what is written beside them; and what workers say, which is told once."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from actcache.distributed import notes
from actcache.distributed.notes import Note, Notes, listen
from actcache.progress import aside, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What is on the screen: a carriage return goes back, and what is written there replaces what was."""
        shown = []
        for line in self.getvalue().split("\n"):
            held = ""
            for part in line.split("\r"):
                held = part + held[len(part) :]
            shown.append(held.rstrip())
        return shown


@pytest.fixture
def _as_found() -> Iterator[None]:
    """Handlers and levels of the loggers, and what shows warnings."""
    names = (*notes._APART, "actcache")
    before = [
        (logging.getLogger(name), logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in names
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.mark.usefixtures("_as_found")
def test_a_line_beside_a_bar_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logging.getLogger("actcache").addHandler(logging.StreamHandler(terminal))
    with progress(10, "extracting", unit="unit") as bar:
        bar.update(3)
        Notes().tell(1, Note(logging.WARNING, "an odd thing"))
        with aside():
            sys.stderr.write("and another\n")
        assert terminal.lines()[:2] == ["worker 1: an odd thing", "and another"]
        assert "extracting" in terminal.lines()[2] and "3/10" in terminal.lines()[2]
    assert terminal.lines() == ["worker 1: an odd thing", "and another", ""]


def test_without_a_bar_it_is_only_written(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with aside():
        sys.stderr.write("alone\n")
    assert terminal.getvalue() == "alone\n"


@pytest.mark.usefixtures("_as_found")
def test_what_is_logged_and_warned_about_is_handed_on_once() -> None:
    heard: list[Note] = []
    listen(heard.append, logging.INFO)
    for _ in range(3):
        logging.getLogger("actcache.store").info("merged %d", 2)
        logging.getLogger("actcache.store").debug("too much")
        logging.getLogger("transformers.models").warning("old configuration")
        logging.getLogger("other").error("%s and %s", "a", "b")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
    assert heard == [
        Note(logging.INFO, "merged 2"),
        Note(logging.WARNING, "old configuration"),
        Note(logging.ERROR, "a and b"),
        Note(logging.WARNING, "FutureWarning: deprecated"),
    ]


def test_what_several_workers_say_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    told = Notes()
    for worker in (2, 0, 1):
        told.tell(worker, Note(logging.WARNING, "the same"))
        told.tell(worker, Note(logging.WARNING, f"of worker {worker % 2}"))
        told.tell(worker, Note(logging.DEBUG, "what the driver does not show"))
    assert [record.getMessage() for record in caplog.records] == [
        "worker 2: the same", "worker 2: of worker 0", "worker 1: of worker 1",
    ]  # fmt: skip


def test_what_was_said_is_remembered_in_bounded_memory() -> None:
    once = notes.Once()
    for i in range(3 * notes._REMEMBERED):
        assert once.is_new(Note(30, str(i))) and not once.is_new(Note(30, str(i)))
        assert len(once._before) <= notes._REMEMBERED


def test_threads_that_log_and_one_that_answers_share_a_pipe() -> None:
    from multiprocessing import Pipe

    from actcache.distributed.process import _Sender

    ours, theirs = Pipe()
    send = _Sender(theirs)
    texts = [f"{i} " + "x" * 3000 for i in range(40)]
    threads = [threading.Thread(target=lambda: [send(text) for text in texts]) for _ in range(4)]
    for thread in threads:
        thread.start()
    found = [ours.recv() for _ in range(160)]
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(texts * 4)
    ours.close()
    # Nobody listens: that is no error of who logs.
    send("more")

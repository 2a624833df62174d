"""What runs in a worker's process: takes tasks out of a pipe, and ends when nobody holds its other end any more."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


def main(fd: int) -> None:
    # What stops the driver is sent to all processes of a terminal; the driver then ends the others itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(fd, False)
    pipe = Connection(fd)
    send = _Sender(pipe)
    given: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, given), daemon=True).start()

    from actcache.distributed.dispatch import Trouble
    from actcache.distributed.notes import listen
    from actcache.distributed.worker import Worker

    try:
        job = given.get()
        listen(send, job.log_level)
        worker = Worker(job)
    except Exception as error:
        send(Trouble.of(error))
        given.get()
        return
    send(None)
    while True:
        task = given.get()
        try:
            answer: object = worker.run(task)
        except Exception as error:
            answer = Trouble.of(error)
        send(answer)


class _Sender:
    """The way to the driver, for threads that log and the one that answers."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.RLock()

    def __call__(self, what: object) -> None:
        # Where nobody listens any more this process ends; see below.
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send(what)


def _listen(pipe: Connection, given: SimpleQueue[Any]) -> None:
    while True:
        try:
            given.put(pipe.recv())
        except (EOFError, OSError):
            # Also in the middle of a unit: what is not finished is done again by others.
            os._exit(1)
        except Exception as error:
            # What was sent cannot be made here, such as a function of a module that is elsewhere only: nobody would
            # ever answer. The driver is told the last line.
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)

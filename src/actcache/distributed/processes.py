"""Workers that are processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from actcache.distributed.dispatch import Event, Trouble
from actcache.distributed.job import Job
from actcache.distributed.notes import Note, Notes
from actcache.distributed.worker import Answer, Task
from actcache.errors import OptionError

_CHILD = "import sys; from actcache.distributed.process import main; main(int(sys.argv[1]))"
_LAST = 4000


class _Process:
    """One of them. It ends when this end of its pipe is closed, however that comes about."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.pipe, theirs = Pipe()
        self.ready = False
        self.task: Task | None = None
        # Several bars on one terminal would write over each other; and it is told what a worker said last.
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                env=environment,
            )
        self.give(job)

    def give(self, what: Job | Task) -> None:
        try:
            self.pipe.send(what)
        except OSError:
            # It has ended: whoever waits for its answer will hear of that.
            return

    def why(self) -> str:
        """How it ended, when it has."""
        self.pipe.close()
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _LAST))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        self._said.close()
        last = f" ({lines[-1][:300]})" if lines else ""
        if status >= 0:
            return f"ended with status {status}{last}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        hint = ", as the system ends what takes too much memory" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}{last}"

    def close(self) -> None:
        self.pipe.close()
        self._said.close()


class Processes:
    """Workers in processes of their own, `size` of them, each with `threads` threads; see `Crew`.

    `gpus`: of how many GPUs each has the use, less than one where they share one; 0 lets them see none.
    """

    def __init__(self, job: Job, size: int, threads: int, gpus: float) -> None:
        self.size = size
        self._job = job.with_threads(threads)
        self._threads = threads
        self._shares = visible_gpus(size, gpus)
        self._workers: dict[int, _Process] = {}
        self._notes = Notes()

    def start(self) -> None:
        for worker in range(self.size):
            self.replace(worker)

    def idle(self) -> list[int]:
        return [k for k, one in self._workers.items() if one.ready and one.task is None]

    def busy(self) -> bool:
        return any(one.task is not None for one in self._workers.values())

    def give(self, worker: int, task: Task) -> None:
        self._workers[worker].task = task
        self._workers[worker].give(task)

    def wait(self) -> list[Event]:
        by_pipe = {one.pipe: k for k, one in self._workers.items()}
        come = [self._heard(by_pipe[pipe]) for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]
        return [event for event in come if event is not None]

    def _heard(self, worker: int) -> Event | None:
        one = self._workers[worker]
        try:
            said: Answer | Trouble | Note | None = one.pipe.recv()
        except (EOFError, OSError):
            del self._workers[worker]
            return Event(worker, one.task, ended=one.why())
        if isinstance(said, Note):
            self._notes.tell(worker, said)
            return None
        task, one.task = one.task, None
        one.ready = one.ready or said is None
        return Event(worker, task, said)

    def replace(self, worker: int) -> None:
        self._workers[worker] = _Process(self._job, self._environment(worker))

    def _environment(self, worker: int) -> dict[str, str]:
        # Also what a script or a notebook has put there.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        made = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self._threads)}
        if self._threads == 1:
            made["TOKENIZERS_PARALLELISM"] = "false"
        made["CUDA_VISIBLE_DEVICES"] = self._shares[worker]
        return made

    def close(self) -> None:
        workers, self._workers = list(self._workers.values()), {}
        for one in workers:
            one.close()
        for one in workers:
            try:
                one.process.wait(5)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()


def visible_gpus(size: int, gpus: float) -> list[str]:
    """What each of `size` workers is to see (``CUDA_VISIBLE_DEVICES``).

    Raises `OptionError` where there are not so many GPUs.
    """
    if not gpus:
        return [""] * size
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]
    names = names[: torch.cuda.device_count()]
    if gpus > 1 and gpus != int(gpus):
        raise OptionError(f"num_gpus_per_worker is {gpus!r}: expected a share of one, or a whole number of them.")
    fits = int(len(names) / gpus + 1e-9) if gpus >= 1 else len(names) * int(1 / gpus + 1e-9)
    if size > fits:
        raise OptionError(
            f"num_gpus_per_worker={gpus:g}: {size} workers of that need more than the {len(names)} GPUs that are here."
        )
    if gpus >= 1:
        each = int(gpus)
        return [",".join(names[k * each : (k + 1) * each]) for k in range(size)]
    return [names[k % len(names)] for k in range(size)]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_count(value: Any, name: str) -> None:
    """Raises `OptionError` for what is neither None nor a whole number from 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise OptionError(f"{name} is {value!r}: expected a whole number, at least 1.")

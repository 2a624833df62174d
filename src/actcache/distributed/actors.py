"""Workers that are actors of Ray: on this machine, or on a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actcache.distributed.dispatch import Event, Trouble
from actcache.distributed.job import Job
from actcache.distributed.notes import Note, Notes, listen
from actcache.errors import MissingExtraError, OptionError, WorkersError
from actcache.progress import aside
from actcache.store.files import log

if TYPE_CHECKING:
    from actcache.distributed.worker import Answer, Task, Worker

_POLL_S, _PATIENCE_S = 1.0, 10.0
_ADDRESS = re.compile(r"(?:ray://)?([^/:]+):(\d+)")
_OBJECT_STORE_BYTES = 80 << 20
"""Nothing but tasks and what became of them goes through it."""


@dataclass(frozen=True)
class _Said:
    """An answer, and what was logged until then."""

    answer: Answer | Trouble | None
    notes: tuple[Note, ...] = ()


class Actor:
    """What runs where Ray has put it."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._notes: list[Note] = []

    def here(self) -> None:
        """Answers once there was room for it."""

    def begin(self, job: Job) -> _Said:
        from actcache.distributed.worker import Worker

        listen(self._notes.append, job.log_level)
        try:
            self._worker = Worker(job)
        except Exception as error:
            return self._said(Trouble.of(error))
        return self._said(None)

    def run(self, task: Task) -> _Said:
        assert self._worker is not None
        try:
            return self._said(self._worker.run(task))
        except Exception as error:
            return self._said(Trouble.of(error))

    def _said(self, answer: Answer | Trouble | None) -> _Said:
        notes = tuple(self._notes)
        # Another thread may have said something since.
        del self._notes[: len(notes)]
        return _Said(answer, notes)


class _Member:
    """One actor: not there yet, there, ready, at work."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.asked = actor.here.remote()
        self.stage = "starting"
        self.task: Task | None = None


class Actors:
    """`size` actors of one worker each; see `Crew`.

    `size`: None for as many as there is room for. A Ray that runs already is used, and left alone; one that is begun
    here ends with `close`.

    Raises:
        MissingExtraError: Ray is not installed.
        WorkersError: no such cluster; or one begun here that has no room for so many.
    """

    def __init__(
        self, job: Job, address: str | None, size: int | None, cpus: float, gpus: float, start_timeout: float
    ) -> None:
        try:
            import ray
        except ImportError:
            raise MissingExtraError("engine='ray' needs Ray: pip install 'actcache[ray]'") from None
        if gpus > 1 and gpus != int(gpus):
            raise OptionError(f"num_gpus_per_worker is {gpus!r}: expected a share of one, or a whole number of them.")
        self._ray = ray
        self._job = job.with_threads(max(1, int(cpus)))
        self._needs = {"CPU": cpus, "GPU": gpus}
        self._timeout = start_timeout
        self._members: dict[int, _Member] = {}
        self._alone_since = 0.0
        self._warned = False
        self._notes = Notes()
        self._owns = not ray.is_initialized()
        if not self._owns and address is not None:
            _check_same(address, _running())
        address = address or os.environ.get("RAY_ADDRESS")
        own_cluster = self._owns and address is None
        if self._owns:
            self._begin(address or "local")
        try:
            room = self._room(own_cluster)
            if own_cluster and (size or 1) > room:
                many = "1 worker does" if (size or 1) == 1 else f"{size} workers do"
                raise WorkersError(self._no_room(f"{many} not fit on this machine"))
            self.size = size or max(1, room)
            self._class = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Actor)
        except BaseException:
            self.close()
            raise

    def _begin(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        try:
            # Ray itself would ask for minutes.
            if found := _ADDRESS.fullmatch(address):
                socket.create_connection((found[1], int(found[2])), _PATIENCE_S).close()
            with _signals_kept():
                self._ray.init(address=address, **options)
        except (RuntimeError, ValueError, OSError, self._ray.exceptions.RayError) as error:
            where = "on this machine" if address == "local" else f"at address {address!r}"
            raise WorkersError(f"Ray cannot be reached {where}: {error}") from None

    def _room(self, everything: bool) -> int:
        """For how many workers the machines have resources, or have them free now."""
        have = self._ray.cluster_resources() if everything else self._ray.available_resources()
        fits = [int(have.get(name, 0) / need + 1e-9) for name, need in self._needs.items() if need]
        return min(fits, default=1)

    def _no_room(self, what: str) -> str:
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        needs = " and ".join(f"{need:g} {name}" for name, need in self._needs.items() if need) or "nothing"
        has = " and ".join(f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in self._needs)
        return (
            f"{what}: each needs {needs}, and Ray has {has}. Give num_workers, num_cpus_per_worker and "
            "num_gpus_per_worker that fit, or free some."
        )

    def start(self) -> None:
        self._alone_since = time.monotonic()
        for worker in range(self.size):
            self.replace(worker)

    def idle(self) -> list[int]:
        return [k for k, one in self._members.items() if one.stage == "ready" and one.task is None]

    def busy(self) -> bool:
        return any(one.task is not None for one in self._members.values())

    def give(self, worker: int, task: Task) -> None:
        one = self._members[worker]
        one.task, one.asked = task, one.actor.run.remote(task)

    def wait(self) -> list[Event]:
        by_ref = {one.asked: k for k, one in self._members.items() if one.asked is not None}
        come, _ = self._ray.wait(list(by_ref), timeout=_POLL_S)
        events = [event for ref in come if (event := self._heard(by_ref[ref], ref)) is not None]
        if all(one.stage == "starting" for one in self._members.values()):
            self._lose_patience()
        else:
            self._alone_since, self._warned = time.monotonic(), False
        return events

    def _heard(self, worker: int, ref: Any) -> Event | None:
        one = self._members[worker]
        task, one.task, one.asked = one.task, None, None
        try:
            said = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            del self._members[worker]
            self._ray.kill(one.actor)
            return Event(worker, task, ended=f"ended ({_first_line(error)})")
        if one.stage == "starting":
            one.stage, one.asked = "beginning", one.actor.begin.remote(self._job)
            return None
        for note in said.notes:
            self._notes.tell(worker, note)
        if one.stage == "beginning" and said.answer is None:
            one.stage = "ready"
        return Event(worker, task, said.answer)

    def _lose_patience(self) -> None:
        waited = time.monotonic() - self._alone_since
        if waited > self._timeout:
            raise WorkersError(self._no_room(f"no worker could be started in {self._timeout:g} s"))
        if waited > _PATIENCE_S and not self._warned:
            self._warned = True
            with aside():
                log.warning("%s", self._no_room("still waiting for room for a worker"))

    def replace(self, worker: int) -> None:
        self._members[worker] = _Member(self._class.remote())

    def close(self) -> None:
        members, self._members = list(self._members.values()), {}
        for one in members:
            self._ray.kill(one.actor)
        if self._owns:
            self._ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """What this program does of Ctrl-C and SIGTERM stays: Ray would end it with a dump of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _running() -> str:
    """The address of the Ray that this process has begun, or joined."""
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        return f"ray://{client.get_context().client_worker._conn_str}"
    return str(ray.get_runtime_context().gcs_address)


def _check_same(address: str, running: str) -> None:
    """Raises `OptionError` where `address` is another cluster than the one at `running`, which this process uses."""
    if address in ("auto", running):
        return
    asked, there = _ADDRESS.fullmatch(address), _ADDRESS.fullmatch(running)
    if asked is not None and there is not None:
        # At the head of a cluster those who are no part of it have a port of their own.
        same_port = asked[2] == there[2] or address.startswith("ray://") != running.startswith("ray://")
        if same_port and _numbers(asked[1]) & _numbers(there[1]):
            return
    raise OptionError(
        f"address={address!r}: this process uses another Ray already, at {running}. Leave address out to use that one, "
        "or call ray.shutdown() first."
    )


def _numbers(host: str) -> set[str]:
    """What a host is called, and the numbers of that name; this machine has one for others, too."""
    found = {host, *_resolved(host)}
    return found | _resolved(socket.gethostname()) if found & {"127.0.0.1", "::1"} else found


def _resolved(host: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

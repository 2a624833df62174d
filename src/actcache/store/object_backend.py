"""A bucket of S3, Google Cloud Storage or Azure, or a part of one, as the place of a store."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from actcache.config import object_deadline_s
from actcache.errors import BackendError, OptionError, StoreAccessError
from actcache.store.aws import Aws, checked_endpoint
from actcache.store.backend import Bytes, CacheBackend, ObjectInfo, check_name, check_prefix, is_name
from actcache.store.object_bytes import buffer_of, nanoseconds, taken
from actcache.store.object_clients import PART, SLOWEST, Clients, servers
from actcache.store.object_errors import Failure, Meaning, understand
from actcache.store.object_library import library
from actcache.store.object_urls import parse_url
from actcache.wording import count

log = logging.getLogger("actcache.store")

T = TypeVar("T")

_PIECE = 16 << 20
# So much, and no object's end, is mostly rows.
_ROWS = 64 << 10
_ONE_REQUEST = 4 << 30
_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 8.0
# Not the generator of the process, which the caller may have seeded, for every worker alike.
_chance: random.Random = random.SystemRandom()
_PATIENCE_S = 10.0
_ENDLESS_S = 1e8
_GRANTS = {
    "read": "s3:GetObject and s3:ListBucket",
    "list": "s3:ListBucket",
    "put": "s3:PutObject",
    "delete": "s3:DeleteObject",
}
_ELSEWHERE = {
    "gs": "Choose credentials with GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT.",
    "az": "Choose credentials with AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_KEY.",
}

_living: weakref.WeakSet[ObjectBackend] = weakref.WeakSet()


class ObjectBackend(CacheBackend):
    """A bucket, or what lies in it below a prefix: ``s3://bucket/prefix``, ``gs://...``, ``az://container/...``.

    Needs the extra ``actcache[s3]``. Requests that fail for a reason that passes (throttling, errors of the server,
    broken connections, stalls, answers cut short) are made again, with pauses that grow. Threads share a backend, and
    forked children go on using it.
    """

    def __init__(
        self,
        url: str,
        *,
        anonymous: bool | None = None,
        endpoint: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        deadline_s: float | None = None,
        timeout_s: float = 15.0,
    ) -> None:
        """What is not given is found where AWS's own tools look (``s3://``), or in obstore's variables.

        `anonymous`: True: requests are not signed, for what everybody may read. None: not signed where no credentials
        are found. False: not without credentials. `endpoint`: the URL of a server that is not AWS's. `profile`: of
        AWS's files. `deadline_s`: how many seconds an operation may go on failing (default: ``ACTCACHE_DEADLINE_S``,
        or 120), beside the time that its bytes take. `timeout_s`: after how many seconds without an answer a request is
        made again.

        Raises:
            OptionError: no such URL, or options that do not fit it.
            MissingExtraError: the extra is not installed.
        """
        self._scheme, self._bucket, self._prefix = parse_url(url)
        given = {"endpoint": endpoint, "region": region, "profile": profile}
        if self._scheme != "s3" and (unfit := [name for name, value in given.items() if value is not None]):
            raise OptionError(f"{unfit[0]}= is for s3:// alone, not for {self.url}.")
        for name, value in (("deadline_s", deadline_s), ("timeout_s", timeout_s)):
            if value is not None and not (isinstance(value, int | float) and 0 < value < _ENDLESS_S):
                raise OptionError(f"{name} is {value!r}: expected a number of seconds above 0.")
        checked_endpoint(endpoint)
        library()
        self.deadline_s: float = object_deadline_s() if deadline_s is None else deadline_s
        self.timeout_s = min(timeout_s, self.deadline_s)
        self._anonymous = anonymous
        self._given = given
        self._aws: Aws | None = None
        self._clients: Clients | None = None
        self._lock = threading.Lock()
        self._warned = 0.0
        _living.add(self)

    def __repr__(self) -> str:
        return f"ObjectBackend({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        options = {**self._given, "anonymous": self._anonymous}
        return _again, (self.url, {**options, "deadline_s": self.deadline_s, "timeout_s": self.timeout_s})

    @property
    def url(self) -> str:
        return f"{self._scheme}://" + "/".join(filter(None, (self._bucket, self._prefix)))

    @property
    def identity(self) -> str:
        aws = self._place()
        at = servers(self._scheme) if aws is None else [aws.endpoint] if aws.endpoint else []
        return " at ".join([self.url, *at])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        top = self._prefix + "/" if self._prefix else ""
        below = (top + prefix).rstrip("/") or None
        ordered = self._scheme == "s3"
        # By name: a key with "/" at its end loses it here, and what lies before it may come twice.
        seen: dict[str, ObjectInfo] = {}
        last: str | None = None

        def go_on(_: int) -> bool:
            nonlocal last
            clients = self._ready()
            # S3 lists in the order of the names, and from any on: what came before an error need not come again.
            if not ordered:
                last = None
                seen.clear()
            got = len(seen)
            try:
                for page in clients.library.list(clients.reading(), below, offset=last, chunk_size=1000):
                    for item in page:
                        last = item["path"]
                        name = last.removeprefix(top)
                        if last.startswith(top) and name.startswith(prefix) and is_name(name):
                            seen[name] = ObjectInfo(name, item["size"], nanoseconds(item["last_modified"]))
            except Exception as error:
                if ordered and len(seen) > got:
                    raise _ProgressError(understand(error)) from None
                raise
            return True

        self._persist("list", prefix or "objects", go_on)
        return iter(seen.values())

    def _first_keys(self) -> Sequence[str]:
        """Objects of the whole bucket, whatever the prefix, as one request tells them: a thousand at most, and none
        where it is refused or fails."""
        try:
            clients = self._ready()
            page = next(iter(clients.library.list(clients.reading(), None, chunk_size=1000)), ())
            return [item["path"] for item in page]
        except Exception as error:
            understand(error)
            return []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        key = self._key(name)
        # Whoever reads much from the middle of an object knows where it ends.
        if start > 0 and stop is not None and _ROWS <= stop - start <= _PIECE:
            rows = self._read_rows(key, name, start, stop)
            if rows is not None:
                return rows
        end = start + 1 if stop is not None and stop <= start else stop
        first, size = self._read_piece(key, name, start, end)
        if stop is not None and stop <= start:
            return b""
        end = size if stop is None else min(stop, size)
        if start + len(first) >= end:
            return first
        whole = bytearray(end - start)
        whole[: len(first)] = first
        at = start + len(first)
        while at < end:
            piece, _ = self._read_piece(key, name, at, end)
            if not len(piece):
                raise BackendError(f"{self.url}: {name} has become shorter while it was read, which no object does.")
            whole[at - start : at - start + len(piece)] = piece
            at += len(piece)
        return whole

    def _read_rows(self, key: str, name: str, start: int, stop: int) -> Bytes | None:
        """The bytes from `start` to `stop`; None where there are fewer, or no such answer: look closer.

        In one call: behind a call that ends when an answer begins, the next one would wait for the interpreter.
        """

        def get(_: int) -> Bytes | None:
            clients = self._ready()
            try:
                data = memoryview(clients.library.get_range(clients.reading(), key, start=start, end=stop))
            except Exception as error:
                if understand(error).meaning in (Meaning.PAST_END, Meaning.WHOLE):
                    return None
                raise
            return data if len(data) == stop - start else None

        return self._persist("read", name, get)

    def _read_piece(self, key: str, name: str, start: int, stop: int | None) -> tuple[Bytes, int]:
        """The bytes from `start` on, at most a piece of them, and the size of the object (0: it ends before)."""
        end = start + _PIECE if stop is None else min(stop, start + _PIECE)

        def get(_: int) -> tuple[Bytes, int]:
            clients = self._ready()
            try:
                return taken(clients.library.get(clients.reading(), key, options={"range": (start, end)}))
            except Exception as error:
                meaning = understand(error).meaning
                if meaning is Meaning.PAST_END:
                    return b"", 0
                if meaning is not Meaning.WHOLE:
                    raise
            # Of an empty object a server may answer with all there is.
            whole = clients.library.get(clients.reading(), key)
            if whole.meta["size"]:
                raise BackendError(
                    f"{self.url}: the server answers with whole objects where it is asked for a range, so that it "
                    "cannot be used."
                )
            return b"", 0

        return self._persist("read", name, get)

    def put(self, name: str, source: Bytes | Path) -> None:
        key = self._key(name)
        data = buffer_of(source)
        size = data.nbytes

        def send(slower: int) -> None:
            clients = self._ready()
            if size <= _ONE_REQUEST:
                clients.library.put(clients.writing(size, slower), key, data, use_multipart=False)
                return
            # Parts of an upload that is killed stay behind, unseen and paid for: only where there is no other way.
            parts = (data[at : at + PART] for at in range(0, size, PART))
            client = clients.writing_parts(self.deadline_s)
            clients.library.put(client, key, parts, use_multipart=True, chunk_size=PART, max_concurrency=4)

        self._persist("put", name, send, size)

    def delete(self, name: str) -> None:
        key = self._key(name)

        def remove(_: int) -> None:
            clients = self._ready()
            clients.library.delete(clients.reading(), key)

        with contextlib.suppress(FileNotFoundError):
            self._persist("delete", name, remove)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{check_name(name)}" if self._prefix else check_name(name)

    def _place(self) -> Aws | None:
        """Where the bucket is and what opens it; None: obstore finds that by itself."""
        if self._aws is None and self._scheme == "s3":
            self._aws = Aws(self._bucket, anonymous=self._anonymous, **self._given)
        return self._aws

    def _ready(self) -> Clients:
        """This process's clients, with credentials that are valid now."""
        clients = self._clients
        if clients is None:
            with self._lock:
                clients = self._clients
                if clients is None:
                    longest = self.deadline_s + _PIECE / SLOWEST
                    made = Clients(self._scheme, self._bucket, self._place(), self._anonymous, self.timeout_s, longest)
                    made.refresh()
                    made.reading()
                    clients = self._clients = made
        clients.refresh()
        return clients

    def _persist(self, verb: str, name: str, once: Callable[[int], T], size: int = 0) -> T:
        """What `once` gives, tried until it works, the deadline is over, or trying again would not help.

        `once` is given how often a try took too long. `size`: how many bytes it sends.
        """
        began = time.monotonic()
        end = began + self.deadline_s
        tries = slower = failed = 0
        while True:
            tries += 1
            region = self._region()
            try:
                return once(slower)
            except Exception as error:
                progress = isinstance(error, _ProgressError)
                failure = error.failure if isinstance(error, _ProgressError) else understand(error)
            failed = 1 if progress else failed + 1
            if progress:
                end = time.monotonic() + self.deadline_s
            slower += failure.timed_out
            if failure.meaning is Meaning.REGION and self._moved(region):
                continue
            if failure.meaning is not Meaning.PASSING:
                self._refuse(verb, name, failure)
            # Full jitter: many who were turned away at once do not come back at once.
            pause = _chance.uniform(0, min(_LONGEST_PAUSE_S, _PAUSE_S * 2**failed))
            now = time.monotonic()
            if now + pause >= end + (size / SLOWEST if failure.timed_out else 0):
                raise BackendError(
                    f"cannot {verb} {name} in {self.url}: tried {count(tries, 'time')} in {now - began:.1f} s, the "
                    f"last time: {self._shown(failure)}. See whether the server can be reached{self._at()}; "
                    "deadline_s= or ACTCACHE_DEADLINE_S changes how long is tried."
                )
            self._tell(verb, name, failure, tries, now - began)
            time.sleep(pause)

    def _region(self) -> str | None:
        return None if self._clients is None or self._clients.aws is None else self._clients.aws.region

    def _moved(self, before: str | None) -> bool:
        """Whether the bucket turned out not to be in the region `before`; from now on it is asked where it is."""
        clients = self._ready()
        with self._lock:
            if clients.aws is None:
                return False
            if clients.aws.region == before and clients.aws.other_region():
                clients.renew()
            return clients.aws.region != before

    def _refuse(self, verb: str, name: str, failure: Failure) -> NoReturn:
        reason = self._shown(failure)
        aws = self._place()
        if failure.meaning is Meaning.ABSENT and verb not in ("list", "put"):
            raise FileNotFoundError(f"{self.url} has no object {name}")
        if failure.meaning in (Meaning.NO_BUCKET, Meaning.ABSENT):
            raise BackendError(
                f"cannot {verb} {name} in {self.url}: there is no bucket {self._bucket!r}{self._at()} ({reason}). "
                "Create it, or correct the URL, the endpoint or the region."
            )
        if failure.meaning is Meaning.DENIED:
            grant = f" Choose others with AWS_PROFILE, or have {_GRANTS[verb]} granted." if aws is not None else ""
            whose = f"{aws.signs}{grant}" if aws is not None else _ELSEWHERE[self._scheme]
            raise StoreAccessError(f"may not {verb} {name} in {self.url}{self._at()}: {reason}. {whose}")
        if failure.meaning is Meaning.REGION and aws is not None:
            reason = f"{reason}; requests were signed for {aws.region}. Set AWS_REGION to the region of the bucket"
        # Not every server says that it wants a signature: OpenStack Swift answers 412.
        unsigned = f" {aws.signs}" if aws is not None and not aws.is_signing else ""
        raise BackendError(f"cannot {verb} {name} in {self.url}: {reason}.{unsigned}")

    def _at(self) -> str:
        aws = self._place()
        return f" at {aws.endpoint}" if aws is not None and aws.endpoint else ""

    def _shown(self, failure: Failure) -> str:
        aws, reason = self._place(), failure.reason
        for secret in aws.secrets() if aws is not None else ():
            reason = reason.replace(secret, "***")
        return reason.rstrip(".")

    def _tell(self, verb: str, name: str, failure: Failure, tries: int, spent: float) -> None:
        level = logging.DEBUG
        if spent > _PATIENCE_S and time.monotonic() - self._warned > 2 * _PATIENCE_S:
            level, self._warned = logging.WARNING, time.monotonic()
        if log.isEnabledFor(level):
            log.log(
                level, "%s: %s %s failed %s in %.1f s (%s): trying on for up to %g s",
                self.url, verb, name, count(tries, "time"), spent, self._shown(failure), self.deadline_s,
            )  # fmt: skip

    def _in_child(self) -> None:
        if self._clients is not None:
            self._clients.abandon()
        self._aws = self._clients = None
        self._lock = threading.Lock()


class _ProgressError(Exception):
    """A try that failed, but took what there is to do further."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def _again(url: str, options: dict[str, Any]) -> ObjectBackend:
    return ObjectBackend(url, **options)


def _children() -> None:
    for backend in list(_living):
        backend._in_child()


os.register_at_fork(after_in_child=_children)

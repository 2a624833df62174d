"""Datasets on the Hub: exact ranges of their files, through the session of the Hub's own client."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actcache._version import __version__
from actcache.errors import DatasetAccessError, DatasetFormatError, DatasetNotFoundError, OptionError
from actcache.share.folder import FileStream
from actcache.share.hub_errors import check_token, endpoint
from actcache.share.location import check_repo_id
from actcache.share.source import NoFileError, Source, Stream

log = logging.getLogger("actcache.share")

_TRANSIENT = {408, 429, 500, 502, 503, 504}
_ATTEMPTS = 6
_LONGEST_WAIT_S = 120.0
_CHUNK = 1 << 18


class Repository(Source):
    """A dataset repository of the Hub, at one commit: what its `revision` meant when its first file was opened.

    Files of that commit that the Hub client has in its cache are read there; nothing is written to it.
    """

    gap = 1 << 18
    concurrency = 8

    def __init__(self, name: str, *, token: str | bool | None = None, revision: str | None = None) -> None:
        super().__init__()
        self.name = check_repo_id(name)
        check_token(token)
        if revision is not None and not (isinstance(revision, str) and revision):
            raise OptionError(f"revision is {revision!r:.60}: expected a branch, a tag or a commit.")
        self.revision = revision
        self._token = token
        self._headers: dict[str, str] | None = None

    def __repr__(self) -> str:
        return f"Repository({self.name!r}, revision={self.commit or self.revision!r})"

    def open(self, path: str, start: int = 0, stop: int | None = None) -> Stream:
        cached = self._cached(path)
        if cached is not None:
            return FileStream(cached, f"{path} of {self.name}", start, stop)
        return _Download(self, path, start, stop)

    def headers(self) -> dict[str, str]:
        """What every request says."""
        if self._headers is None:
            from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

            try:
                made = build_hf_headers(token=self._token, library_name="actcache", library_version=__version__)
            except (ValueError, OSError):
                raise OptionError(
                    "token=True needs a token that `hf auth login` has stored, or HF_TOKEN: there is none."
                ) from None
            # Compressed, a range would be one of other bytes, and could become any number of them.
            self._headers = {**made, "Accept-Encoding": "identity"}
        return self._headers

    def url(self, path: str) -> str:
        """Where the Hub has a file."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, path, repo_type="dataset", revision=self.commit or self.revision)

    def _cached(self, path: str) -> int | None:
        """The file in the client's cache, opened; None where it is not there, or may be of another commit."""
        from huggingface_hub import constants, try_to_load_from_cache

        if self.commit is None and not constants.HF_HUB_OFFLINE:
            return None
        found = try_to_load_from_cache(self.name, path, revision=self.commit or self.revision, repo_type="dataset")
        if not isinstance(found, str):
            return None
        try:
            fd = os.open(found, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        if self.commit is None:
            parts = Path(found).parts
            self.commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
        return fd


class _Download(Stream):
    """A range of a file of a repository. What the network cuts short goes on where it ended."""

    def __init__(self, repository: Repository, path: str, start: int, stop: int | None) -> None:
        self.size = -1
        self._repository = repository
        self._path = path
        self._at = start
        self._stop = stop
        self._response: Any = None
        self._chunks: Iterator[bytes] = iter(())
        self._left = memoryview(b"")
        self._failures = 0
        self._connect()

    def readinto(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            if not len(self._left):
                self._left = memoryview(self._next())
            part = self._left[: len(view) - done]
            view[done : done + len(part)] = part
            self._left = self._left[len(part) :]
            done += len(part)

    def close(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def _next(self) -> bytes:
        """The next bytes that come, at least one."""
        end = self.size if self._stop is None else min(self._stop, self.size)
        while self._at < end:
            try:
                chunk = next(self._chunks, b"")
            except _transport_errors() as error:
                self._failed(type(error).__name__)
                chunk = b""
            if chunk:
                # A place that knows no ranges sends the whole file.
                chunk = chunk[: end - self._at]
                self._at += len(chunk)
                self._failures = 0
                return chunk
            if self._response is not None:
                self._failed("the answer ended early")
            self._connect()
        raise DatasetFormatError(
            f"{self._path} of {self._repository.name} ends at byte {end:,}, before what it should hold."
        )

    def _connect(self) -> None:
        while True:
            self.close()
            url, headers = self._repository.url(self._path), self._headers()
            try:
                response = _get(url, headers)
            except _transport_errors() as error:
                self._failed(type(error).__name__)
                continue
            except Exception as error:
                raise self._unreachable(error) from None
            if response.status_code in _TRANSIENT:
                wait = response.headers.get("Retry-After", "")
                response.close()
                self._failed(f"status {response.status_code}", float(wait) if wait.isdigit() else None)
                continue
            try:
                self._accept(response)
            except BaseException:
                response.close()
                raise
            return

    def _headers(self) -> dict[str, str]:
        last = "" if self._stop is None else self._stop - 1
        return {**self._repository.headers(), "Range": f"bytes={self._at}-{last}"}

    def _accept(self, response: Any) -> None:
        repository, where = self._repository, f"{self._path} of {self._repository.name}"
        if response.status_code >= 400:
            raise self._refusal(response)
        if repository.commit is None:
            answers = [*response.history, response]
            commits = [found for answer in answers if (found := answer.headers.get("X-Repo-Commit"))]
            repository.commit = commits[0] if commits else None
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DatasetAccessError(f"{where}: the Hub answered with compressed bytes, which were not asked for.")
        first, total = _range(response)
        if first != self._at or total is None or self.size not in (-1, total):
            raise DatasetAccessError(f"{where}: the Hub answered with other bytes than were asked for.")
        self.size = total
        self._response = response
        self._chunks = response.iter_raw() if hasattr(response, "iter_raw") else response.iter_content(_CHUNK)

    def _refusal(self, response: Any) -> Exception:
        """The error for an answer that is none; of what the Hub says only codes are repeated."""
        name, code = self._repository.name, response.headers.get("X-Error-Code")
        if response.status_code == 416:
            return DatasetFormatError(f"{self._path} of {name} ends before byte {self._at:,}.")
        if code == "EntryNotFound":
            return NoFileError(f"{name} has no file {self._path}.")
        if code == "RevisionNotFound":
            wanted = self._repository.revision
            if wanted is None:
                return DatasetNotFoundError(f"dataset {name!r} is empty on the Hub: nothing was ever pushed to it.")
            return DatasetNotFoundError(
                f"dataset {name!r} has no revision {wanted!r} on the Hub: expected a branch, a tag or a commit of it."
            )
        if code == "GatedRepo":
            return DatasetNotFoundError(
                f"dataset {name!r} is gated on the Hub: accept its conditions there, and pass token= of that account."
            )
        if any("X-Repo-Commit" in answer.headers for answer in response.history):
            # The Hub has said which commit it is, and sent on to where it keeps the bytes.
            return DatasetAccessError(
                f"{self._path} of {name} is in the repository, and where the Hub keeps its bytes the answer was status "
                f"{response.status_code}: ask again later; where they are lost, whoever pushed it can push it again."
            )
        if response.status_code in (401, 403, 404):
            return DatasetNotFoundError(
                f"dataset {name!r} is not to be had from the Hub: there is no such dataset repository, or it is "
                "private: check the name, and what token= may read. A folder is written ./folder."
            )
        return DatasetAccessError(f"dataset {name!r}: the Hub answered {self._path} with {response.status_code}.")

    def _unreachable(self, error: Exception) -> Exception:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return DatasetAccessError(
                f"{self._path} of {self._repository.name} is not in the Hub client's cache, and HF_HUB_OFFLINE is set."
            )
        return DatasetAccessError(
            f"the Hub at {endpoint()} cannot be reached for {self._repository.name}: {type(error).__name__}."
        )

    def _failed(self, reason: str, wait: float | None = None) -> None:
        """Wait before the next attempt; `DatasetAccessError` when there were too many in a row."""
        self.close()
        self._failures += 1
        what = f"{self._path} of {self._repository.name}"
        if self._failures == _ATTEMPTS:
            raise DatasetAccessError(
                f"{what} cannot be read from the Hub at {endpoint()}: {reason}, {_ATTEMPTS} times in a row."
            )
        wait = 0.25 * 2**self._failures if wait is None else min(wait, _LONGEST_WAIT_S)
        log.info("%s: %s, again in %.1f s", what, reason, wait)
        if self._repository.stop.wait(wait):
            raise DatasetAccessError(f"{what}: reading was stopped.")


def _get(url: str, headers: dict[str, str]) -> Any:
    """The answer to a request, its body not read: a response of httpx, or of requests with older clients."""
    from huggingface_hub import constants, get_session

    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if hasattr(session, "build_request"):
        return session.send(session.build_request("GET", url, headers=headers, timeout=timeout), stream=True)
    return session.get(url, headers=headers, timeout=timeout, stream=True)


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a connection that fails raises, in whichever library the client uses."""
    from huggingface_hub import get_session

    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    names = ("TransportError",) if hasattr(library, "TransportError") else ("ConnectionError", "Timeout")
    more = () if hasattr(library, "TransportError") else (library.exceptions.ChunkedEncodingError,)
    return (*(getattr(library, name) for name in names), *more)


def _range(response: Any) -> tuple[int, int | None]:
    """The first byte that an answer holds, and the size of the whole file."""
    told = response.headers.get("Content-Range")
    if response.status_code != 206 or told is None:
        size = response.headers.get("Content-Length", "")
        return 0, int(size) if size.isdigit() else None
    span, _, total = told.removeprefix("bytes ").partition("/")
    first = span.partition("-")[0]
    return (int(first) if first.isdigit() else -1), (int(total) if total.isdigit() else None)

"""A small Hub on the loopback interface: repositories of models with commits, branches, tags and tokens.

It answers what the unmodified `huggingface_hub` asks when it downloads, so that tests can drive the real client without
a network. The client reads its address once, at import: run it in a process of its own, with `LoopbackHub.environment`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Repository:
    """One repository: every commit with all its files, and what branches and tags point at.

    `private`: only who has a token of the Hub sees it. `gated`: who sees it may not download.
    """

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files | Path, branch: str = "main") -> str:
        """A new commit on `branch` with exactly these files (or those of a folder); returns its id."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        history = json.dumps([self.name, len(self.commits), sorted((n, etag(b)) for n, b in files.items())])
        commit = hashlib.sha1(history.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit

    def tag(self, name: str, commit: str) -> None:
        """Name a commit."""
        self.refs[name] = commit

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit id means; None when there is none."""
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """A request the Hub was sent."""

    method: str
    path: str
    token: str | None


class LoopbackHub:
    """The server; a context manager. `requests` logs what it was asked, `tokens` are those it knows.

    A route it does not know is answered with 501: a client that begins to use another one shows at once.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.requests: list[Request] = []
        hub = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.answer(hub)

            def do_HEAD(self) -> None:
                self.answer(hub)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables for a process whose client talks to this Hub alone and keeps its files in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def create(self, name: str, *, private: bool = False, gated: bool = False) -> Repository:
        """A new, empty repository ``org/name``."""
        self.repositories[name] = Repository(name, private, gated)
        return self.repositories[name]

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Refusal(Exception):
    """An answer other than the one asked for: status, and the code by which the client tells its reason."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, hub: LoopbackHub) -> None:
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        hub.requests.append(Request(self.command, self.path, token))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        try:
            if token is not None and token not in hub.tokens:
                raise _Refusal(401, "InvalidToken", "Invalid credentials in Authorization header")
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                self._describe(_repository(hub, "/".join(parts[2:4]), token), parts[4:])
            elif len(parts) >= 5 and parts[2] == "resolve":
                self._file(_repository(hub, "/".join(parts[:2]), token), parts[3], "/".join(parts[4:]), token)
            else:
                raise _Refusal(501, "NotImplemented", f"no such route: {self.command} {self.path}")
        except _Refusal as refusal:
            self._refuse(refusal)

    def _describe(self, repository: Repository, rest: list[str]) -> None:
        """The API: a repository, one of its revisions, the files in it, its branches and tags."""
        if rest == ["refs"]:
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.refs.items()]
            self._json({"branches": refs, "converts": [], "tags": [], "pullRequests": []})
        elif not rest or (rest[0] == "revision" and len(rest) == 2):
            commit = _commit(repository, rest[1] if rest else "main")
            self._json(
                {
                    "_id": commit[:24],
                    "id": repository.name,
                    "modelId": repository.name,
                    "author": repository.name.split("/")[0],
                    "sha": commit,
                    "private": repository.private,
                    "gated": "manual" if repository.gated else False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in repository.commits[commit]],
                }
            )
        elif rest[0] == "tree" and len(rest) >= 2:
            files = repository.commits[_commit(repository, rest[1])]
            folder = "".join(f"{part}/" for part in rest[2:])
            inside = {name: data for name, data in files.items() if name.startswith(folder)}
            if folder and not inside:
                raise _Refusal(404, "EntryNotFound", f"no folder {folder}")
            self._json(
                [{"type": "file", "path": n, "oid": etag(data), "size": len(data)} for n, data in inside.items()]
            )
        else:
            raise _Refusal(501, "NotImplemented", f"no such route: {self.command} {self.path}")

    def _file(self, repository: Repository, revision: str, name: str, token: str | None) -> None:
        commit = _commit(repository, revision)
        if repository.gated:
            raise _Refusal(403 if token else 401, "GatedRepo", f"access to {repository.name} is restricted")
        data = repository.commits[commit].get(name)
        if data is None:
            raise _Refusal(404, "EntryNotFound", f"no file {name}")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(data)}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(200, data, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data)), len(data) - 1)
        self._send(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, refusal: _Refusal) -> None:
        headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal), "Content-Type": "application/json"}
        self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `LoopbackHub.requests`."""


def etag(data: bytes) -> str:
    """The name git gives these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _repository(hub: LoopbackHub, name: str, token: str | None) -> Repository:
    repository = hub.repositories.get(name)
    if repository is None or (repository.private and token is None):
        # As the Hub does: what somebody may not see looks like what is not there.
        raise _Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
    return repository


def _commit(repository: Repository, revision: str) -> str:
    commit = repository.resolve(revision)
    if commit is None:
        raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit

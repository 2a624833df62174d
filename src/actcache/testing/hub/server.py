"""The two servers of a Hub, and what a test sets up and looks at."""

from __future__ import annotations

import shutil
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from actcache.testing.hub.api import Api
from actcache.testing.hub.exchange import Exchange, Fault, Request
from actcache.testing.hub.repositories import Blobs, Repository, repository_name
from actcache.testing.hub.storage import Signatures, Storage


class LoopbackHub:
    """The servers; a context manager.

    Files are kept below `root`, and nowhere else (default: a temporary folder that goes when the block ends).

    Attributes:
        repositories: by name, those of datasets with ``datasets/`` in front, as in the Hub's addresses.
        tokens: tokens that may read and write. `read_tokens`: those that may only read.
        requests: what it was asked, in order.
        faults: what goes wrong, see `inject`.
        page: entries on one page of a listing.
        multipart_bytes: larger files are uploaded in parts of this size; None: never.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._temporary = Path(tempfile.mkdtemp(prefix="actcache-hub-")) if root is None else None
        folder = root if root is not None else self._temporary
        assert folder is not None
        self.blobs = Blobs(folder / "blobs")
        self.parts = Blobs(folder / "parts")
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.read_tokens: set[str] = set()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.page = 1000
        self.multipart_bytes: int | None = None
        self.lock = threading.Lock()
        self.signatures = Signatures()
        self._servers = [self._server(kind) for kind in (Api, Storage)]
        self._threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in self._servers]

    def _server(self, kind: type[Exchange]) -> ThreadingHTTPServer:
        handler = type("Handler", (kind,), {"hub": self})
        server = _Server(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        return server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where large files are: another origin, as on the Hub, so that a client sends no token there."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

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

    def create(self, name: str, *, kind: str = "model", private: bool = False, gated: bool = False) -> Repository:
        """A new repository ``org/name``, or ``datasets/org/name`` (a `kind` of ``"dataset"``).

        As a new one of the Hub it has one commit, with nothing but a ``.gitattributes``.
        """
        key = _key(name, kind)
        kind = "dataset" if key.startswith("datasets/") else "model"
        plain = repository_name(key.removeprefix("datasets/"))
        made = Repository(plain, self.blobs, kind, private, gated)
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        self.repositories[key] = made
        return made

    def repository(self, name: str, *, kind: str = "model", missing_ok: bool = False) -> Repository | None:
        """The repository of this name and kind."""
        found = self.repositories.get(_key(name, kind))
        if found is None and not missing_ok:
            raise KeyError(name)
        return found

    def dataset(self, name: str) -> Repository:
        """The dataset ``org/name``."""
        return self.repositories[_key(name, "dataset")]

    def inject(self, fault: Fault) -> Fault:
        """Let something go wrong from now on. The first fault that strikes a request is the only one it meets."""
        self.faults.append(fault)
        return fault

    def received(self, since: int = 0, *, origin: str | None = None) -> int:
        """Bytes of the bodies of all requests from number `since` on."""
        return sum(r.received for r in list(self.requests)[since:] if origin in (None, r.origin))

    def sent(self, since: int = 0, *, origin: str | None = None) -> int:
        """Bytes of the bodies of all answers from request number `since` on."""
        return sum(r.sent for r in list(self.requests)[since:] if origin in (None, r.origin))

    def __enter__(self) -> LoopbackHub:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        import sys

        # A client that was killed in the middle of a request is what tests do.
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _key(name: str, kind: str) -> str:
    return f"datasets/{name}" if kind == "dataset" and not name.startswith("datasets/") else name

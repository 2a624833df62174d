"""The second origin: large files, by signed addresses."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actcache.testing.hub.exchange import Exchange, Refusal
from actcache.testing.hub.repositories import CHUNK, Blobs


class Signatures:
    """Addresses of the storage that nobody can make up."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def sign(self, what: str) -> str:
        return hmac.new(self._secret, what.encode(), hashlib.sha256).hexdigest()

    def check(self, what: str, signature: str) -> None:
        if not hmac.compare_digest(self.sign(what), signature):
            raise Refusal(403, "SignatureDoesNotMatch", "the address is not signed")


class Storage(Exchange):
    """``GET``, ``HEAD`` and ``PUT`` of ``/blobs/<sha256>``; ``PUT`` of ``/parts/<sha256>/<number>``."""

    origin = "storage"

    def route(self) -> None:
        if self.token is not None:
            # As S3 does with a signed address and a header: the token was never meant for this place.
            raise Refusal(400, "InvalidArgument", "only one auth mechanism allowed")
        hub, parts, method = self.hub, self.parts, self.command
        hub.signatures.check(f"{method if method == 'PUT' else 'GET'} {'/'.join(parts)}", self.query.get("sign", ""))
        if len(parts) == 2 and parts[0] == "blobs":
            if method == "PUT":
                hub.blobs.receive(self.body(), parts[1])
                self.answer_json({})
                return
            if method in ("GET", "HEAD"):
                if not hub.blobs.has(parts[1]):
                    raise Refusal(404, "NoSuchKey", f"no bytes {parts[1]}")
                self.answer_file(hub.blobs.path(parts[1]), {"ETag": f'"{parts[1]}"', "Accept-Ranges": "bytes"})
                return
        if len(parts) == 3 and parts[0] == "parts" and method == "PUT" and parts[2].isdigit():
            self.answer_json({}, headers={"ETag": f'"{hub.parts.receive(self.body())}"'})
            return
        raise Refusal(501, "NotImplemented", f"no such route: {method} {self.path}")


def upload_actions(hub: Any, sha256: str, size: int) -> dict[str, Any]:
    """How a client is to send these bytes: in one request, or in parts when they are many."""
    verify = {"href": f"{hub.url}/lfs/verify"}
    if hub.multipart_bytes is None or size <= hub.multipart_bytes:
        return {"upload": {"href": signed(hub, "PUT", f"blobs/{sha256}")}, "verify": verify}
    count = -(-size // hub.multipart_bytes)
    urls = {f"{n:05d}": signed(hub, "PUT", f"parts/{sha256}/{n}") for n in range(1, count + 1)}
    header = {"chunk_size": str(hub.multipart_bytes), **urls}
    return {"upload": {"href": f"{hub.url}/lfs/complete", "header": header}, "verify": verify}


def signed(hub: Any, method: str, path: str) -> str:
    """An address of the storage that is good for this method."""
    return f"{hub.storage_url}/{path}?sign={hub.signatures.sign(f'{method} {path}')}"


def join_parts(blobs: Blobs, parts: Blobs, sha256: str, names: list[str]) -> None:
    """The bytes of an upload in parts, joined and checked."""
    paths = [parts.path(name) for name in names]
    if not all(path.exists() for path in paths):
        raise Refusal(400, "InvalidPart", "a part was never sent")
    blobs.receive(_joined(paths), sha256)


def _joined(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece

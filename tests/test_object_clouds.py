"""Google Cloud Storage and Azure, as far as a dictionary behind their dialects can stand for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import actcache as ac
from actcache.errors import BackendError, StoreAccessError
from actcache.testing import CacheBackendTests
from bucket_helpers import Pauses
from scripted_server import Answer, Asked, ScriptedServer, ranged, refusal

NOW = datetime.now(UTC)
TIME = NOW.strftime("%a, %d %b %Y %H:%M:%S GMT")
STAMP = {"Last-Modified": TIME, "ETag": '"0"'}
PAGE = 10


class Cloud:
    """Objects of one bucket, answered in a dialect; listings have pages of 10."""

    def __init__(self, azure: bool) -> None:
        self.azure = azure
        self.objects: dict[str, bytes] = {}
        self.server = ScriptedServer(self.answer)

    def answer(self, asked: Asked) -> Answer:
        url = urlsplit(asked.path)
        bucket, _, name = unquote(url.path).removeprefix("/").partition("/")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if bucket != "bucket":
            return refusal(404, "ContainerNotFound" if self.azure else "NoSuchBucket")
        if query.get("comp") == "batch":
            return self.batch(asked)
        if not name:
            return self.listing(query)
        return self.one(asked, name)

    def one(self, asked: Asked, name: str) -> Answer:
        if asked.method == "PUT":
            self.objects[name] = asked.body
            return Answer(201 if self.azure else 200, headers=STAMP)
        if name not in self.objects:
            return refusal(404, "BlobNotFound" if self.azure else "NoSuchKey")
        if asked.method == "DELETE":
            del self.objects[name]
            return Answer(202 if self.azure else 204)
        found = ranged(asked, self.objects[name])
        return Answer(found.status, found.body, {**STAMP, **found.headers})

    def listing(self, query: dict[str, str]) -> Answer:
        start = query.get("marker") or query.get("continuation-token") or query.get("startFrom") or ""
        names = [n for n in sorted(self.objects.copy()) if n.startswith(query.get("prefix", "")) and n >= start]
        page, more = names[:PAGE], names[PAGE : PAGE + 1]
        items = [(n, len(self.objects.get(n, b""))) for n in page]
        if self.azure:
            form = (
                "<Blob><Name>{}</Name><Properties><Last-Modified>{}</Last-Modified><Content-Length>{}</Content-Length>"
                "<Content-Type>x</Content-Type><Etag>0</Etag></Properties></Blob>"
            )
            blobs = "".join(form.format(n, TIME, size) for n, size in items)
            after = f"<NextMarker>{''.join(more)}</NextMarker>"
            body = f"<EnumerationResults><Blobs>{blobs}</Blobs>{after}</EnumerationResults>"
        else:
            form = (
                "<Contents><Key>{}</Key><Size>{}</Size><LastModified>" + NOW.isoformat() + "</LastModified>"
                "<ETag>0</ETag></Contents>"
            )
            after = "".join(f"<NextContinuationToken>{n}</NextContinuationToken>" for n in more)
            body = f"<ListBucketResult>{''.join(form.format(n, s) for n, s in items)}{after}</ListBucketResult>"
        return Answer(200, f"<?xml version='1.0'?>{body}".encode(), {"Content-Type": "application/xml"})

    def batch(self, asked: Asked) -> Answer:
        parts = []
        for number, path in re.findall(rb"Content-ID: (\d+)\r\n\r\nDELETE ([^ ]+) HTTP", asked.body):
            name = unquote(path.decode()).removeprefix("/bucket/")
            there = self.objects.pop(name, None) is not None
            status = "202 Accepted" if there else "404 Not Found\r\nx-ms-error-code: BlobNotFound"
            parts.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: {number.decode()}\r\n\r\n"
                f"HTTP/1.1 {status}\r\nx-ms-request-id: 0\r\n\r\n"
            )
        body = "".join(parts) + "--batch--\r\n"
        return Answer(202, body.encode(), {"Content-Type": "multipart/mixed; boundary=batch"})


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    cloud = Cloud(azure=False)
    account = tmp_path / "account.json"
    account.write_text(json.dumps({"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}))
    with cloud.server as server:
        monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
        yield cloud


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    cloud = Cloud(azure=True)
    with cloud.server as server:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.url)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0LWtleS1vZi10aGUtbGFi")
        yield cloud


class OfClouds(CacheBackendTests):
    big = 3 << 20
    many = 30

    def second(self, backend: ac.CacheBackend) -> ac.CacheBackend:
        return ac.ObjectBackend(backend.url)


class TestGoogle(OfClouds):
    @pytest.fixture
    def backend(self, google: Cloud) -> ac.CacheBackend:
        return ac.ObjectBackend("gs://bucket/x", deadline_s=10)


class TestAzure(OfClouds):
    @pytest.fixture
    def backend(self, azure: Cloud) -> ac.CacheBackend:
        return ac.ObjectBackend("az://bucket/x", deadline_s=10)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_bucket_that_does_not_exist_is_named(google: Cloud, azure: Cloud, scheme: str) -> None:
    backend = ac.ObjectBackend(f"{scheme}://another")
    for call in (lambda: list(backend.list()), lambda: backend.read("a"), lambda: backend.put("a", b"0")):
        with pytest.raises(BackendError, match="no bucket 'another'"):
            call()


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_who_may_not_is_told_how_others_are_chosen(google: Cloud, azure: Cloud, scheme: str) -> None:
    cloud = {"gs": google, "az": azure}[scheme]
    cloud.server.answer = lambda asked: refusal(403, "AuthorizationFailure", "This is not for you.")
    with pytest.raises(StoreAccessError, match=r"403 AuthorizationFailure: This is not for you. .*(GOOGLE|AZURE)_"):
        ac.ObjectBackend(f"{scheme}://bucket").put("a", b"0")


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_listing_that_broke_off_is_whole(google: Cloud, azure: Cloud, scheme: str) -> None:
    cloud = {"gs": google, "az": azure}[scheme]
    names = [f"v1/{i:03d}" for i in range(25)]
    cloud.objects = {f"x/{name}": b"0" for name in names}
    asked: list[Asked] = []

    def failing(request: Asked) -> Answer:
        asked.append(request)
        return refusal(503, "ServerBusy") if len(asked) == 2 else cloud.answer(request)

    cloud.server.answer = failing
    assert sorted(o.name for o in ac.ObjectBackend(f"{scheme}://bucket/x").list("v1/")) == names


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_listing_that_always_breaks_off_ends(
    google: Cloud, azure: Cloud, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = {"gs": google, "az": azure}[scheme]
    cloud.objects = {f"x/v1/{i:03d}": b"0" for i in range(25)}

    def failing(request: Asked) -> Answer:
        later = "marker" in request.path or "continuation" in request.path
        return refusal(503, "ServerBusy") if later else cloud.answer(request)

    cloud.server.answer = failing
    clock = Pauses(monkeypatch)
    began = clock.paused
    with pytest.raises(BackendError, match="503 ServerBusy"):
        ac.ObjectBackend(f"{scheme}://bucket/x", deadline_s=1).list("v1/")
    assert clock.paused - began < 1


def test_accounts_and_servers_are_apart(google: Cloud, azure: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    def identities() -> tuple[str, str]:
        return ac.ObjectBackend("gs://bucket").identity, ac.ObjectBackend("az://bucket").identity

    first = identities()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "other")
    monkeypatch.delenv("GOOGLE_BASE_URL")
    second = identities()
    assert first[0] != second[0] == "gs://bucket" and first[1] != second[1]

"""The servers that tests of object stores talk to do what those tests rely on."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fault_proxy import SIGNED, Fault, FaultProxy
from servers import S3Server


@pytest.fixture
def proxy(moto: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(moto.endpoint) as proxy:
        yield proxy


@pytest.fixture
def path(moto: S3Server) -> str:
    """The path of an object of 1,000 bytes, in a bucket of its own."""
    bucket = moto.make_bucket()
    moto.client().put_object(Bucket=bucket, Key="v1/a/b", Body=bytes(1000))
    return f"/{bucket}/v1/a/b"


def ask(
    proxy: FaultProxy, method: str, path: str, body: bytes | None = None, *, signed: bool = True, **headers: str
) -> tuple[int, bytes]:
    if signed:
        headers["Authorization"] = SIGNED
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=5)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def kinds(proxy: FaultProxy) -> list[str]:
    return [request.kind for request in proxy.requests]


def test_the_proxy_passes_on_and_counts(proxy: FaultProxy, path: str) -> None:
    bucket = path.split("/")[1]
    assert ask(proxy, "PUT", path + "2", b"abc")[0] == 200
    assert ask(proxy, "GET", path + "2") == (200, b"abc")
    assert ask(proxy, "GET", path, Range="bytes=0-9") == (206, bytes(10))
    assert ask(proxy, "GET", path, Range="bytes=990-1200") == (206, bytes(10))
    assert b"v1/a/b2" in ask(proxy, "GET", f"/{bucket}?list-type=2&prefix=v1/")[1]
    assert ask(proxy, "DELETE", path + "2")[0] == 204
    assert ask(proxy, "GET", path + "2")[0] == 404
    assert kinds(proxy) == ["put", "whole", "head", "range", "list", "delete", "whole"]
    assert (proxy.count(), proxy.count("head", "range"), proxy.received("head", "range")) == (7, 2, 20)
    assert (proxy.requests[0].sent, proxy.requests[3].start, proxy.requests[4].name) == (3, 990, "v1/")


@pytest.mark.parametrize(("way", "status"), [("slow_down", 503), ("error", 500), ("missing", 404), ("deny", 403)])
def test_refusals_come_when_they_are_due(proxy: FaultProxy, path: str, way: str, status: int) -> None:
    proxy.fail(Fault(way, ("whole",), name="v1/a/*", first=2, times=1))
    assert [ask(proxy, "GET", path)[0] for _ in range(3)] == [200, status, 200]
    assert ask(proxy, "GET", path.replace("/a/", "/c/"))[0] == 404
    proxy.fail(Fault(way, name="v1/c/*"))
    assert ask(proxy, "GET", path)[0] == 200


def test_a_share_of_requests_fails_and_the_same_ones_again(moto: S3Server, path: str) -> None:
    seen = []
    for seed in (1, 1, 2):
        with FaultProxy(moto.endpoint, seed=seed) as proxy:
            proxy.fail(Fault("error", share=0.5))
            seen.append([ask(proxy, "GET", path)[0] for _ in range(20)])
    assert seen[0] == seen[1] != seen[2]
    assert set(seen[0]) == {200, 500}


def test_connections_are_cut_and_answers_lost(proxy: FaultProxy, path: str) -> None:
    proxy.fail(Fault("cut"))
    with pytest.raises((ConnectionError, http.client.IncompleteRead)):
        ask(proxy, "GET", path)
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", path + "2", b"abc")
    proxy.fail()
    assert ask(proxy, "GET", path + "2")[0] == 404
    proxy.fail(Fault("lose"))
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", path + "2", b"abc")
    proxy.fail()
    assert ask(proxy, "GET", path + "2") == (200, b"abc")


def test_bits_flip_and_time_passes(proxy: FaultProxy, path: str) -> None:
    proxy.fail(Fault("spoil"))
    assert sum(ask(proxy, "GET", path)[1]) == 1
    proxy.fail(Fault("stall", seconds=0.3))
    start = time.monotonic()
    assert ask(proxy, "GET", path) == (200, bytes(1000))
    assert ask(proxy, "PUT", path, bytes(10))[0] == 200
    assert time.monotonic() - start > 0.6


def test_a_stale_listing_is_the_one_before(proxy: FaultProxy, path: str) -> None:
    listing = f"/{path.split('/')[1]}?list-type=2"
    before = ask(proxy, "GET", listing)
    assert ask(proxy, "PUT", path + "2", b"abc")[0] == 200
    with proxy.failing(Fault("stale")) as seen:
        assert ask(proxy, "GET", listing) == before
    assert [request.way for request in seen] == ["stale"]
    assert b"v1/a/b2" in ask(proxy, "GET", listing)[1]


def test_a_public_bucket_is_read_without_a_signature_only(moto: S3Server, path: str) -> None:
    with FaultProxy(moto.endpoint, public=True) as proxy:
        assert ask(proxy, "GET", path, signed=False)[0] == 200
        assert ask(proxy, "GET", path)[0] == 403
        assert ask(proxy, "PUT", path, b"abc", signed=False)[0] == 403


def refused(call: Any) -> str:
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"])


@pytest.mark.slow
@pytest.mark.parametrize("proxied", [False, True])
def test_swift_checks_signatures(swift: S3Server, proxied: bool) -> None:
    with FaultProxy(swift.endpoint) as proxy:
        there = replace(swift, endpoint=proxy.url) if proxied else swift
        bucket, client = there.make_bucket(), there.client()
        client.put_object(Bucket=bucket, Key="v1/a/b", Body=b"0123456789")
        assert client.get_object(Bucket=bucket, Key="v1/a/b", Range="bytes=2-4")["Body"].read() == b"234"
        assert [found["Key"] for found in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["v1/a/b"]
        wrong = replace(there, secret="another").client()
        assert refused(lambda: wrong.get_object(Bucket=bucket, Key="v1/a/b")) == "SignatureDoesNotMatch"
        assert refused(lambda: wrong.put_object(Bucket=bucket, Key="v1/c", Body=b"")) == "SignatureDoesNotMatch"
        nobody = replace(there, key="test:nobody").client()
        assert refused(lambda: nobody.list_objects_v2(Bucket=bucket)) == "SignatureDoesNotMatch"
        assert proxied == bool(proxy.requests)

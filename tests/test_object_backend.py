"""Object stores: what servers and connections do wrong, and what else may happen on the way."""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

import actcache as ac
from actcache.errors import BackendError, OptionError, StoreAccessError
from actcache.store import object_backend, object_clients
from actcache.testing.memory import growth
from bucket_helpers import Pauses
from fault_proxy import Fault, FaultProxy
from scripted_server import Answer, Asked, ScriptedServer, ranged, refusal
from servers import S3Server, only_aws

DATA = os.urandom(300_000)


@pytest.fixture
def proxy(moto: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the clients of this test and its bucket."""
    with FaultProxy(moto.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with credentials and nothing else of AWS."""
    only_aws(monkeypatch, S3Server("http://127.0.0.1:1").environment(tmp_path))


def backend_at(server: ScriptedServer | None = None, url: str = "s3://bucket", **options: Any) -> ac.ObjectBackend:
    if server is not None:
        options = {"endpoint": server.url, "deadline_s": 20, "timeout_s": 2, **options}
    return ac.ObjectBackend(url, **options)


@pytest.mark.parametrize("way", ["slow_down", "error", "cut", "lose", pytest.param("stall", marks=pytest.mark.slow)])
def test_what_passes_is_tried_again(proxy: FaultProxy, bucket: str, way: str) -> None:
    backend = ac.ObjectBackend(f"{bucket}/x", timeout_s=0.5)
    fault = Fault(way, times=2, seconds=5)
    with proxy.failing(fault):
        backend.put("v1/a", DATA)
    with proxy.failing(fault):
        assert backend.read("v1/a") == DATA
    with proxy.failing(fault):
        assert backend.read("v1/a", 1000, 200_000) == DATA[1000:200_000]
    with proxy.failing(fault):
        assert [(o.name, o.size) for o in backend.list("v1/")] == [("v1/a", len(DATA))]
    if way in ("cut", "stall"):
        # An answer without a body has no middle.
        fault = Fault("lose", times=2)
    with proxy.failing(fault):
        backend.delete("v1/a")
    with pytest.raises(FileNotFoundError):
        backend.read("v1/a")


def test_many_threads_under_random_faults_get_what_is_right(proxy: FaultProxy, bucket: str) -> None:
    backend = ac.ObjectBackend(bucket, timeout_s=1)
    ways = ("slow_down", "error", "cut", "lose")
    wrong: list[object] = []

    def work(number: int) -> None:
        data = DATA[number * 10_000 : (number + 3) * 10_000]
        try:
            backend.put(f"v1/{number}", data)
            if backend.read(f"v1/{number}") != data or backend.read(f"v1/{number}", 5, 99) != data[5:99]:
                wrong.append(number)
        except Exception as error:
            wrong.append(error)

    with proxy.failing(*(Fault(way, share=0.1) for way in ways)):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(backend.list("v1/"))) == 12
    assert not wrong


@pytest.mark.parametrize(("way", "reason"), [("slow_down", "503 SlowDown"), ("error", "500 InternalError")])
def test_the_deadline_ends_with_what_happened(
    proxy: FaultProxy, bucket: str, way: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Pauses(monkeypatch)
    backend = ac.ObjectBackend(f"{bucket}/x", deadline_s=1)
    calls = {
        "list v1/": lambda: list(backend.list("v1/")), "read v1/a": lambda: backend.read("v1/a", 0, 9),
        "put v1/a": lambda: backend.put("v1/a", DATA), "delete v1/a": lambda: backend.delete("v1/a"),
    }  # fmt: skip
    for what, call in calls.items():
        began = clock.paused
        with proxy.failing(Fault(way)) as seen, pytest.raises(BackendError) as caught:
            call()
        assert clock.paused - began < 1
        said = str(caught.value)
        assert f"cannot {what} in {bucket}/x: tried {len(seen)} times in " in said and reason in said
        assert len(seen) > 2


def test_a_stall_and_a_refused_connection_end_at_the_deadline(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Pauses(monkeypatch)

    def stalling(asked: Asked) -> Answer:
        time.sleep(3)
        return Answer()

    with ScriptedServer(stalling) as server:
        began = clock.paused
        with pytest.raises(BackendError, match="no answer in time"):
            backend_at(server, deadline_s=1, timeout_s=0.2).read("a")
        assert clock.paused - began < 1
        url = server.url
    with pytest.raises(BackendError, match=r"no connection \(Connection refused\).*" + re.escape(url)):
        backend_at(url="s3://bucket", endpoint=url, deadline_s=0.5).put("a", b"0")
    with pytest.raises(BackendError, match="tried 1 time in"):
        backend_at(url="s3://bucket", endpoint=url, deadline_s=1e-9).put("a", b"0")


def test_pauses_grow_and_differ(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    every: list[list[float]] = []
    with ScriptedServer(lambda asked: refusal(503, "SlowDown")) as server:
        backend = backend_at(server)
        for seed in range(20):
            left, pauses = iter([0.0] * 12), []
            # A clock of its own: that of the whole process is also other threads'.
            clock = SimpleNamespace(sleep=pauses.append, monotonic=lambda left=left: next(left, 1e9))
            monkeypatch.setattr(object_backend, "time", clock)
            monkeypatch.setattr(object_backend, "_chance", random.Random(seed))
            with pytest.raises(BackendError):
                backend.read("a")
            every.append(pauses)
    assert len({len(pauses) for pauses in every}) == 1
    turns = list(zip(*every, strict=True))
    assert len(turns) >= 8 and all(len(set(turn)) > 10 for turn in turns)
    means = [sum(turn) / len(turn) for turn in turns]
    assert means[5] > 4 * means[1] and max(map(max, every)) <= 8


@pytest.mark.parametrize("verb", ["list", "read", "put", "delete"])
def test_who_may_not_is_told_at_once(proxy: FaultProxy, bucket: str, verb: str) -> None:
    backend = ac.ObjectBackend(bucket)
    calls: dict[str, Any] = {"list": list, "read": bytes, "put": lambda _: None, "delete": lambda _: None}
    arguments: dict[str, tuple[object, ...]] = {"list": (), "read": ("a",), "put": ("a", b"0"), "delete": ("a",)}
    with proxy.failing(Fault("deny")) as seen, pytest.raises(StoreAccessError) as caught:
        calls[verb](getattr(backend, verb)(*arguments[verb]))
    assert len(seen) == 1
    assert "403 AccessDenied: Access Denied" in str(caught.value) and "AWS_PROFILE" in str(caught.value)


def test_an_object_that_is_gone_is_not_tried_again(proxy: FaultProxy, bucket: str) -> None:
    backend = ac.ObjectBackend(bucket)
    backend.put("a", DATA)
    with proxy.failing(Fault("missing")) as seen, pytest.raises(FileNotFoundError):
        backend.read("a", 0, 10)
    assert len(seen) == 1


def test_a_bucket_that_does_not_exist_is_named(moto: S3Server, bucket: str) -> None:
    backend = ac.ObjectBackend("s3://no-such-bucket/x")
    calls = [
        lambda: list(backend.list()), lambda: backend.read("a"), lambda: backend.put("a", b""),
        lambda: backend.delete("a"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(BackendError, match=r"no bucket 'no-such-bucket' at http.*Create it") as caught:
            call()
        assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(("start", "size"), [(0, 100), (1000, 100_000)], ids=["head", "rows"])
@pytest.mark.parametrize(
    "wrong",
    [
        # All said to come, or some; FROM and TO stand for the range.
        Answer(206, DATA[:60], {"Content-Range": "bytes FROM-TO/300000"}),
        Answer(206, DATA[:60], {"Content-Range": "bytes FROM-59/300000"}),
        Answer(206, DATA[:60], {"Content-Range": "bytes FROM-TO/300000"}, length=100),
        Answer(206, DATA[:100], {"Content-Range": "bytes 100-199/300000"}),
        Answer(206, DATA[:100]),
        refusal(429, "TooManyRequests"), refusal(400, "RequestTimeout"), refusal(400, "BadDigest"),
        refusal(409, "OperationAborted"), Answer(502, b"<html>bad gateway</html>"),
    ],
    ids=["short", "less", "ends early", "elsewhere", "no range", "429", "400 late", "400 spoilt", "409", "502"],
)  # fmt: skip
def test_a_wrong_answer_is_never_given_out(nowhere: None, wrong: Answer, start: int, size: int) -> None:
    said = {
        name: value.replace("FROM", str(start)).replace("TO", str(start + size - 1)).replace("-59/", f"-{start + 59}/")
        for name, value in wrong.headers.items()
    }
    wrongs = [replace(wrong, headers=said)] * 2
    with ScriptedServer(lambda asked: wrongs.pop() if wrongs else ranged(asked, DATA)) as server:
        assert backend_at(server).read("a", start, start + size) == DATA[start : start + size]
        assert len(server.asked) == 3


def test_rows_come_with_one_request_and_what_ends_before_is_looked_at_once_more(nowhere: None) -> None:
    with ScriptedServer(lambda asked: ranged(asked, DATA)) as server:
        backend = backend_at(server)
        assert backend.read("a", 1000, 200_000) == DATA[1000:200_000]
        assert len(server.asked) == 1
        assert backend.read("a", 230_000, 300_500) == DATA[230_000:]
        assert len(server.asked) == 3
        assert backend.read("a", 300_000, 400_000) == b""
        assert len(server.asked) == 5


def test_whether_an_object_ends_where_it_should_takes_one_request(nowhere: None) -> None:
    with ScriptedServer(lambda asked: ranged(asked, DATA)) as server:
        backend = backend_at(server)
        assert backend.read("a", 299_999, 300_001) == DATA[-1:]
        assert backend.read("a", 300_000, 300_500) == b"" == backend.read("a", 400_000, 400_001)
        assert len(server.asked) == 3


def test_a_server_that_knows_no_ranges_is_refused(nowhere: None) -> None:
    with ScriptedServer(lambda asked: Answer(200, DATA, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})) as server:
        for start in (0, 7):
            with pytest.raises(BackendError, match="whole objects"):
                backend_at(server).read("a", start, 100_000)
        assert len(server.asked) == 2 + 3


def test_an_empty_object_may_be_answered_without_a_range(nowhere: None) -> None:
    with ScriptedServer(lambda asked: Answer(200, b"", {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})) as server:
        assert bytes(backend_at(server).read("a", 0, 100)) == b""


@pytest.mark.parametrize("status", [400, 405, 412, 501])
def test_what_asking_again_would_not_change_is_told_at_once(nowhere: None, status: int) -> None:
    with ScriptedServer(lambda asked: refusal(status, "Strange", "this will not do")) as server:
        with pytest.raises(BackendError, match=f"cannot put a in s3://bucket: {status} Strange: this will not do"):
            backend_at(server).put("a", b"0")
        assert len(server.asked) == 1


def test_an_upload_that_needs_longer_is_given_longer(nowhere: None) -> None:
    def slow(asked: Asked) -> Answer:
        time.sleep(0.8)
        return Answer(headers={"ETag": '"x"'})

    with ScriptedServer(slow) as server:
        backend_at(server, timeout_s=0.5).put("a", b"0123456789")
        assert [asked.body for asked in server.asked] == [b"0123456789"] * 2


def test_a_listing_goes_on_behind_the_page_that_came(proxy: FaultProxy, bucket: str, moto: S3Server) -> None:
    backend = ac.ObjectBackend(f"{bucket}/x")
    names = [f"v1/{i:04d}" for i in range(1005)]
    threads = [
        threading.Thread(target=lambda part=part: [backend.put(name, b"0") for name in names[part::8]])
        for part in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(backend.list("v1/"))) == 1005
    pages = proxy.count("list")
    assert pages == 2
    with proxy.failing(Fault("cut", ("list",), first=2, times=1)) as seen:
        assert [o.name for o in backend.list("v1/")] == names
    assert len(seen) == pages + 1


def test_a_listing_that_goes_on_behind_a_marker_has_nothing_twice(nowhere: None) -> None:
    keys = [*(f"x/v1-{i:03d}" for i in range(999)), "x/v1/", "x/v1/a"]

    def page(asked: Asked) -> Answer:
        query = parse_qs(urlsplit(asked.path).query)
        after, token = query.get("start-after", [""])[0], query.get("continuation-token", [""])[0]
        if token and len(server.asked) == 2:
            return refusal(503, "SlowDown")
        left = [key for key in keys if key > max(after, token)]
        items = "".join(
            f"<Contents><Key>{key}</Key><Size>1</Size><LastModified>2024-01-01T00:00:00Z</LastModified></Contents>"
            for key in left[:1000]
        )
        more = f"<NextContinuationToken>{left[999]}</NextContinuationToken>" if left[1000:] else ""
        return Answer(200, f"<?xml version='1.0'?><ListBucketResult>{items}{more}</ListBucketResult>".encode())

    with ScriptedServer(page) as server:
        found = [o.name for o in backend_at(server, "s3://bucket/x").list()]
        assert len(server.asked) > 2
    assert len(set(found)) == len(found) and {"v1-998", "v1/a"} <= set(found)


def test_an_upload_of_a_file_takes_no_memory(bucket: str, tmp_path: Path) -> None:
    size = 96 << 20
    source = tmp_path / "large"
    source.write_bytes(bytes(size))
    backend = ac.ObjectBackend(bucket)
    backend.put("warm", b"0")
    with growth(0.001) as found:
        backend.put("large", source)
    assert found.most < size / 3
    assert [o.size for o in backend.list() if o.name == "large"] == [size]


def test_what_is_too_large_for_one_request_goes_in_parts(
    proxy: FaultProxy, bucket: str, tmp_path: Path, moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_backend, "_ONE_REQUEST", 6 << 20)
    for module in (object_backend, object_clients):
        monkeypatch.setattr(module, "PART", 5 << 20)
    data = os.urandom((12 << 20) + 5)
    source = tmp_path / "large"
    source.write_bytes(data)
    backend = ac.ObjectBackend(bucket)
    with proxy.failing(Fault("error", ("parts",), first=2, times=2)):
        backend.put("large", source)
    assert backend.read("large") == data and not proxy.count("put")
    backend.put("small", data[: 6 << 20])
    assert proxy.count("put") == 1
    assert "Uploads" not in moto.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))


def test_a_copy_of_a_backend_finds_the_same(bucket: str) -> None:
    backend = ac.ObjectBackend(f"{bucket}/x", deadline_s=7, timeout_s=3)
    backend.put("a", DATA)
    stored = pickle.dumps(backend)
    copied = pickle.loads(stored)
    assert copied.read("a") == DATA
    assert (copied.url, copied.deadline_s, copied.timeout_s) == (backend.url, 7, 3)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in stored


def test_the_deadline_comes_from_the_environment(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_at().deadline_s == 120
    monkeypatch.setenv("ACTCACHE_DEADLINE_S", "3.5")
    assert backend_at().deadline_s == 3.5 and backend_at(deadline_s=9).deadline_s == 9
    for wrong in ("0", "soon", "-1", "nan", "inf"):
        monkeypatch.setenv("ACTCACHE_DEADLINE_S", wrong)
        with pytest.raises(OptionError, match=f"ACTCACHE_DEADLINE_S is '{wrong}'"):
            backend_at()


def test_trouble_that_goes_on_is_told(
    nowhere: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_backend, "_PATIENCE_S", 0.2)
    caplog.set_level(logging.WARNING, logger="actcache.store")
    wrongs = [refusal(503, "SlowDown")] * 4
    with ScriptedServer(lambda asked: wrongs.pop() if wrongs else ranged(asked, DATA)) as server:
        monkeypatch.setattr(object_backend, "_chance", SimpleNamespace(uniform=lambda low, high: 0.15))
        # A clock that only pauses move: a slow moment of the machine would be told, too.
        now = [100.0]
        clock = SimpleNamespace(sleep=lambda pause: now.append(now[-1] + pause), monotonic=lambda: now[-1])
        monkeypatch.setattr(object_backend, "time", clock)
        backend_at(server).read("a", 0, 10)
    (record,) = caplog.records
    assert "s3://bucket: read a failed" in record.getMessage() and "503 SlowDown" in record.getMessage()

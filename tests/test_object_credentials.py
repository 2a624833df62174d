"""Where the credentials, the server and the region of a bucket are found, and that nobody sees what is secret."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import actcache as ac
from actcache.errors import BackendError, OptionError, StoreAccessError
from actcache.store.aws import Aws
from actcache.store.backend import CacheBackend
from fault_proxy import FaultProxy
from scripted_server import Answer, Asked, ScriptedServer, ranged, refusal
from servers import S3Server, only_aws

SECRET = "not-for-anybody-to-see-0123456789"
TOKEN = "a-token-that-is-as-secret-0123456789"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda asked: ranged(asked, b"0123456789")) as server:
        yield server


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ScriptedServer) -> Path:
    """The folder where AWS's files would be; the environment names them and the server, and no credentials."""
    variables = S3Server(server.url).environment(tmp_path)
    variables |= {"AWS_CONFIG_FILE": str(tmp_path / "config"), "HOME": str(tmp_path)}
    variables["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "credentials")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del variables[name]
    only_aws(monkeypatch, variables)
    return tmp_path


def key_used(server: ScriptedServer, backend: CacheBackend | None = None) -> str | None:
    """With which access key `backend` signs what it reads; None: it does not."""
    at = len(server.asked)
    assert bytes((backend or ac.ObjectBackend("s3://bucket/x", deadline_s=5)).read("a", 2, 5)) == b"234"
    (asked,) = [asked for asked in server.asked[at:] if "range" in asked.headers]
    assert asked.path == "/bucket/x/a"
    return asked.access_key


def test_from_the_environment(aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROM-ENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    assert key_used(server) == "FROM-ENVIRONMENT"
    assert server.asked[-1].headers["x-amz-security-token"] == TOKEN


def test_from_the_files_of_aws(aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    (aws / "credentials").write_text(
        f"[default]\naws_access_key_id = OF-DEFAULT\naws_secret_access_key = {SECRET}\n"
        f"[lab]\naws_access_key_id = OF-LAB\naws_secret_access_key = {SECRET}\n"
    )
    (aws / "config").write_text(
        f"[profile called]\ncredential_process = sh -c 'cat {aws}/said'\n[profile lab]\nregion = eu-north-1\n"
    )
    said = {"Version": 1, "AccessKeyId": "OF-PROCESS", "SecretAccessKey": SECRET}
    (aws / "said").write_text(json.dumps(said))
    assert key_used(server) == "OF-DEFAULT"
    assert key_used(server, ac.ObjectBackend("s3://bucket/x", profile="lab")) == "OF-LAB"
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.delenv("AWS_REGION")
    assert key_used(server) == "OF-LAB"
    assert "/eu-north-1/s3/" in server.asked[-1].headers["authorization"]
    monkeypatch.setenv("AWS_PROFILE", "called")
    assert key_used(server) == "OF-PROCESS"
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(StoreAccessError, match="absent"):
        ac.ObjectBackend("s3://bucket/x").read("a")


def test_a_profile_may_take_a_role(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, variables = moto.make_bucket(), moto.environment(tmp_path)
    (tmp_path / "credentials").write_text(f"[me]\naws_access_key_id = ME\naws_secret_access_key = {SECRET}\n")
    (tmp_path / "config").write_text(
        "[profile lab]\nrole_arn = arn:aws:iam::123456789012:role/lab\nsource_profile = me\nregion = us-east-1\n"
    )
    variables |= {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"), "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_PROFILE": "lab",
    }  # fmt: skip
    only_aws(monkeypatch, {k: v for k, v in variables.items() if "KEY" not in k})
    with FaultProxy(moto.endpoint) as proxy:
        backend = ac.ObjectBackend(f"s3://{bucket}", endpoint=proxy.url)
        backend.put("a", b"0123456789")
        assert bytes(backend.read("a", 2, 4)) == b"23"
        assert all(request.signed for request in proxy.requests) and len(proxy.requests) == 2


@pytest.mark.parametrize(
    "config",
    ["[default]\nendpoint_url = {}\n", "[default]\nservices = lab\n[services lab]\ns3 =\n  endpoint_url = {}\n"],
    ids=["for all", "for s3"],
)
def test_the_server_may_stand_in_a_file(
    aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (aws / "config").write_text(config.format(server.url))
    assert key_used(server) is None


def test_the_server_for_s3_wins(aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert key_used(server, ac.ObjectBackend("s3://bucket/x", endpoint=server.url + "/")) is None
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    assert key_used(server) is None
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert key_used(server, ac.ObjectBackend("s3://bucket/x", endpoint=server.url)) is None
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    backend = ac.ObjectBackend("s3://bucket/x")
    assert backend.identity == backend.url


def metadata(asked: Asked) -> Answer:
    """What a machine in the cloud is told of its credentials."""
    if asked.path.endswith("/api/token"):
        return Answer(body=b"token")
    if asked.path.endswith("/security-credentials/"):
        return Answer(body=b"role")
    said = {
        "Code": "Success", "AccessKeyId": "OF-MACHINE", "SecretAccessKey": SECRET, "Token": TOKEN,
        "Expiration": (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
    return Answer(body=json.dumps(said).encode())


def test_from_the_machine(aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    with ScriptedServer(metadata) as machine:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", machine.url)
        backend = ac.ObjectBackend("s3://bucket/x")
        assert key_used(server, backend) == "OF-MACHINE"
        asked = len(machine.asked)
        assert key_used(server, backend) == "OF-MACHINE"
        assert len(machine.asked) == asked


def test_credentials_are_renewed_before_they_expire(aws: Path, server: ScriptedServer) -> None:
    (aws / "config").write_text(f"[default]\ncredential_process = sh -c 'cat {aws}/said'\n")

    def say(key: str, minutes: int) -> None:
        expires = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()
        said = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": SECRET, "Expiration": expires}
        (aws / "said").write_text(json.dumps(said))

    say("SOON-OVER", 5)
    backend = ac.ObjectBackend("s3://bucket/x")
    assert key_used(server, backend) == "SOON-OVER"
    say("FRESH", 300)
    assert key_used(server, backend) == "FRESH"
    say("UNUSED", 300)
    assert key_used(server, backend) == "FRESH"


def test_a_machine_that_does_not_answer_is_not_waited_for(
    aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once, with a limit of its own; that the time is over is said here, whatever the clock says."""
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://machine.invalid:81")
    asked = []

    def connect(address: Any, timeout: float | None = None, *rest: Any, **named: Any) -> Any:
        if address[0] != "machine.invalid":
            return connects(address, timeout, *rest, **named)
        asked.append((address, timeout))
        raise TimeoutError("timed out")

    connects = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", connect)
    # Everybody else who connects.
    names, resolved = socket.getaddrinfo, []

    def resolve(host: Any, *rest: Any, **named: Any) -> Any:
        resolved.append(host)
        return names(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert key_used(server) is None
    ((address, limit),) = asked
    assert address == ("machine.invalid", 81) and limit is not None and 0 < limit <= 0.5
    assert "machine.invalid" not in resolved, "somebody asks it who waits for as long as the network does"


def test_a_server_that_refuses_what_is_not_signed_in_words_of_its_own(
    aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenStack Swift does, which knows no bucket without an account: what is missing is said."""
    with ScriptedServer(lambda asked: refusal(412, "PreconditionFailed")) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with pytest.raises(BackendError, match=r"412 PreconditionFailed.* not signed: no credentials were found"):
            list(ac.ObjectBackend("s3://bucket/x").list())
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "SOME")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        with pytest.raises(BackendError, match="412 PreconditionFailed") as caught:
            list(ac.ObjectBackend("s3://bucket/x").list())
        assert "not signed" not in str(caught.value)


def test_what_everybody_may_read_needs_no_credentials(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = moto.make_bucket()
    moto.client().put_object(Bucket=bucket, Key="a", Body=b"0123456789", ACL="public-read")
    variables = moto.environment(tmp_path)
    only_aws(monkeypatch, {k: v for k, v in variables.items() if "KEY" not in k})
    assert bytes(ac.ObjectBackend(f"s3://{bucket}").read("a", 1, 3)) == b"12"
    with pytest.raises(StoreAccessError, match="no credentials were found"):
        ac.ObjectBackend(f"s3://{bucket}", anonymous=False).read("a")


def test_who_had_no_credentials_is_told_where_they_were_looked_for(aws: Path, server: ScriptedServer) -> None:
    server.answer = lambda asked: refusal(403, "AccessDenied", "Access Denied")
    with pytest.raises(StoreAccessError, match=r"not signed: no credentials were found.*s3:PutObject"):
        ac.ObjectBackend("s3://bucket").put("b", b"0")
    assert len(server.asked) == 1


def test_requests_may_be_left_unsigned(aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert key_used(server, ac.ObjectBackend("s3://bucket/x", anonymous=True)) is None
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert key_used(server) is None
    assert key_used(server, ac.ObjectBackend("s3://bucket/x", anonymous=False)) == "KEY"


@pytest.mark.parametrize("code", ["AuthorizationHeaderMalformed", "PermanentRedirect"])
def test_the_region_of_a_bucket_is_found(
    aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    where = {"x-amz-bucket-region": "eu-central-1"}

    def answer(asked: Asked) -> Answer:
        if asked.method == "HEAD":
            return Answer(403, b"", where)
        if "/eu-central-1/s3/" not in asked.headers["authorization"]:
            return refusal(301 if code == "PermanentRedirect" else 400, code, "wrong region")
        return Answer(headers={"ETag": '"x"'}) if asked.method == "PUT" else ranged(asked, b"0123456789")

    server.answer = answer
    backend = ac.ObjectBackend("s3://bucket/x", deadline_s=5)
    backend.put("a", b"0123456789")
    asked = len(server.asked)
    assert bytes(backend.read("a")) == b"0123456789"
    assert len(server.asked) == asked + 1
    del where["x-amz-bucket-region"]
    with pytest.raises(BackendError, match=r"signed for us-east-1. Set AWS_REGION"):
        ac.ObjectBackend("s3://bucket/x", deadline_s=5).read("a")


def refused(backend: CacheBackend) -> str:
    with pytest.raises((StoreAccessError, BackendError)) as caught:
        backend.read("a")
    return f"{caught.value} {caught.value!r} {caught.value.__cause__} {caught.value.__context__}"


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken"), (503, "SlowDown")])
def test_nobody_sees_a_secret(
    aws: Path,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    code: str,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY-THAT-IS-NO-SECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    # A server may repeat what it was sent.
    server.answer = lambda asked: refusal(status, code, f"{SECRET} {TOKEN} are of no use")
    backend = ac.ObjectBackend("s3://bucket/x", deadline_s=0.5)
    said = refused(backend) + repr(backend) + backend.url + backend.identity + caplog.text
    assert "are of no use" in said and ("actcache.store" in caplog.text) == (status == 503)
    assert SECRET not in said and TOKEN not in said


def test_nobody_sees_a_secret_that_was_given_in_the_wrong_place(aws: Path) -> None:
    calls: list[Any] = [
        lambda: ac.ObjectBackend(f"s3://KEY:{SECRET}@bucket/x"),
        lambda: ac.ObjectBackend(f"s3://bucket/x?secret={SECRET} "),
        lambda: ac.ObjectBackend("s3://bucket/x", endpoint=f"https://KEY:{SECRET}@host"),
        lambda: ac.ObjectBackend(f"{SECRET}"),
    ]
    for call in calls:
        with pytest.raises(OptionError) as caught:
            call()
        assert SECRET not in str(caught.value)


def test_credentials_that_cannot_be_had_are_explained(
    aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (aws / "config").write_text("[default]\ncredential_process = sh -c 'echo the login is over >&2; exit 1'\n")
    said = refused(ac.ObjectBackend("s3://bucket/x"))
    assert "the login is over" in said and "aws sso login" in said and not server.asked


def test_authorities_come_from_a_file(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(aws / "missing.pem"))
    with pytest.raises(OptionError, match="AWS_CA_BUNDLE"):
        ac.ObjectBackend("s3://bucket/x").read("a")


@pytest.mark.parametrize(
    "config", ["", "s3 =\n  payload_signing_enabled = true", "s3 =\n  payload_signing_enabled = no"]
)
def test_bodies_are_hashed_where_the_profile_says_so(aws: Path, server: ScriptedServer, config: str) -> None:
    (aws / "config").write_text(f"[default]\naws_access_key_id = ME\naws_secret_access_key = {SECRET}\n{config}\n")
    server.answer = lambda asked: Answer(headers={"ETag": '"1"'})
    ac.ObjectBackend("s3://bucket/x", deadline_s=5).put("a", b"what is put")
    (asked,) = server.asked
    hashed = hashlib.sha256(b"what is put").hexdigest() if "true" in config else "UNSIGNED-PAYLOAD"
    assert (asked.access_key, asked.body, asked.headers["x-amz-content-sha256"]) == ("ME", b"what is put", hashed)


@pytest.mark.parametrize(
    ("endpoint", "hashed"),
    [
        (None, False), ("https://s3.example.org", False), ("http://s3.example.org:9000", True),
        ("http://10.0.0.7", True), ("http://127.0.0.1:9000", False), ("http://[::1]:9000", False),
        ("http://localhost:9000", False), ("http://localhost.example.org", True),
        ("http://127.0.0.1.example.org", True),
    ],
)  # fmt: skip
def test_bodies_are_hashed_where_they_travel_open(aws: Path, endpoint: str | None, hashed: bool) -> None:
    where = Aws("bucket", endpoint=endpoint, region="us-east-1", profile=None, anonymous=None)
    if endpoint is None:
        where._found_endpoint = lambda: None  # type: ignore[method-assign]
    assert where.hashes_bodies is hashed


def test_the_variable_of_obstore_wins(aws: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    (aws / "config").write_text(f"[default]\naws_access_key_id = ME\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_UNSIGNED_PAYLOAD", "false")
    server.answer = lambda asked: Answer(headers={"ETag": '"1"'})
    ac.ObjectBackend("s3://bucket/x", deadline_s=5).put("a", b"what is put")
    assert server.asked[0].headers["x-amz-content-sha256"] == hashlib.sha256(b"what is put").hexdigest()

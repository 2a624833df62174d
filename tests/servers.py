"""Servers that tests of object stores talk to, each in a process of its own on 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Ends with the process that holds the other end of its standard input, however that one ends.
_MOTO = """
import logging, sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class S3Server:
    """A server that speaks S3: its address, and credentials that may do everything there."""

    endpoint: str
    key: str = "testing"
    secret: str = field(default="testing-secret", repr=False)

    def environment(self, nowhere: Path) -> dict[str, str]:
        """Variables with which a client finds this server and these credentials; `nowhere`: no file is there."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(nowhere / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(nowhere / "no-credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """botocore's client, for what actcache never does, such as making buckets, and to look behind its back."""
        return _client(self.endpoint, self.key, self.secret)

    def make_bucket(self) -> str:
        """A new empty bucket; its name."""
        name = f"actcache-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=name)
        return name


@cache
def _client(endpoint: str, key: str, secret: str) -> Any:
    import botocore.session

    return botocore.session.Session().create_client(
        "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1"
    )


def only_aws(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Let `variables` be all that the environment says of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def _served(*command: str | Path, log: Path | None = None) -> Iterator[str]:
    """The first line that a server prints; it runs as long as the block."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "COV_"))}
    with contextlib.ExitStack() as stack:
        errors = subprocess.DEVNULL if log is None else stack.enter_context(log.open("wb"))
        process = stack.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
            )
        )
        assert process.stdout is not None and process.stdin is not None
        line = process.stdout.readline().strip()
        told = log.read_text()[-2000:] if log else ""
        assert line, f"the server ended with {process.wait()}\n{told}"
        try:
            yield line
        finally:
            process.stdin.close()
            deadline = time.monotonic() + 5
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.kill()


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """moto's server: takes any credentials, and requests without any."""
    pytest.importorskip("moto.moto_server.threaded_moto_server")
    with _served(sys.executable, "-W", "ignore", "-c", _MOTO) as line:
        host, _, port = line.partition(" ")
        yield S3Server(f"http://{host}:{int(port)}")


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """OpenStack Swift in the environment that `make venv-swift` makes, or that of the interpreter which
    ACTCACHE_SWIFT_PYTHON names: checks signatures, and wants one. Tests that use it are slow ones."""
    here = Path(__file__).parent
    named = os.environ.get("ACTCACHE_SWIFT_PYTHON")
    python = Path(named) if named else here.parent / ".venv-swift" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with OpenStack Swift at {python}: `make venv-swift` makes it")
    folder = tmp_path_factory.mktemp("swift")
    try:
        os.setxattr(folder, "user.actcache", b"")
    except OSError as error:
        pytest.skip(f"Swift keeps its notes in extended attributes, and {folder} has none: {error.strerror}")
    with _served(python, here / "peers" / "swift_server.py", folder, log=folder / "log") as endpoint:
        yield S3Server(endpoint, "test:tester", "testing")


@pytest.fixture
def bucket(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket of moto's server; the environment says how to reach it."""
    only_aws(monkeypatch, moto.environment(tmp_path))
    return f"s3://{moto.make_bucket()}"


@pytest.fixture(params=["moto", pytest.param("swift", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest) -> S3Server:
    """moto, and in slow tests OpenStack Swift."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, S3Server)
    return found


@pytest.fixture
def anywhere(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a place in a new bucket of each `server`; the environment says how to reach it."""
    only_aws(monkeypatch, server.environment(tmp_path))
    return f"s3://{server.make_bucket()}/lab/set-1"

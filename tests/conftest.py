"""What holds for every test: no network, and no trace outside the test's own folders."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import children
import hub_client
from actcache import config
from actcache.model import host_memo
from actcache.store import default
from actcache.store.store import Store
from actcache.testing.hub import LoopbackHub
from cli_helpers import Cli, command
from servers import anywhere, bucket, moto, server, swift

__all__ = ["anywhere", "bucket", "moto", "server", "swift"]

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported. Models of 32 dimensions have no work to share out: threads that wait for one another make
# these tests several times slower on a machine that is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore it, and so would the commands that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

_SEEDS = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    # Hooks of this very file are not called for what lasts as long as the session.
    config.pluginmanager.register(children)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    of_families = [
        (item, item.callspec.params["family"])
        for item in items
        if isinstance(item, pytest.Function) and "family" in getattr(item, "callspec", NoParams).params
    ]
    if of_families:
        # It takes transformers with it, which nothing may import before the variables above are set.
        import zoo_families

        for item, family in of_families:
            if family in zoo_families.FAMILIES and family not in zoo_families.COMMON:
                item.add_marker(pytest.mark.rare)


class NoParams:
    """A test without parameters."""

    params: ClassVar[dict[str, object]] = {}


@pytest.fixture(scope="module")
def module_hub() -> Iterator[LoopbackHub]:
    """One Hub for the tests of a module, which each see it as `hub`."""
    with LoopbackHub() as hub:
        hub.tokens.add(hub_client.TOKEN)
        hub.read_tokens.add(hub_client.READ_TOKEN)
        yield hub


@pytest.fixture
def hub(module_hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """A Hub that fails as the test tells it, and not in the next one."""
    yield module_hub
    module_hub.faults.clear()


@pytest.fixture(scope="module")
def client(module_hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub_client.Client]:
    """A process with the real client of the Hub, for the tests of a module."""
    with hub_client.Client(module_hub, tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture
def one_ray_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two that begin beside each other on a small machine wait longer for their own parts than Ray lets them."""
    with (tmp_path_factory.getbasetemp().parent / "ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(params=["local", "ray"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of many workers, each of them; what it leaves behind ends with the test."""
    if request.param == "ray":
        pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield request.param
    if request.param == "ray":
        import ray

        ray.shutdown()


@pytest.fixture(autouse=True)
def _own_cache_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default store and this host's state are folders of the test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("ACTCACHE_DIR", str(folder / "store"))
    for variable in ("BACKEND", "MAX_GB", "DTYPE", "LOG"):
        monkeypatch.delenv(f"ACTCACHE_{variable}", raising=False)
    # Tables are as wide as in a pipe, wherever the tests run.
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(config, "_chosen", {})
    monkeypatch.setattr(default, "_chosen", None)
    # What another test has learnt about models is in memory only, and no other process of this test would know it.
    monkeypatch.setattr(host_memo, "_default", host_memo.HostMemo())
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command in this process: exit status, standard output, standard error."""
    return command(capsys)


@dataclass(frozen=True)
class Peers:
    """An interpreter that has the libraries which tests compare with, and actcache beside them."""

    python: Path

    def run(self, script: str, *arguments: str | Path, timeout: float = 600) -> str:
        """Run ``tests/peers/<script>`` there, with the helpers of these tests at hand; what it printed."""
        here = Path(__file__).parent
        paths = os.pathsep.join(map(str, (here / "peers", here, here.parent / "src")))
        ran = subprocess.run(
            [self.python, here / "peers" / script, *arguments],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert ran.returncode == 0, f"{script} failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
        return ran.stdout


@pytest.fixture(scope="session")
def peers() -> Peers:
    """The environment that `make venv-peers` makes, or the interpreter that ACTCACHE_PEERS_PYTHON names. Tests that use
    it are slow ones."""
    named = os.environ.get("ACTCACHE_PEERS_PYTHON")
    python = Path(named) if named else Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with other libraries at {python}: `make venv-peers` makes it")
    return Peers(python)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store to share from (`share_helpers`), of the test."""
    import share_helpers

    return share_helpers.new_store(tmp_path)


@pytest.fixture
def space(store: Store) -> str:
    """The space of a model in it."""
    import share_helpers

    return share_helpers.new_space(store)


@pytest.fixture
def pooled(store: Store, space: str) -> Store:
    """The same store, with a vector at each site of each of `share_helpers.TEXTS`."""
    import share_helpers

    share_helpers.fill_pooled(store, space, share_helpers.N)
    return store


@pytest.fixture
def repo(hub: LoopbackHub) -> str:
    """A name that no dataset of the Hub has."""
    return f"user/set{len(hub.repositories)}-{time.monotonic_ns()}"


@pytest.fixture
def seed() -> int:
    """Of vectors that no other test of the file has: a Hub keeps what it has once, whoever sent it."""
    return next(_SEEDS)


@pytest.fixture(scope="session")
def lmprobe() -> Path:
    """The interpreter of what `make venv-lmprobe` makes, or the one that ACTCACHE_LMPROBE_PYTHON names. Tests that use
    it are slow ones."""
    named = os.environ.get("ACTCACHE_LMPROBE_PYTHON")
    python = Path(named) if named else Path(__file__).parents[1] / ".venv-lmprobe" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with lmprobe at {python}: `make venv-lmprobe` makes it")
    return python

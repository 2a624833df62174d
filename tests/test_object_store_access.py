"""Who may do what in a bucket, and what people are told who may not."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import actcache as ac
from actcache.errors import ActCacheError, BackendError, StoreAccessError
from actcache.store.nearby import stores_among
from actcache.store.store import Store
from bucket_helpers import Pauses, opened
from cli_helpers import Cli
from fault_proxy import Fault, FaultProxy
from servers import S3Server, only_aws
from store_helpers import check_pooled, pooled, vector


@pytest.fixture
def filled(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store with the prompts 0 to 5."""
    only_aws(monkeypatch, moto.environment(tmp_path))
    url = f"s3://{moto.make_bucket()}/shared"
    store, space = opened(url, tmp_path / "writer")
    with store:
        store.append(space, pooled(range(6)))
    return url


@pytest.fixture
def public(moto: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(moto.endpoint, public=True) as proxy:
        yield proxy


def write(store: Store, space: str, numbers: range) -> None:
    store.append(space, pooled(numbers))
    store.flush()


def without_credentials(server: S3Server, nowhere: Path) -> dict[str, str]:
    return {
        k: v for k, v in server.environment(nowhere).items() if k not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }


class TestPublic:
    """A bucket that everybody may read, and somebody without credentials."""

    @pytest.fixture(autouse=True)
    def _nobody(
        self,
        filled: str,
        moto: S3Server,
        public: FaultProxy,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        only_aws(monkeypatch, without_credentials(replace(moto, endpoint=public.url), tmp_path))

    def test_everybody_reads_it(self, filled: str, public: FaultProxy, tmp_path: Path) -> None:
        store, space = opened(filled, tmp_path / "reader")
        with store:
            assert check_pooled(store, space, range(7)).tolist() == [True] * 6 + [False]
            assert store.verify().ok
            assert store.info().models[0].num_prompts == 6
        assert public.requests and not any(request.signed for request in public.requests)

    def test_writing_says_that_it_is_not_allowed_and_loses_nothing(self, filled: str, tmp_path: Path) -> None:
        store, space = opened(filled, tmp_path / "reader")
        with pytest.raises(StoreAccessError, match=filled.split("/")[2]):
            write(store, space, range(6, 9))
        assert check_pooled(store, space, range(6)).all()
        with pytest.raises(StoreAccessError):
            store.invalidate(space, None)
        with pytest.raises(StoreAccessError):
            store.clear()
        fresh, _ = opened(filled, tmp_path / "third")
        assert check_pooled(fresh, space, range(7)).tolist() == [True] * 6 + [False]
        # What waits would be tried once more when all tests are over, and nobody is at that address.
        with pytest.raises(StoreAccessError):
            store.close()
        shutil.rmtree(store.index_dir)


@pytest.mark.slow
def test_a_wrong_secret(swift: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_aws(monkeypatch, swift.environment(tmp_path))
    url = f"s3://{swift.make_bucket()}/x"
    store, space = opened(url, tmp_path / "right")
    with store:
        store.append(space, pooled(range(3)))
    only_aws(monkeypatch, replace(swift, secret="another").environment(tmp_path))
    wrong, _ = opened(url, tmp_path / "wrong")
    clock = Pauses(monkeypatch)
    for act in (
        wrong.spaces,
        lambda: wrong.contains(space, ["text"]),
        lambda: write(wrong, space, range(3)),
        wrong.clear,
    ):
        start = clock.paused
        with pytest.raises(StoreAccessError) as caught:
            act()
        assert clock.paused == start, "nothing is tried twice"
        assert "another" not in str(caught.value)
    only_aws(monkeypatch, swift.environment(tmp_path))
    assert check_pooled(opened(url, tmp_path / "third")[0], space, range(3)).all()


def test_a_refusal_is_told_at_once_and_names_the_place(
    filled: str, moto: S3Server, tmp_path: Path, monkeypatch
) -> None:
    with FaultProxy(moto.endpoint) as proxy:
        only_aws(monkeypatch, replace(moto, endpoint=proxy.url).environment(tmp_path))
        store, space = opened(filled, tmp_path / "reader")
        with proxy.failing(Fault("deny")) as seen, pytest.raises(StoreAccessError, match=filled.split("/")[2]):
            store.spaces()
        assert len(seen) <= 2
        assert check_pooled(store, space, range(6)).all()


def test_without_credentials_a_private_bucket_is_refused(
    filled: str, moto: S3Server, tmp_path: Path, monkeypatch
) -> None:
    only_aws(monkeypatch, without_credentials(moto, tmp_path))
    clock = Pauses(monkeypatch)
    start = clock.paused
    with pytest.raises(StoreAccessError) as caught:
        opened(filled, tmp_path / "reader")[0].spaces()
    assert clock.paused == start, "nothing is tried twice"
    assert "credentials" in str(caught.value)


def test_no_such_bucket(filled: str, tmp_path: Path) -> None:
    store, space = opened("s3://no-such-bucket-as-this/x", tmp_path / "reader")
    with pytest.raises(ActCacheError, match="no-such-bucket-as-this"):
        store.spaces()
    with pytest.raises(ActCacheError, match="no-such-bucket-as-this"):
        write(store, space, range(2))


@pytest.fixture
def nobody(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a server that is not there, to which the environment leads."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    only_aws(monkeypatch, replace(moto, endpoint=url).environment(tmp_path))
    return url


def test_nobody_at_the_address(nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(ac.ObjectBackend("s3://bucket/x", deadline_s=2.0), index_dir=tmp_path / "index")
    clock = Pauses(monkeypatch)
    start = clock.paused
    with pytest.raises(BackendError, match=nobody):
        store.spaces()
    assert 0 < clock.paused - start < 2


def test_who_cannot_reach_the_place_is_told_before_anything_is_stored(
    nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with what to look at; a copy kept here, of which nobody speaks, would be sent some day after all."""
    Pauses(monkeypatch)
    url = "s3://bucket/x"
    store, space = opened(ac.ObjectBackend(url, deadline_s=2.0), tmp_path / "index")
    for act in (
        lambda: store.append(space, pooled(range(3))),
        lambda: store.write(ac.new_space("org/model"), ["a"], {"site": [vector(0, "site", 4)]}, pooling="mean"),
    ):
        with pytest.raises(BackendError) as caught:
            act()
        said = str(caught.value)
        assert said.startswith(f"nothing was stored in {url}: ") and nobody in said and "deadline_s=" in said
    with pytest.raises(BackendError), store.writer(space) as writer:
        writer.put(pooled(range(3)))
    assert not list(store.root.rglob("*.*"))
    store.close()


def test_somebody_who_never_answers(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        only_aws(
            monkeypatch, replace(moto, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}").environment(tmp_path)
        )
        backend = ac.ObjectBackend("s3://bucket/x", deadline_s=2.0, timeout_s=0.3)
        clock = Pauses(monkeypatch)
        start = clock.paused
        with pytest.raises(BackendError, match="no answer in time"):
            Store(backend, index_dir=tmp_path / "index").spaces()
        assert clock.paused - start < 2


def test_where_no_store_is_people_are_told_where_there_are_some(filled: str, cli: Cli) -> None:
    typo = filled.replace("shared", "shraed")
    said = f"nothing is stored at {typo}; in that bucket there is something at {filled}."
    for verb in ("info", "stats", "verify"):
        status, out, err = cli(verb, "--store", typo)
        assert (status, err) == (0, "") and said in out
    assert cli("clear", "--yes", "--store", typo) == (0, f"{said}\n", "")
    status, _, err = cli("list", "org/model", "--store", typo)
    assert status == 1 and "nothing is stored for 'org/model' at " in err and filled in err


def test_where_a_bucket_has_no_store_its_url_is_named(moto: S3Server, filled: str, cli: Cli) -> None:
    other = f"s3://{moto.make_bucket()}/shared"
    assert f"nothing is stored at {other}.\n" in cli("info", "--store", other)[1]


def test_what_of_a_bucket_are_stores() -> None:
    space = "0123456789abcdef" * 2
    stores = [f"a/b/v1/{space}/space.json", f"v1/{space}/{space}.safetensors", f"a/b/v1/{space}/{space}.tomb"]
    others = ["a/b/v1", f"c/v2/{space}/space.json", "d/v1/notes/space.json", f"e/v1/{space}/x/y", f"{space}/space.json"]
    assert stores_among([*others, *stores]) == ["a/b", ""]

"""What every backend of a store has to do, as tests: make a subclass and give it a fixture `backend`.

class TestMine(CacheBackendTests):
    @pytest.fixture
    def backend(self):
        return MyBackend(...)       # an empty place
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import OptionError
from actcache.store.backend import CacheBackend

BAD_NAMES = [
    "", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../a", "a/../b", "a/..", "./a", ".hidden", "a/.hidden", "a b",
    "ä", "a\\b", "a\n", "a\0", "a?b", "a%2e", "~", "C:", f"{'0' * 32}.tmp",
]  # fmt: skip
BAD_PREFIXES = ["a", "/", "a//", "../", "./", "a/../", ".hidden/", "a b/", "a/b"]


class CacheBackendTests:
    """Subclass it, and let a fixture `backend` give an empty place. Needs pytest, and hypothesis for one test.

    `second` may give another object for the same place. `big`: the bytes of a large object. `many`: how many objects a
    listing is tried with, more than a page of it has. `examples`: how many sequences of steps are compared with what a
    dictionary does.
    """

    big = 20 << 20
    many = 1100
    examples = 25

    def second(self, backend: CacheBackend) -> CacheBackend:
        """Another object for the place of `backend`, as another process would have it; by default the same."""
        return backend

    @pytest.fixture
    def backend(self) -> CacheBackend:
        raise NotImplementedError("give your subclass of CacheBackendTests a fixture `backend`")

    def test_what_is_put_is_read(self, backend: CacheBackend) -> None:
        data = os.urandom(1000)
        backend.put("v1/space/a.bin", data)
        assert bytes(backend.read("v1/space/a.bin")) == data

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, None), (0, 0), (0, 1), (0, 100), (0, 101), (0, 10**12), (1, None), (1, 1), (37, 61), (99, 100), (99, 500),
         (100, None), (100, 100), (100, 101), (250, None), (250, 300), (60, 40)],
    )  # fmt: skip
    def test_a_range_is_what_there_is_of_it(self, backend: CacheBackend, start: int, stop: int | None) -> None:
        data = bytes(range(100))
        backend.put("a", data)
        assert bytes(backend.read("a", start, stop)) == data[start:stop]

    @pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 0), (0, 10), (5, None), (5, 10)])
    def test_an_object_may_be_empty(self, backend: CacheBackend, start: int, stop: int | None) -> None:
        backend.put("v1/empty", b"")
        assert bytes(backend.read("v1/empty", start, stop)) == b""
        assert [(o.name, o.size) for o in backend.list()] == [("v1/empty", 0)]

    @pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 0), (0, 10), (5, None), (5, 10), (7, 3)])
    def test_what_is_not_there_is_not_found(self, backend: CacheBackend, start: int, stop: int | None) -> None:
        backend.put("v1/here", b"0123456789")
        for name in ("gone", "v1/gone", "v1", "v1/here/gone", "v1/her", "v1/here0"):
            with pytest.raises(FileNotFoundError):
                backend.read(name, start, stop)
        backend.delete("v1/here")
        with pytest.raises(FileNotFoundError):
            backend.read("v1/here", start, stop)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_kind_of_bytes_is_put(self, backend: CacheBackend, kind: Callable[[bytes], Any]) -> None:
        backend.put("a", kind(b"0123456789"))
        backend.put("b", kind(b""))
        assert (bytes(backend.read("a")), bytes(backend.read("b"))) == (b"0123456789", b"")

    def test_what_was_put_does_not_follow_its_source(self, backend: CacheBackend, tmp_path: Path) -> None:
        source, file = bytearray(b"0123456789"), tmp_path / "file"
        file.write_bytes(source)
        backend.put("a", source)
        backend.put("b", file)
        source[:] = b"x" * 10
        file.write_bytes(b"y" * 20)
        assert bytes(backend.read("a")) == bytes(backend.read("b")) == b"0123456789"

    def test_a_file_is_put(self, backend: CacheBackend, tmp_path: Path) -> None:
        full, empty = tmp_path / "full", tmp_path / "empty"
        full.write_bytes(os.urandom(100_000))
        empty.touch()
        backend.put("v1/full", full)
        backend.put("v1/empty", empty)
        assert bytes(backend.read("v1/full")) == full.read_bytes()
        assert bytes(backend.read("v1/empty")) == b""

    def test_a_file_that_is_not_there_is_not_put(self, backend: CacheBackend, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            backend.put("v1/a", tmp_path / "missing")
        assert list(backend.list()) == []

    def test_a_large_object_comes_back_whole_and_in_parts(self, backend: CacheBackend, tmp_path: Path) -> None:
        data = os.urandom(self.big)
        source = tmp_path / "big"
        source.write_bytes(data)
        backend.put("big", source)
        assert backend.read("big") == data
        middle = self.big // 3
        assert backend.read("big", middle, middle + (1 << 20)) == data[middle : middle + (1 << 20)]
        assert backend.read("big", middle) == data[middle:]
        assert [(o.name, o.size) for o in backend.list()] == [("big", self.big)]

    def test_the_same_bytes_may_be_put_again(self, backend: CacheBackend) -> None:
        for _ in range(3):
            backend.put("v1/a", b"0123456789")
            assert bytes(backend.read("v1/a")) == b"0123456789"
        assert [(o.name, o.size) for o in backend.list()] == [("v1/a", 10)]

    def test_a_name_is_free_again_after_delete(self, backend: CacheBackend) -> None:
        backend.put("v1/a", b"0123456789")
        backend.delete("v1/a")
        backend.put("v1/a", b"0123456789")
        assert bytes(backend.read("v1/a", 2, 4)) == b"23"

    def test_deleting_what_is_not_there_does_nothing(self, backend: CacheBackend) -> None:
        backend.delete("v1/a")
        backend.put("v1/a/b", b"0")
        backend.delete("v1/a")
        backend.delete("v1")
        backend.delete("v1/a/b/c")
        assert [o.name for o in backend.list()] == ["v1/a/b"]
        backend.delete("v1/a/b")
        backend.delete("v1/a/b")
        assert list(backend.list()) == []

    def test_a_list_has_what_is_below_a_prefix(self, backend: CacheBackend) -> None:
        sizes = {"v1/a/x": 1, "v1/a/y": 2, "v1/ab/x": 3, "v1/a.b": 4, "v1/b": 5, "v1x/a": 6, "z": 7, "v1/a/z/deep": 8}
        for name, size in sizes.items():
            backend.put(name, b"0" * size)
        for prefix in ("", "v1/", "v1/a/", "v1/ab/", "v1/a/z/", "v1x/", "z/", "v/", "v1/a/x/", "v2/", "v1/a/z/deep/"):
            listed = [(o.name, o.size) for o in backend.list(prefix)]
            assert sorted(listed) == sorted((n, s) for n, s in sizes.items() if n.startswith(prefix)), prefix

    def test_a_list_has_every_object_once(self, backend: CacheBackend) -> None:
        names = {f"v1/{i:04x}/{i % 7}.bin" for i in range(self.many)}
        with ThreadPoolExecutor(backend.concurrency) as pool:
            list(pool.map(lambda name: backend.put(name, name.encode()), sorted(names)))
        listed = [o.name for o in backend.list("v1/")]
        assert len(listed) == len(names) and set(listed) == names

    def test_a_list_tells_when_an_object_was_put_or_does_not(self, backend: CacheBackend) -> None:
        backend.put("a", b"0")
        (found,) = backend.list()
        assert found.modified_ns == 0 or abs(found.modified_ns - time.time_ns()) < 24 * 3600 * 10**9

    def test_what_is_put_is_there_for_others(self, backend: CacheBackend) -> None:
        other = self.second(backend)
        assert (other.url, other.identity) == (backend.url, backend.identity)
        backend.put("v1/a", b"0123456789")
        assert bytes(other.read("v1/a", 3, 6)) == b"345"
        assert [(o.name, o.size) for o in other.list("v1/")] == [("v1/a", 10)]
        other.delete("v1/a")
        with pytest.raises(FileNotFoundError):
            backend.read("v1/a")

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_a_name_that_is_none_is_refused(self, backend: CacheBackend, name: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: backend.read(name), lambda: backend.read(name, 0, 0), lambda: backend.put(name, b"0"),
            lambda: backend.delete(name),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(OptionError):
                call()
        assert list(backend.list()) == []

    @pytest.mark.parametrize("prefix", BAD_PREFIXES)
    def test_a_prefix_that_is_none_is_refused(self, backend: CacheBackend, prefix: str) -> None:
        with pytest.raises(OptionError):
            list(backend.list(prefix))

    @pytest.mark.parametrize(
        "name", ["a", "-", "_", "0", "a.b.c", "a..", "-a/_b/c-.d_", "x" * 200, "A/B", "a/b/c/d/e/f"]
    )
    def test_every_name_is_taken(self, backend: CacheBackend, name: str) -> None:
        backend.put(name, name.encode())
        assert bytes(backend.read(name)) == name.encode()
        assert [o.name for o in backend.list()] == [name]
        backend.delete(name)
        assert list(backend.list()) == []

    def test_it_has_a_url(self, backend: CacheBackend) -> None:
        assert isinstance(backend.url, str) and backend.url
        assert isinstance(backend.identity, str) and backend.identity
        assert backend.url == backend.url and backend.identity == backend.identity
        assert backend.concurrency >= 1

    def test_threads_share_it(self, backend: CacheBackend) -> None:
        shared = os.urandom(300_000)
        backend.put("v1/shared", shared)

        def work(number: int) -> None:
            own = os.urandom(10_000)
            for turn in range(4):
                name = f"v1/{number}/{turn}"
                backend.put(name, own)
                assert bytes(backend.read(name, 100, 200)) == own[100:200]
                at = 1000 * number + turn
                assert bytes(backend.read("v1/shared", at, at + 5000)) == shared[at : at + 5000]
                assert {o.name for o in backend.list(f"v1/{number}/")} == {name}
                backend.delete(name)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(16)))
        assert [o.name for o in backend.list()] == ["v1/shared"]

    def test_a_reader_sees_all_of_an_object_or_nothing(self, backend: CacheBackend) -> None:
        data, other = os.urandom(1 << 20), self.second(backend)
        stop, seen = threading.Event(), [0]
        wrong: list[int] = []

        def watch() -> None:
            while not stop.is_set():
                wrong.extend(o.size for o in other.list("v1/") if o.size != len(data))
                try:
                    found = other.read("v1/a")
                except FileNotFoundError:
                    continue
                seen[0] += 1
                if found != data:
                    wrong.append(len(found))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            for _ in range(10):
                backend.put("v1/a", data)
                backend.put("v1/a", data)
                backend.delete("v1/a")
            backend.put("v1/a", data)
            deadline = time.monotonic() + 30
            while not seen[0] and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            stop.set()
            thread.join()
        assert seen[0] and not wrong

    def test_many_may_put_the_same_object_at_once(self, backend: CacheBackend) -> None:
        data = os.urandom(200_000)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: backend.put("v1/a", data), range(16)))
        assert backend.read("v1/a") == data
        assert [(o.name, o.size) for o in backend.list()] == [("v1/a", len(data))]

    def test_it_behaves_like_a_dictionary(self, backend: CacheBackend) -> None:
        pytest.importorskip("hypothesis")
        from actcache.testing.backend_machine import like_a_dictionary

        like_a_dictionary(backend, self.second(backend), examples=self.examples)

    def test_a_store_lies_there(self, backend: CacheBackend, tmp_path: Path) -> None:
        import torch

        from actcache.store.spaces import new_space
        from actcache.store.store import Store

        def host(name: str) -> Store:
            """The store as a machine of that name has it, which knows nothing of the others."""
            return Store(self.second(backend), index_dir=tmp_path / name)

        space = new_space("org/model", revision="r1")
        prompts = [f"prompt {number}" for number in range(60)]
        values = {site: torch.randn(60, 48) for site in ("resid_post.0", "resid_post.1")}
        with host("writer") as writer:
            for part in (slice(0, 40), slice(40, 60)):
                rows = {site: list(data[part]) for site, data in values.items()}
                writer.write(space, prompts[part], rows, pooling="last_token")
        reader = host("reader")
        order = torch.randperm(60)
        for site, data in values.items():
            found = reader.read(space, [prompts[i] for i in order], site, pooling="last_token")
            assert torch.equal(found, data[order])
        assert reader.verify().ok
        assert host("other").invalidate(space, prompts[:7]) == 7
        reader.refresh()
        assert reader.contains(space, prompts).tolist() == [False] * 7 + [True] * 53
        assert torch.equal(
            host("late").read(space, prompts[7:], "resid_post.1", pooling="last_token"), values["resid_post.1"][7:]
        )
        host("last").clear()
        reader.refresh()
        assert not reader.contains(space, prompts).any()
        assert list(backend.list()) == []

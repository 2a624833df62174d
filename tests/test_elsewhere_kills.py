"""Machines that share objects, and processes that share a working copy, killed at any instant or at work at once."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.store.store import Store
from elsewhere import Folder, Watched, killing, machine, objects
from store_helpers import check_pooled, growing_writer, in_child, kill, make_table, pooled, wait_for

GB = 2**30


class Diary:
    """What a process that may be killed has begun and finished, in a file that survives it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, what: str, numbers: list[int], work: Callable[[], object]) -> None:
        self._note("begin", what, numbers)
        work()
        self._note("end", what, numbers)

    def _note(self, state: str, what: str, numbers: list[int]) -> None:
        line = f"{state} {what} {' '.join(map(str, numbers))}\n".encode()
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, line)
        os.close(fd)

    def told(self) -> tuple[set[int], set[int]]:
        """The prompts that must be there, and those that must not. Of what was only begun nothing is known."""
        must: set[int] = set()
        gone: set[int] = set()
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            state, what, *rest = line.split()
            numbers = set(map(int, rest))
            if what == "store":
                # Stored again after it was invalidated, or at least begun: both may be.
                gone -= numbers
                must |= numbers if state == "end" else set()
            else:
                must -= numbers
                gone |= numbers if state == "end" else set()
        return must, gone


def life(store: Store, space: str, diary: Diary) -> None:
    """Everything that changes objects or files, once."""

    def write(numbers: list[int]) -> None:
        diary("store", numbers, lambda: store.append(space, pooled(numbers)))

    def invalidate(numbers: list[int]) -> None:
        diary("drop", numbers, lambda: store.invalidate(space, make_table(numbers)))

    write([0, 1, 2, 3])
    store.flush()
    write([4, 5])
    invalidate([1, 4])
    write([6, 7])
    store.flush()
    grown = growing_writer(store, space)
    for numbers in ([8, 9], [10, 11]):
        diary("store", numbers, lambda numbers=numbers: grown.append([pooled(numbers)]))
    invalidate([9])
    grown.finish(merge=True)
    store.flush()
    write([12, 13])
    store.compact()
    invalidate([6, 12])
    write([1])
    store.compact()
    store.close()


def look(folder: Path, backend: Folder, space: str, diary: Diary) -> None:
    """The host that lost a process, and others, before and after what was left is uploaded."""
    must, gone = diary.told()
    numbers = range(14)

    def found(store: Store) -> set[int]:
        store.refresh()
        return {i for i, there in enumerate(check_pooled(store, space, numbers)) if there}

    other = machine(backend, folder / "b")[0]
    if objects(backend):
        assert not found(other) & gone
    again, _ = machine(backend, folder / "a")
    seen = found(again)
    assert seen >= must, must - seen
    assert not seen & gone
    again.flush()
    for store in (again, other, machine(backend, folder / "c")[0]):
        assert found(store) == seen
        assert store.verify().damaged == []
    assert not [f for f in again.root.rglob("*") if f.suffix in (".sent", ".open", ".tmp")]
    again.compact()
    assert found(other) == seen
    assert len(objects(backend)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_a_process_killed_at_any_request_loses_nothing(tmp_path: Path, late: bool) -> None:
    for at in range(1, 60):
        folder = tmp_path / str(at)
        backend = Folder(folder / "objects")
        diary = Diary(folder / "diary")
        folder.mkdir()

        def work(folder: Path = folder, backend: Folder = backend, diary: Diary = diary, at: int = at) -> None:
            watched = Watched(backend)
            if late:
                watched.after = killing(at)
            else:
                watched.before = killing(at)
            life(*machine(watched, folder / "a"), diary)

        code = wait_for(in_child(work))
        assert code in (0, -9)
        look(folder, backend, machine(backend, folder / "d")[1], diary)
        if code == 0:
            assert at > 8
            break
    else:
        raise AssertionError("never done")


@pytest.mark.slow
def test_processes_of_one_host_share_a_working_copy(tmp_path: Path) -> None:
    """Each writes, uploads, merges and invalidates its own prompts; what any of them has finished holds for all."""
    backend = Folder(tmp_path / "objects")

    def work(k: int) -> None:
        rng = random.Random(k)
        store, space = machine(backend, tmp_path / ("a" if k < 2 else "b"))
        mine: set[int] = set()
        for step in range(14):
            numbers = [100 * k + rng.randrange(40) for _ in range(3)]
            done = rng.randrange(5)
            if done == 0 and mine:
                victim = rng.choice(sorted(mine))
                store.invalidate(space, make_table([victim]))
                mine.discard(victim)
            elif done == 1:
                with store.writer(space, linger=0) as writer:
                    for i in numbers:
                        writer.put(pooled([i]))
                        writer.flush()
                mine |= set(numbers)
            else:
                store.append(space, pooled(sorted(set(numbers))))
                mine |= set(numbers)
            if step % 4 == k % 4:
                store.flush()
            if step % 5 == k % 5:
                store.compact()
            every = range(100 * k, 100 * k + 40)
            there = {i for i, found in zip(every, check_pooled(store, space, every), strict=True) if found}
            assert there == mine, (k, step, there ^ mine)
        store.close()
        (tmp_path / f"mine {k}").write_text(" ".join(map(str, sorted(mine))))

    children = [in_child(lambda k=k: work(k)) for k in range(4)]  # type: ignore[misc]
    assert [wait_for(child) for child in children] == [0] * 4
    expected = {int(i) for k in range(4) for i in (tmp_path / f"mine {k}").read_text().split()}
    for name in "abc":
        store, space = machine(backend, tmp_path / name)
        store.refresh()
        found = check_pooled(store, space, range(400))
        assert {i for i in range(400) if found[i]} == expected
        assert store.verify().damaged == []
    assert store.compact() >= 0
    assert {i for i in range(400) if check_pooled(store, space, range(400))[i]} == expected


def test_evicting_machines_leave_what_is_right(tmp_path: Path) -> None:
    """Two evict, one writes: whatever is left, all see the same, and what was written last is there."""
    backend = Folder(tmp_path / "objects")

    def writing(k: int) -> None:
        store, space = machine(backend, tmp_path / str(k))
        for step in range(12):
            store.append(space, pooled(range(1000 * k + 20 * step, 1000 * k + 20 * step + 20)))
            store.flush()
            if k != 1:
                store.evict(60_000 / GB)
        if k == 1:
            (tmp_path / "done").touch()
        store.close()

    children = [in_child(lambda k=k: writing(k)) for k in range(3)]  # type: ignore[misc]
    assert [wait_for(child) for child in children] == [0] * 3
    seen = []
    for name in ("0", "1", "fresh"):
        store, space = machine(backend, tmp_path / name)
        store.refresh()
        seen.append(check_pooled(store, space, range(3000)).tolist())
        assert store.verify().damaged == []
    assert seen[0] == seen[1] == seen[2]
    report = store.evict(30_000 / GB)
    assert report.bytes_kept <= 30_000
    assert sum(info.size for info in backend.list()) == report.bytes_kept


@pytest.mark.slow
def test_hosts_killed_at_random_lose_nothing(tmp_path: Path) -> None:
    """Two processes of one host and one of another, each killed again and again; each keeps a diary of its own."""
    backend = Folder(tmp_path / "objects")
    rng = random.Random(6)

    def work(k: int, life_number: int) -> None:
        diary = Diary(tmp_path / f"diary {k}")
        mine = random.Random(1000 * k + life_number)
        store, space = machine(backend, tmp_path / ("a" if k < 2 else "b"))
        while True:
            numbers = [100 * k + mine.randrange(60) for _ in range(3)]
            done = mine.randrange(8)
            if done == 0:
                diary("drop", numbers, lambda n=numbers: store.invalidate(space, make_table(n)))  # type: ignore[misc]
            elif done == 1:
                store.flush()
            elif done == 2:
                store.compact()
            elif done == 3:
                with store.writer(space, linger=0) as writer:
                    for i in numbers:

                        def put(i: int = i) -> None:
                            writer.put(pooled([i]))
                            writer.flush()

                        diary("store", [i], put)
            else:
                distinct = sorted(set(numbers))
                diary("store", distinct, lambda n=distinct: store.append(space, pooled(n)))  # type: ignore[misc]

    until = time.monotonic() + 120
    children = {k: in_child(lambda k=k: work(k, 0)) for k in range(3)}  # type: ignore[misc]
    lives = 0
    while time.monotonic() < until:
        time.sleep(rng.uniform(0.05, 1.5))
        k = rng.randrange(3)
        kill(children[k])
        lives += 1
        children[k] = in_child(lambda k=k, lives=lives: work(k, lives))  # type: ignore[misc]
    for child in children.values():
        kill(child)
    for name in ("a", "b"):
        store, space = machine(backend, tmp_path / name)
        store.flush()
    told = [Diary(tmp_path / f"diary {k}").told() for k in range(3)]
    must, gone = (set().union(*parts) for parts in zip(*told, strict=True))
    seen = []
    for name in ("a", "b", "c"):
        store, space = machine(backend, tmp_path / name)
        store.refresh()
        seen.append({i for i, there in enumerate(check_pooled(store, space, range(300))) if there})
        assert store.verify().damaged == []
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] >= must, must - seen[0]
    assert not seen[0] & gone, seen[0] & gone
    assert lives > 50

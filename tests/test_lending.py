"""Batches of DataLoader workers: in memory that serves again, and never while somebody looks at it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from actcache.stream.lending import Lent, lent

ROWS, WIDTH = 32, 48


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def values(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((ROWS, WIDTH), number, dtype=dtype)


class Numbers(IterableDataset[Any]):
    """Batch `i` is full of `i`, times two in bfloat16 and named."""

    def __init__(self, count: int, twice: bool = False, last: int = ROWS) -> None:
        self.count, self.twice, self.last = count, twice, last

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for number in range(start, self.count, step):
            rows = self.last if number == self.count - 1 else ROWS
            batch = {"a": values(number)[:rows], "b": values(2 * number, torch.bfloat16)[:rows]}
            made = lent((batch, Pair(torch.tensor([number]), torch.empty(0, 3))))
            yield made
            if self.twice:
                yield made


def loader(dataset: Numbers, workers: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


def check(found: Any, number: int, rows: int = ROWS) -> None:
    batch, pair = found
    assert type(batch["a"]) is torch.Tensor and type(pair).__name__ == "Pair"
    assert torch.equal(batch["a"], values(number)[:rows])
    assert batch["b"].dtype == torch.bfloat16 and torch.equal(batch["b"], values(2 * number, torch.bfloat16)[:rows])
    assert pair.first.tolist() == [number] and pair.second.shape == (0, 3)


@pytest.mark.parametrize("persistent", [False, True])
def test_blocks_serve_again(persistent: bool) -> None:
    batches = loader(Numbers(60), persistent_workers=persistent)
    for _ in range(2):
        places = set()
        for number, found in enumerate(batches):
            check(found, number)
            places.add(found[0]["a"].data_ptr())
        assert number == 59
        # Two workers with two batches ahead each, and those on their way and in hand.
        assert len(places) <= 12


def test_batches_that_are_kept_keep_their_values() -> None:
    kept = list(loader(Numbers(40, last=3)))
    for number, found in enumerate(kept):
        check(found, number, 3 if number == 39 else ROWS)


def test_a_view_keeps_its_block() -> None:
    rows, rest = [], []
    for number, found in enumerate(loader(Numbers(40), workers=1)):
        rows.append(found[0]["a"][number % ROWS, 5:9])
        rest.append(found[0]["a"].T.numpy())
        del found
    for number, (row, numpy) in enumerate(zip(rows, rest, strict=True)):
        assert row.tolist() == [number] * 4 and (numpy == number).all()


def test_a_batch_is_the_receivers_to_change() -> None:
    for number, found in enumerate(loader(Numbers(30))):
        check(found, number)
        found[0]["a"].fill_(-1)


def test_what_is_sent_twice_is_two() -> None:
    batches = iter(loader(Numbers(12, twice=True), workers=1, prefetch_factor=4))
    for number, (one, other) in enumerate(zip(batches, batches, strict=True)):
        one[0]["a"].fill_(-1)
        check(other, number)
        del one
        check(other, number)


def test_a_child_of_the_receiver_may_go_on_looking() -> None:
    batches = iter(loader(Numbers(40), workers=1))
    held = next(batches)
    there, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.read(there[0], 1)
            check(held, 0)
            # What it inherited is not its own to give back.
            del held
            gc.collect()
            status = 0
        finally:
            os.write(done[1], b"x")
            os._exit(status)
    again = held[0]["a"].data_ptr()
    del held
    later = [next(batches) for _ in range(10)]
    assert again not in {found[0]["a"].data_ptr() for found in later}
    os.write(there[1], b"x")
    assert os.waitpid(pid, 0)[1] == 0
    for number, found in enumerate(later, 1):
        check(found, number)
    for fd in (*there, *done):
        os.close(fd)


def test_a_worker_may_keep_what_it_has_made() -> None:
    """A dataset around the stream that looks back at the batches before."""

    class Back(Numbers):
        def __iter__(self) -> Iterator[Any]:
            before: list[torch.Tensor] = []
            for batch, _ in super().__iter__():
                before.append(batch["a"])
                assert all(torch.equal(old, values(i)) for i, old in enumerate(before))
                yield batch["a"]

    for number, found in enumerate(loader(Back(30), workers=1)):
        assert torch.equal(found, values(number))


def test_what_a_worker_computes_of_one_is_an_ordinary_tensor() -> None:
    made = lent(values(3))
    assert type(made) is Lent and type(made + 1) is torch.Tensor and torch.equal(made * 2, values(6))
    assert type(made.float()) is torch.Tensor or made.float() is made


@pytest.mark.slow
def test_spawned_workers() -> None:
    for number, found in enumerate(loader(Numbers(9), multiprocessing_context="spawn")):
        check(found, number)


@pytest.mark.slow
def test_a_loader_that_is_left_early_leaves_no_block_behind() -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("actcache-" in line for line in maps)

    def first() -> None:
        for number, found in enumerate(loader(Numbers(40))):
            check(found, number)
            if number == 6:
                return

    first()
    before = mapped()
    for _ in range(5):
        first()
        gc.collect()
    assert mapped() <= before + 24, "blocks of workers that have ended are let go when others come"

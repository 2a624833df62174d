"""Streams that go on: from a state, in workers, in ranks, and in two processes."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import actcache as ac
from store_helpers import SITES, every_token, make_store, make_table, segment_files
from stream_helpers import ALL, SITE, stream_of, streamed, taken


@pytest.fixture(autouse=True)
def _forks() -> Iterator[None]:
    with warnings.catch_warnings():
        # From Python 3.12 a fork beside idle threads of a numerical library warns.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ac.Store, str]:
    return streamed(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("place", [0, 1, 7, 23, 24, 30])
def test_a_state_goes_on_at_the_exact_batch(made: tuple[ac.Store, str], place: int, prefetch: int) -> None:
    stream = stream_of(made, batch_size=10, prefetch=prefetch)
    assert len(stream) == 24
    through = stream_of(made, batch_size=10)
    everything = [batch for _ in range(3) for batch, _ in through]

    def endless() -> Iterator[Any]:
        while True:
            yield from stream

    first = list(itertools.islice(endless(), place))
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    other = stream_of(made, batch_size=10)
    other.load_state_dict(state)
    rest = [batch for batch, _ in other] + [batch for batch, _ in other]
    assert len(first) + len(rest) in (2 * 24, 3 * 24)
    for got, wanted in zip([*(batch for batch, _ in first), *rest], everything, strict=False):
        assert torch.equal(got, wanted)


def test_a_state_of_another_stream_is_refused(made: tuple[ac.Store, str], tmp_path: Path) -> None:
    state = stream_of(made).state_dict()
    for name, value in {"seed": 3, "batch_size": 8, "shuffle": False, "drop_last": True}.items():
        with pytest.raises(ac.errors.OptionError, match=f"{name}="):
            stream_of(made, **{name: value}).load_state_dict(state)
    with pytest.raises(ac.errors.OptionError, match="world_size=1"):
        stream_of(made, rank=0, world_size=2).load_state_dict(state)
    with pytest.raises(ac.errors.OptionError, match="prompts"):
        stream_of(made, exclude="first").load_state_dict(state)
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(59)))
    with pytest.raises(ac.errors.OptionError, match="60 prompts"):
        stream_of((store, space)).load_state_dict(state)


def test_what_is_no_state_is_refused(made: tuple[ac.Store, str]) -> None:
    state = stream_of(made).state_dict()
    (source,) = state["sources"]
    for wrong in (
        None, {}, [state], {**state, "batches": -3}, {**state, "batches": "4"}, {**state, "epoch": -1},
        {**state, "epoch": 1.5}, {**state, "sources": 5}, {**state, "sources": [{}]},
        {**state, "sources": [{**source, "prompts": 10**6, "pieces": [[1, "zz", "00"]]}]},
        {**state, "sources": [{**source, "digest": "00" * 16, "pieces": [[1, "00", "00"]]}]},
        {**state, "sources": [{**source, "prompts": True}]},
    ):  # fmt: skip
        stream = stream_of(made)
        with pytest.raises(ac.errors.OptionError):
            stream.load_state_dict(wrong)  # type: ignore[arg-type]
        assert sorted(taken(stream)) == ALL
    # Pieces that lie nowhere, or of which one has another content.
    for pieces in ([[1, "00" * 8, "00" * 8]], [[59, source["pieces"][0][1], "00" * 8]], []):
        with pytest.raises(ac.errors.OptionError, match="not all among"):
            stream_of(made).load_state_dict({**state, "sources": [{**source, "digest": "00" * 16, "pieces": pieces}]})


def test_a_state_goes_on_where_more_has_been_stored_since(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    stream = stream_of((store, space))
    batches = iter(stream)
    first, state, rest = next(batches), stream.state_dict(), list(batches)
    store.append(space, every_token(range(30, 60)))
    other = stream_of((store, space))
    other.load_state_dict(state)
    got = list(other)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, rest, strict=True))
    assert sorted(taken(other, [first, *got])) == [token for token in ALL if token[0] < 30]


def test_a_state_goes_on_after_a_merge(tmp_path: Path) -> None:
    """Segments of one signature are merged past another, so that prompts come in another order than before."""
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(20), SITES[:1]))
    store.append(space, every_token(range(20, 40)))
    store.append(space, every_token([*range(40, 60), 3], SITES[:1]))
    stream, other = stream_of((store, space)), stream_of((store, space), shuffle=False, exclude="first")
    wanted, plain = taken(stream), taken(other)
    stream = stream_of((store, space))
    first = list(itertools.islice(stream, 4))
    state, of_other = json.loads(json.dumps(stream.state_dict())), other.state_dict(batches=2)
    assert len(json.dumps(state)) < 1000
    before = store.common_prompts(space, [SITE]).token_key.tobytes()
    store.compact()
    assert len(segment_files(store, space)) == 2
    assert store.common_prompts(space, [SITE]).token_key.tobytes() != before
    store.append(space, every_token([1000]))
    again = stream_of((store, space))
    again.load_state_dict(state)
    assert again.num_tokens == len(ALL)
    assert taken(stream, first) + taken(again) == wanted
    assert sorted(taken(again)) == ALL
    # What was gone on with can be gone on with again.
    third = stream_of((store, space))
    third.load_state_dict({**again.state_dict(), "epoch": 0, "batches": 4})
    assert taken(third) == wanted[4 * 16 :]
    again = stream_of((store, space), shuffle=False, exclude="first")
    again.load_state_dict(of_other)
    assert taken(again) == plain[2 * 16 :]
    # One of the prompts is no longer there, though as many are.
    store.invalidate(space, [make_table([7]).text_of(0)])
    with pytest.raises(ac.errors.OptionError, match="removed or stored anew"):
        stream_of((store, space)).load_state_dict(state)


def loader(stream: ac.ActivationStream, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(stream, batch_size=None, num_workers=workers, **options)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_what_one_process_gives(made: tuple[ac.Store, str], persistent: bool) -> None:
    alone = stream_of(made)
    wanted = [taken(alone) for _ in range(3)]
    stream = stream_of(made)
    batches = loader(stream, 2, persistent_workers=persistent)
    assert len(batches) == len(stream)
    assert [taken(stream, batches) for _ in range(3)] == wanted


def test_workers_go_on_where_another_number_of_them_stood(made: tuple[ac.Store, str]) -> None:
    alone = stream_of(made)
    wanted = taken(alone) + taken(alone)
    stream = stream_of(made)
    first = list(itertools.islice(loader(stream, 2), 5))
    with pytest.raises(ac.errors.OptionError, match="batches="):
        stream.state_dict()
    state = stream.state_dict(batches=5)
    for workers in (0, 1):
        other = stream_of(made)
        other.load_state_dict(copy.deepcopy(state))
        rest = taken(other, loader(other, workers)) + taken(other, loader(other, 2))
        assert taken(stream, first) + rest == wanted


def _asked(_: int) -> None:
    torch.utils.data.get_worker_info().dataset.state_dict(batches=1)


def test_workers_say_nothing_of_where_it_stands(made: tuple[ac.Store, str]) -> None:
    """Each knows of its own batches alone, so that what goes by its state would give some twice."""
    stream = stream_of(made)
    batches = iter(loader(stream, 2, worker_init_fn=_asked))
    with pytest.raises(ac.errors.OptionError, match="in the process that made the loader"):
        list(batches)
    # The error holds the loader and its other worker for a while.
    batches._shutdown_workers()
    assert stream.state_dict()["batches"] == 0


def test_workers_that_persist_do_not_go_on_elsewhere(made: tuple[ac.Store, str]) -> None:
    """They have the stream as it was when they began."""
    stream = stream_of(made)
    batches = loader(stream, 1, persistent_workers=True)
    first = taken(stream, batches)
    state = stream.state_dict(batches=2)
    stream.load_state_dict(state)
    with pytest.raises(ac.errors.OptionError, match="make a new DataLoader"):
        list(batches)
    rest = taken(stream, loader(stream, 1))
    assert rest == first[32:]


def test_ranks_share_an_epoch(made: tuple[ac.Store, str]) -> None:
    for world in (2, 3):
        parts = [taken(s) for s in (stream_of(made, rank=r, world_size=world) for r in range(world))]
        assert sorted(token for part in parts for token in part) == ALL
        lengths = [len(stream_of(made, rank=r, world_size=world)) for r in range(world)]
        assert sum(lengths) == len(stream_of(made))
        even = [len(list(stream_of(made, rank=r, world_size=world, drop_last=True))) for r in range(world)]
        assert set(even) == {len(ALL) // 16 // world}
    with pytest.raises(ac.errors.OptionError, match="world_size"):
        stream_of(made, rank=2, world_size=2)


def test_ranks_come_from_the_environment(made: tuple[ac.Store, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        stream = stream_of(made)
        found += taken(stream, loader(stream, 2))
    assert sorted(found) == ALL


def test_a_stream_is_pickled_by_its_place(made: tuple[ac.Store, str]) -> None:
    stream = stream_of(made, exclude=[0])
    data = pickle.dumps(stream)
    other = pickle.loads(data)
    assert taken(other) == taken(stream)
    big = len(pickle.dumps(stream_of(made)._parts[0]))
    assert big < 60 * 16 + 1000


@pytest.mark.slow
def test_two_processes_share_an_epoch(made: tuple[ac.Store, str], tmp_path: Path) -> None:
    """Ranks of a process group, each with a worker that is started anew."""
    store, space = made
    script = Path(__file__).with_name("stream_rank.py")
    outs = [tmp_path / f"{rank}.json" for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meeting"), str(store.location),
             str(store.index_dir), space, SITE, str(out)]
        )
        for rank, out in enumerate(outs)
    ]  # fmt: skip
    try:
        assert [process.wait(timeout=180) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    parts = [json.loads(out.read_text()) for out in outs]
    whole = stream_of(made)
    prompts = [int(whole.prompts.tokens(i)[0]) for i in range(len(whole.prompts))]
    assert sorted((prompts[p], q) for found, _ in parts for p, q in found) == ALL
    assert sum(length for _, length in parts) == len(whole)

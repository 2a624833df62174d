"""What networks and services do to a store in a bucket: right or a clear error, never wrong, never a part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.errors import ActCacheError, BackendError, StoreAccessError
from actcache.store.store import Store
from bucket_helpers import Pauses, opened
from fault_proxy import Fault, FaultProxy
from servers import S3Server, only_aws
from store_helpers import SITES, check_pooled, make_table, pooled, vector

PASSING = ("slow_down", "error", "cut", "lose", "stall")
"""Ways to fail that are over when the same thing is tried again."""
FEW = ["cut"] + [pytest.param(way, marks=pytest.mark.slow) for way in PASSING if way != "cut"]
"""The same; not all of them when time is short."""
WHAT = {
    "list": (("list",), "*"),
    "head": (("head",), "*.safetensors"),
    "rows": (("range",), "*.safetensors"),
    "tomb": ((), "*.tomb"),
    "space": ((), "*/space.json"),
    "put": (("put",), "*"),
    "delete": (("delete",), "*"),
}
"""Requests that can fail, by their kinds and the names of objects."""
READS = ["list", "head", "rows", "tomb", "space"]
DEADLINE_S, TIMEOUT_S = 2.0, 0.7
"""How patient machines are at moto."""
WIDE = 8
ALWAYS = 10**6
OLD = range(12)
_fresh = count()
LAYOUT = "last_token"


@dataclass
class Cluster:
    """Machines at one bucket, behind one proxy. Prompts `OLD` are in it, in two segments, one of them forgotten."""

    proxy: FaultProxy
    url: str
    folder: Path
    slowness: float
    clock: Pauses

    @property
    def deadline_s(self) -> float:
        return self.slowness * DEADLINE_S

    def machine(self, name: str, *, patient: bool = False) -> tuple[Store, str]:
        timeout_s = self.slowness * TIMEOUT_S
        backend = ac.ObjectBackend(self.url, deadline_s=self.deadline_s, timeout_s=timeout_s)
        return opened(ac.ObjectBackend(self.url) if patient else backend, self.folder / name)

    def fault(self, way: str, what: str, times: float) -> Fault:
        kinds, name = WHAT[what]
        if way == "stall":
            # Each try takes its time; without it tries would go on until the first one is let through.
            self.clock.run()
        return Fault(way, kinds, name, times=times, seconds=10 if times > 1 else 2 * self.slowness * TIMEOUT_S)

    def all_is_well(self, *others: tuple[Store, str], there: range = OLD, gone: tuple[int, ...] = (5,)) -> None:
        """Every machine, also a new one, finds exactly the prompts that are `there`, right to the last bit."""
        self.proxy.fail()
        for store, space in (*others, self.machine(f"fresh {next(_fresh)}", patient=True)):
            store.refresh()
            found = check_pooled(store, space, range(there.stop + 3))
            assert np.flatnonzero(found).tolist() == [n for n in there if n not in gone]
            assert store.verify().ok


@pytest.fixture
def cluster(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with FaultProxy(server.endpoint) as proxy:
        only_aws(monkeypatch, replace(server, endpoint=proxy.url).environment(tmp_path))
        slowness = 4.0 if server.key == "test:tester" else 1.0
        url = f"s3://{server.make_bucket()}/lab"
        cluster = Cluster(proxy, url, tmp_path, slowness, Pauses(monkeypatch))
        store, space = cluster.machine("writer", patient=True)
        with store:
            for numbers in (OLD[:6], OLD[6:]):
                store.append(space, pooled(numbers))
                store.flush()
            store.invalidate(space, make_table([5]))
        yield cluster


# -- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("way", FEW)
def test_what_passes_is_not_noticed_by_who_reads(cluster: Cluster, kind: str, way: str) -> None:
    store, space = cluster.machine("reader")
    with cluster.proxy.failing(cluster.fault(way, kind, 1)):
        assert store.spaces()[0].num_prompts == len(OLD) - 1
        assert check_pooled(store, space, range(14)).tolist() == [n != 5 and n < 12 for n in range(14)]
    cluster.all_is_well((store, space))


@pytest.mark.slow
@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("way", [*PASSING, "deny"])
def test_what_stays_is_an_error_in_time_for_who_reads(cluster: Cluster, kind: str, way: str) -> None:
    store, space = cluster.machine("reader")
    start = cluster.clock.paused
    refused = StoreAccessError if way == "deny" else BackendError
    with cluster.proxy.failing(cluster.fault(way, kind, ALWAYS)) as seen, pytest.raises(refused) as caught:
        check_pooled(store, space, OLD)
    assert cluster.clock.paused - start < (0.001 if way == "deny" else cluster.deadline_s)
    assert cluster.url.split("/")[2] in str(caught.value)
    if way == "deny":
        assert sum(request.way == "deny" for request in seen) <= 16, "who is refused does not try again"
    cluster.all_is_well((store, space))


def test_an_object_that_is_gone_is_a_miss(cluster: Cluster) -> None:
    store, space = cluster.machine("reader")
    assert store.contains(space, make_table(OLD), SITES[0], pooling=LAYOUT).sum() == 11
    # All reads of rows say so; the listing goes on showing it.
    with cluster.proxy.failing(cluster.fault("missing", "rows", ALWAYS)):
        assert not check_pooled(store, space, OLD).any()
    cluster.all_is_well((store, space))


@pytest.mark.parametrize("kind", ["head", "tomb", "space"])
def test_an_object_that_is_listed_and_gone_is_a_miss(cluster: Cluster, kind: str) -> None:
    store, space = cluster.machine("reader")
    with cluster.proxy.failing(cluster.fault("missing", kind, ALWAYS)):
        found = check_pooled(store, space, range(14))
    assert not found[12:].any()
    assert kind != "head" or not found.any()
    cluster.all_is_well((store, space))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, ALWAYS])
@pytest.mark.parametrize("kind", READS)
def test_wrong_bits_are_never_an_answer(cluster: Cluster, kind: str, times: int) -> None:
    store, space = cluster.machine("reader")
    with cluster.proxy.failing(cluster.fault("spoil", kind, times)):
        try:
            found = check_pooled(store, space, range(14))
        except ActCacheError:
            pass
        else:
            # Which prompts are forgotten is known, or those of the whole segment count as gone.
            assert not found[[5, 12, 13]].any()
            assert kind != "rows" or found.any() == (times == 1), "what is wrong once is read again"
    if times == 1:
        cluster.all_is_well((store, space))
    # What was wrong again and again counts as damaged until somebody looks anew.
    store.close()
    cluster.all_is_well(cluster.machine("reader"))


def test_a_stale_listing_hides_nothing_that_was_put_here_and_raises_no_dead(cluster: Cluster) -> None:
    reader, space = cluster.machine("reader")
    writer, _ = cluster.machine("writer")
    for store in (reader, writer):
        store.refresh()
        assert check_pooled(store, space, OLD).sum() == 11
    with cluster.proxy.failing(Fault("stale")):
        writer.append(space, pooled(range(12, 15)))
        writer.flush()
        writer.invalidate(space, make_table([0]))
        for store in (writer, reader):
            store.refresh()
        assert check_pooled(writer, space, range(15)).tolist() == [n not in (0, 5) for n in range(15)]
        assert writer.info().models[0].num_prompts == 13
        # Another machine may learn of it later, but never half of a segment.
        assert check_pooled(reader, space, range(15))[12:].sum() in (0, 3)
    cluster.all_is_well((reader, space), (writer, space), there=range(15), gone=(0, 5))
    # What is gone does not come back from a listing of before.
    reader.refresh()
    writer.invalidate(space, make_table([1]))
    writer.compact(space)
    writer.flush()
    with cluster.proxy.failing(Fault("stale")):
        for store in (writer, reader):
            store.refresh()
        assert not check_pooled(writer, space, [0, 1, 5]).any()
        found = check_pooled(reader, space, range(15))
        assert not found[[0, 5]].any()
    cluster.all_is_well((reader, space), (writer, space), there=range(15), gone=(0, 1, 5))


def test_faults_at_random_and_readers_in_threads(cluster: Cluster) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store, space = cluster.machine("writer")
    for k in range(6):
        store.append(space, pooled(range(12 + 4 * k, 16 + 4 * k), dim=WIDE))
        store.flush()
    reader, _ = cluster.machine("reader")

    def read(k: int) -> int:
        try:
            return int(check_pooled(reader, space, range(k, k + 6)).sum())
        except BackendError:
            return -1

    ways = ("slow_down", "error", "cut", "lose", "spoil", "missing")
    faults = [Fault(way, ("range", "head", "whole"), share=0.1) for way in ways]
    with cluster.proxy.failing(*faults), ThreadPoolExecutor(4) as pool:
        assert max(pool.map(read, range(30))) > 0
    # What was wrong twice in turn counts as damaged until somebody looks anew.
    reader.close()
    cluster.all_is_well(cluster.machine("reader"), (store, space), there=range(36))


# -- writing -----------------------------------------------------------------------------------------------


def append(store: Store, space: str) -> None:
    store.append(space, pooled(range(12, 15)))
    store.flush()


def forget(store: Store, space: str) -> None:
    store.invalidate(space, make_table([3]))


def compact(store: Store, space: str) -> None:
    store.compact(space)
    store.flush()


def error_of(act: Callable[[Store, str], None], store: Store, space: str) -> str:
    """What people are told when it fails; empty where it does not."""
    try:
        act(store, space)
    except ActCacheError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("way", FEW)
@pytest.mark.parametrize("act", [append, forget])
def test_what_passes_is_not_noticed_by_who_writes(
    cluster: Cluster, act: Callable[[Store, str], None], way: str
) -> None:
    store, space = cluster.machine("writer")
    with cluster.proxy.failing(cluster.fault(way, "put", 1)):
        act(store, space)
    if act is append:
        cluster.all_is_well((store, space), there=range(15))
    else:
        cluster.all_is_well((store, space), gone=(3, 5))


@pytest.mark.parametrize("way", [*FEW, "deny", "missing"])
def test_what_cannot_be_put_is_told_and_kept_for_later(cluster: Cluster, way: str) -> None:
    store, space = cluster.machine("writer")
    reader, _ = cluster.machine("reader")
    assert check_pooled(reader, space, OLD).any()
    start = cluster.clock.paused
    with cluster.proxy.failing(cluster.fault(way, "put", ALWAYS)):
        told = error_of(append, store, space)
        # What arrived without an answer may have been found to be there.
        assert cluster.url.split("/")[2] in told or (way == "lose" and not told)
        # Of what is not there others see nothing, or, where only the answer was lost, all of it.
        reader.refresh()
        assert check_pooled(reader, space, range(15))[12:].sum() in ((0, 3) if way in ("lose", "stall") else (0,))
        # This host has it.
        assert check_pooled(store, space, range(12, 15)).all()
        assert cluster.clock.paused - start < 4 * cluster.deadline_s
    store.flush()
    cluster.all_is_well((store, space), (reader, space), there=range(15))


@pytest.mark.parametrize("way", ["error", "lose", "deny"])
def test_who_could_not_say_that_something_is_forgotten_can_say_it_again(cluster: Cluster, way: str) -> None:
    store, space = cluster.machine("writer")
    with cluster.proxy.failing(cluster.fault(way, "put", ALWAYS)), pytest.raises(ActCacheError):
        forget(store, space)
    forget(store, space)
    cluster.all_is_well((store, space), gone=(3, 5))


@pytest.mark.parametrize(
    "kind", ["put", *(pytest.param(k, marks=pytest.mark.slow) for k in ("delete", "rows", "head"))]
)
@pytest.mark.parametrize(
    "way", ["cut", *(pytest.param(w, marks=pytest.mark.slow) for w in ("slow_down", "lose", "stall"))]
)
def test_a_compaction_that_fails_halfway_loses_nothing(cluster: Cluster, kind: str, way: str) -> None:
    store, space = cluster.machine("other")
    with cluster.proxy.failing(cluster.fault(way, kind, 1)):
        compact(store, space)
    cluster.all_is_well((store, space))
    store.append(space, pooled(range(12, 15)))
    store.flush()
    another, _ = cluster.machine("another")
    with cluster.proxy.failing(cluster.fault(way, kind, ALWAYS)):
        told = error_of(compact, another, space)
        assert cluster.url.split("/")[2] in told or (way == "lose" and not told)
    cluster.all_is_well((store, space), (another, space), there=range(15))
    compact(another, space)
    cluster.all_is_well((store, space), (another, space), there=range(15))


@pytest.mark.parametrize("way", ["cut", "deny", pytest.param("lose", marks=pytest.mark.slow)])
def test_a_clear_that_fails_says_so_and_can_be_done_again(cluster: Cluster, way: str) -> None:
    store, space = cluster.machine("other")
    with cluster.proxy.failing(cluster.fault(way, "delete", ALWAYS)), pytest.raises(ActCacheError):
        store.clear()
    # Whatever is left is right.
    cluster.proxy.fail()
    fresh, _ = cluster.machine("fresh")
    check_pooled(fresh, space, OLD)
    store.clear()
    cluster.all_is_well((store, space), there=range(0), gone=())


def test_what_was_spoilt_on_its_way_up_is_found(cluster: Cluster) -> None:
    """By a server that compares digests, so that it is sent again, or else by whoever reads it."""
    store, space = cluster.machine("writer")
    with cluster.proxy.failing(Fault("spoil", ("put",), times=1)) as seen:
        store.append(space, pooled(range(12, 15), dim=5000))
        store.flush()
    refused = [request.status for request in seen if request.way == "spoil"] == [400]
    reader, _ = cluster.machine("reader")
    place = reader.locate(space, table=make_table(range(12, 15)), sites=SITES, layout=LAYOUT)
    assert place.found.all() == refused
    assert reader.verify().ok == refused
    for k in np.flatnonzero(place.found).tolist():
        np.testing.assert_array_equal(place.rows(k)[0][0], vector(12 + k, SITES[0], 5000))
    assert check_pooled(reader, space, OLD).sum() == 11

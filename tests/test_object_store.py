"""A store in a bucket is a store: what one machine writes, the others read, by servers that speak S3."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.demo import model_path
from actcache.store.store import Store
from bucket_helpers import Machine, client, objects, opened, split
from fault_proxy import FaultProxy
from servers import S3Server, only_aws
from store_helpers import CONTEXT, SITES, check_pooled, every_token, make_table, pooled, text, vector

PROMPTS = ["The Eiffel Tower is in the city of", "Snow is white.", "a", "Snow is", "The sky is blue."]


@pytest.fixture
def machine(anywhere: str, tmp_path: Path) -> Iterator[Machine]:
    """Opens the same bucket as another machine does, by the name of the machine."""
    stores: list[Store] = []

    def start(name: str) -> tuple[Store, str]:
        store, space = opened(anywhere, tmp_path / name)
        stores.append(store)
        return store, space

    yield start
    for store in stores:
        store.close()


@pytest.fixture
def local(tmp_path: Path) -> tuple[Store, str]:
    """A store on files, to compare with."""
    return opened(tmp_path / "local", tmp_path / "local index")


def site_rows(store: Store, space: str, numbers: range, site: str) -> torch.Tensor:
    return store.read(space, make_table(numbers), site, pooling="last_token")


def test_what_one_machine_writes_another_reads(machine: Machine, anywhere: str) -> None:
    store, space = machine("first")
    store.append(space, pooled(range(30)))
    store.append(space, every_token(range(10, 20)))
    assert check_pooled(store, space, range(30)).all()
    store.close()
    names = objects(anywhere)
    assert f"v1/{space}/space.json" in names
    assert all(name.startswith(f"v1/{space}/") for name in names)
    assert any(name.endswith(".safetensors") for name in names)
    assert not [name for name in names if not name.endswith((".safetensors", ".json"))]

    other, space = machine("second")
    assert [(s.space, s.model_name, s.num_prompts) for s in other.spaces()] == [(space, "org/model", 30)]
    assert check_pooled(other, space, range(40)).tolist() == [True] * 30 + [False] * 10
    found = other.read(space, make_table([12, 19, 10]), SITES[1])
    for n, rows in zip([12, 19, 10], found, strict=True):
        expected = vector(n, SITES[1]) + np.arange(1 + n % 7, dtype=np.float32)[:, None]
        np.testing.assert_array_equal(rows.numpy(), expected)
    assert other.verify().ok


def test_it_says_of_itself_what_a_local_store_says(machine: Machine, local: tuple[Store, str]) -> None:
    """Every report is the one of a store on files that was written in the same way."""
    here, space = machine("first")
    for store in (here, local[0]):
        store.append(space, pooled(range(20)))
        store.append(space, every_token(range(5)))
        store.invalidate(space, make_table([3]))
        store.close()
    there, space = machine("second")
    place = ("cache_dir", "total_size_bytes", "oldest_mtime", "newest_mtime", "size_bytes", "created_ns")

    def said(report: Any) -> Any:
        if dataclasses.is_dataclass(report) and not isinstance(report, type):
            return {f.name: said(getattr(report, f.name)) for f in dataclasses.fields(report) if f.name not in place}
        return [said(one) for one in report] if isinstance(report, list) else report

    for store in (here, there):
        assert said(store.info()) == said(local[0].info())
        assert said(store.spaces()) == said(local[0].spaces())
        assert store.info().total_size_bytes > 0
        for n in (0, 3, 12):
            prompt = text(n)
            assert said(store.discover("org/model", prompt)) == said(local[0].discover("org/model", prompt))
        assert sorted(t or "" for t in store.prompts(space).texts) == sorted(
            t or "" for t in local[0].prompts(space).texts
        )
        mine, other = (s.statistics(space, SITES[0], pooling="last_token") for s in (store, local[0]))
        np.testing.assert_allclose(mine.mean, other.mean)
        verified = store.verify()
        assert verified.ok and verified.blocks > 0
        assert (
            store.contains(space, make_table(range(25))).tolist()
            == local[0].contains(space, make_table(range(25))).tolist()
        )


def test_a_reader_from_before_sees_what_was_written_since(machine: Machine) -> None:
    reader, space = machine("reader")
    assert not check_pooled(reader, space, range(4)).any()
    writer, _ = machine("writer")
    writer.append(space, pooled(range(2)))
    writer.flush()
    # At its next miss, or when it is told to look.
    assert check_pooled(reader, space, range(4)).tolist() == [True, True, False, False]
    writer.append(space, pooled(range(2, 4)))
    writer.flush()
    reader.refresh()
    assert reader.info().models[0].num_prompts == 4
    assert check_pooled(reader, space, range(4)).all()


def test_two_machines_write_and_invalidate_and_both_see_the_union(machine: Machine) -> None:
    (a, space), (b, _) = machine("a"), machine("b")
    a.append(space, pooled(range(10)))
    b.append(space, pooled(range(5, 15)))
    for store in (a, b):
        store.flush()
    for store in (a, b):
        assert check_pooled(store, space, range(15)).all()
    assert b.invalidate(space, make_table([7, 8])) == 2
    assert a.invalidate(space, make_table([0, 7])) == 1
    expected = [n not in (0, 7, 8) for n in range(15)]
    for store in (a, b):
        store.refresh()
        assert check_pooled(store, space, range(15)).tolist() == expected
    # What is written again after it was forgotten counts.
    a.append(space, pooled([7]))
    a.flush()
    b.refresh()
    assert check_pooled(b, space, [0, 7, 8]).tolist() == [False, True, False]
    assert a.spaces()[0].num_prompts == b.spaces()[0].num_prompts == 13


def test_compacting_leaves_few_objects_and_every_row(machine: Machine, anywhere: str) -> None:
    store, space = machine("first")
    for k in range(5):
        store.append(space, pooled(range(4 * k, 4 * k + 4)))
        store.flush()
    store.invalidate(space, make_table([0, 9]))
    reader, _ = machine("reader")
    assert check_pooled(reader, space, range(20)).sum() == 18
    other, _ = machine("other")
    assert other.compact(space) >= 2
    other.flush()
    assert sum(name.endswith(".safetensors") for name in objects(anywhere)) == 1
    expected = [n not in (0, 9) for n in range(20)]
    for name in (reader, store, other, machine("fresh")[0]):
        assert check_pooled(name, space, range(20)).tolist() == expected
        assert name.verify().ok


def test_eviction_takes_what_was_read_longest_ago_out_of_the_bucket(machine: Machine, anywhere: str) -> None:
    store, space = machine("first")
    for numbers in (range(10), range(10, 20)):
        store.append(space, pooled(numbers, dim=2000))
        store.flush()
    before = sum(objects(anywhere).values())
    report = store.evict(before * 0.6 / 2**30)
    store.flush()
    assert report.prompts > 0
    after = sum(objects(anywhere).values())
    assert after <= before * 0.6
    other, _ = machine("second")
    left = other.contains(space, make_table(range(20)), SITES[0], pooling="last_token")
    assert 0 < left.sum() < 20
    for n in np.flatnonzero(left).tolist():
        np.testing.assert_array_equal(site_rows(other, space, range(n, n + 1), SITES[0])[0], vector(n, SITES[0], 2000))


def test_clearing_leaves_what_others_put_there(machine: Machine, anywhere: str) -> None:
    store, space = machine("first")
    store.append(space, pooled(range(4)))
    store.close()
    bucket, prefix = split(anywhere)
    for name in ("notes.txt", f"v1/{space}/notes.txt", "v1/README.md"):
        client().put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"mine")
    other, _ = machine("second")
    assert other.clear() == 4
    assert objects(anywhere).keys() == {"notes.txt", "v1/README.md", f"v1/{space}/notes.txt"}
    assert other.spaces() == []
    store.refresh()
    assert not check_pooled(store, space, range(4)).any()
    # And it can be used again.
    store.append(space, pooled(range(2)))
    store.flush()
    assert check_pooled(other, space, range(3)).tolist() == [True, True, False]


def test_a_bucket_copied_into_a_folder_is_a_store(machine: Machine, anywhere: str, tmp_path: Path) -> None:
    store, space = machine("first")
    store.append(space, pooled(range(6)))
    store.invalidate(space, make_table([2]))
    store.close()
    bucket, prefix = split(anywhere)
    for name in objects(anywhere):
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client().get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read())
    copy = Store(tmp_path / "copy", index_dir=tmp_path / "copy index")
    assert check_pooled(copy, space, range(6)).tolist() == [True, True, False, True, True, True]
    assert copy.verify().ok


class TestUnified:
    """The main job, on the model of the package."""

    @pytest.mark.parametrize("pooled_only", [True, False])
    def test_every_byte_is_that_of_a_local_store(self, anywhere: str, tmp_path: Path, pooled_only: bool) -> None:
        ac.set_cache_backend(anywhere)
        try:
            cache = ac.UnifiedCache(model_path(), cache_pooled=pooled_only)
            stats = cache.warmup(PROMPTS, labels=[0, 1, 0, 1, 1])
            assert (stats.activations_extracted, stats.activations_cached) == (5, 0)
            here = cache.get_activations(PROMPTS)
            perplexity = cache.get_perplexity(PROMPTS)
        finally:
            ac.set_cache_backend(None)
        with Store(anywhere, index_dir=tmp_path / "another machine") as store:
            other = ac.UnifiedCache(model_path(), cache_pooled=pooled_only, store=store)
            again = other.warmup(PROMPTS)
            assert (again.activations_extracted, again.perplexity_extracted, again.activations_cached) == (0, 0, 5)
            there = other.get_activations(PROMPTS)
            np.testing.assert_array_equal(other.get_perplexity(PROMPTS), perplexity)
            assert not other.model_loaded
        on_files = ac.UnifiedCache(model_path(), cache_pooled=pooled_only, store=tmp_path / "files")
        on_files.warmup(PROMPTS, labels=[0, 1, 0, 1, 1])
        expected = on_files.get_activations(PROMPTS)
        for found in (here, there):
            for mine, local in zip(found, expected, strict=True):
                assert (mine is None) == (local is None)
                assert mine is None or torch.equal(mine, local)
        np.testing.assert_array_equal(on_files.get_perplexity(PROMPTS), perplexity)

    def test_one_layer_is_fetched_and_not_the_others(
        self, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = [f"prompt number {i} of a few" for i in range(400)]
        with FaultProxy(server.endpoint) as proxy:
            behind = dataclasses.replace(server, endpoint=proxy.url)
            only_aws(monkeypatch, behind.environment(tmp_path))
            location = f"s3://{server.make_bucket()}/x"
            with Store(location, index_dir=tmp_path / "first") as store:
                space = ac.new_space("org/model")
                values = {
                    f"resid_post.{k}": [np.full(2000, 1000 * k + i, np.float32) for i in range(400)] for k in range(6)
                }
                store.write(space, texts, values, pooling="mean")
            layer = 400 * 2000 * 4
            proxy.requests.clear()
            with Store(location, index_dir=tmp_path / "second") as store:
                found = store.read(space, texts, "resid_post.4", pooling="mean")
                assert found[:, 7].tolist() == [4000.0 + i for i in range(400)]
                assert layer <= proxy.received("range") <= 1.1 * layer
                assert proxy.count("list") == 1 and proxy.count("whole") <= 1 and proxy.count("head") <= 2
                # And nothing of it a second time, in this process or in the next one.
                before = proxy.received("range")
                assert torch.equal(store.read(space, texts, "resid_post.4", pooling="mean"), found)
                assert proxy.received("range") == before
            with Store(location, index_dir=tmp_path / "second") as store:
                assert torch.equal(store.read(space, texts, "resid_post.4", pooling="mean"), found)
                assert proxy.received("range") == before


def test_many_threads_read_at_once(machine: Machine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store, space = machine("first")
    store.append(space, pooled(range(60), dim=3000))
    store.close()
    other, _ = machine("second")

    def read(k: int) -> bool:
        numbers = range(k, k + 20)
        rows = site_rows(other, space, numbers, SITES[k % 2])
        return all(np.array_equal(row, vector(n, SITES[k % 2], 3000)) for n, row in zip(numbers, rows, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))


def test_prompts_given_by_text_are_found(machine: Machine) -> None:
    store, space = machine("first")
    store.append(space, pooled(range(3)))
    store.close()
    other, _ = machine("second")
    place = other.locate(space, texts=[text(2), text(9)], text_context=CONTEXT, sites=SITES, layout="last_token")
    assert place.found.tolist() == [True, False]

"""Every way to ask a store whose objects lie elsewhere gives what they hold, and fetches no more than it needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actcache.errors import BackendError
from actcache.store.backend import Bytes, MemoryBackend
from actcache.store.store import Store
from mirrors_helpers import (
    EVERYTHING,
    ROWS,
    SITES,
    SPACE,
    VALUES,
    WIDTH,
    Strange,
    check,
    other_host,
    prompts,
    rows_at,
    segment_names,
    write,
)


@pytest.fixture
def backend() -> Strange:
    return Strange()


@pytest.fixture
def reader(backend: Strange, tmp_path: Path) -> Store:
    return other_host(backend, tmp_path)


def test_verification_reads_the_objects_and_not_what_is_here(reader: Store, backend: Strange) -> None:
    check(reader)
    report = reader.verify()
    assert report.ok and report.segments == 1
    (name,) = segment_names(backend)
    at = rows_at(bytes(MemoryBackend.read(backend, name)), SITES[1])
    backend.change(name, at, b"\1\2\3")
    report = reader.verify()
    assert [(damage.site, damage.rows[0]) for damage in report.damaged] == [(SITES[1], 0)]
    check(reader)


def test_verification_sees_damage_to_heads_and_tombs(reader: Store, backend: Strange, tmp_path: Path) -> None:
    reader.invalidate(SPACE, prompts(range(3)))
    check(reader, range(3, ROWS))
    (tomb,) = [item.name for item in MemoryBackend.list(backend) if item.name.endswith(".tomb")]
    (name,) = segment_names(backend)
    before = bytes(MemoryBackend.read(backend, tomb))
    backend.change(tomb, len(before) - 5, b"xxxxx")
    assert [Path(d.segment).name for d in reader.verify().damaged] == [Path(tomb).name]
    backend.change(tomb, 0, before)
    assert reader.verify().ok
    backend.change(name, 3000, b"yyyyy")
    assert [Path(d.segment).name for d in reader.verify().damaged] == [Path(name).name]


@pytest.mark.parametrize("host", ["reader", "fresh"])
@pytest.mark.parametrize("failing", range(4))
def test_a_repair_that_cannot_read_removes_nothing(
    reader: Store, backend: Strange, tmp_path: Path, failing: int, host: str
) -> None:
    reader.invalidate(SPACE, prompts(range(3)))
    reader.flush()
    before = dict(backend._objects)
    left = [failing]

    def fail(name: str, start: int, size: int, data: Bytes) -> Bytes:
        left[0] -= 1
        if left[0] < 0:
            raise BackendError("the network is gone")
        return data

    backend.on_read = fail
    with pytest.raises(BackendError, match="the network is gone"):
        Store(backend, index_dir=tmp_path / host).verify(repair=True)
    assert backend._objects == before
    backend.on_read = None
    assert Store(backend, index_dir=tmp_path / "fresh").verify(repair=True).damaged == []
    assert backend._objects == before


def test_statistics_of_what_is_left_are_exact(reader: Store, backend: Strange, tmp_path: Path) -> None:
    whole = reader.statistics(SPACE, SITES[0], pooling="last_token")
    assert np.allclose(whole.mean, VALUES[SITES[0]].double().mean(0).numpy())
    assert len(backend.reads) <= 3, "the head says it"
    Store(backend, index_dir=tmp_path / "other").invalidate(SPACE, prompts(range(0, ROWS, 50)))
    reader.refresh()
    left = [n for n in EVERYTHING if n % 50]
    found = reader.statistics(SPACE, SITES[0], pooling="last_token")
    assert found.count == len(left)
    assert np.allclose(found.mean, VALUES[SITES[0]][left].double().mean(0).numpy())
    assert {summary.site: summary.rows for summary in reader.summaries(SPACE)} == dict.fromkeys(SITES, len(left))


def test_describing_fetches_no_rows(reader: Store, backend: Strange) -> None:
    reader.info()
    backend.reads.clear()
    assert reader.contains(SPACE, prompts(EVERYTHING)).all()
    assert len(reader.prompts(SPACE)) == ROWS
    found = reader.discover("org/model", "prompt 7")
    assert found is not None and found.variants
    assert len(reader.summaries(SPACE)) == 3
    assert reader.spaces()[0].num_prompts == ROWS
    placement = reader.locate(
        SPACE.space, texts=prompts(EVERYTHING), text_context="external", sites=SITES, layout="last_token", check=False
    )
    assert placement.found.all()
    assert backend.reads == []
    assert np.array_equal(placement.take(), torch.stack(list(VALUES.values()), 1).numpy())


def test_what_belongs_together_lists_once(reader: Store, backend: Strange) -> None:
    check(reader)
    lists = backend.lists
    with reader.looking_once():
        for asked in ("not there", "nor there"):
            assert not reader.contains(SPACE, [asked]).any()
            assert not reader.locate_sites(SPACE, [asked], SITES, "last_token").found.any()
    assert backend.lists == lists + 1
    assert not reader.contains(SPACE, ["not there"]).any()
    assert backend.lists == lists + 2


def test_prompts_of_a_tokenizer_that_is_new_are_found(backend: Strange, tmp_path: Path) -> None:
    reader = Store(backend, index_dir=tmp_path / "reader")
    given = {SITES[0]: [torch.ones(WIDTH)]}
    for context in ("one", "two"):
        with Store(backend, index_dir=tmp_path / "writer") as writer:
            writer.write(SPACE, [f"of {context}"], given, pooling="last_token", text_context=context)
        assert reader.locate_sites(SPACE, [f"of {context}"], SITES[:1], "last_token").found.all()
        assert reader.contains(SPACE, [f"of {context}"]).all()
        assert torch.equal(reader.read(SPACE, [f"of {context}"], SITES[0], pooling="last_token")[0], given[SITES[0]][0])


def test_everything_is_read_in_stored_order(reader: Store, backend: Strange) -> None:
    assert torch.equal(reader.read(SPACE, None, SITES[2], pooling="last_token"), VALUES[SITES[2]])
    backend.reads.clear()
    lists = backend.lists
    assert torch.equal(reader.read(SPACE, None, SITES[2], pooling="last_token"), VALUES[SITES[2]])
    assert backend.reads == [] and backend.lists == lists


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3", "bfloat16"])
def test_every_dtype_reads_as_from_a_store_on_disk(backend: Strange, tmp_path: Path, dtype: str) -> None:
    local = Store(tmp_path / "local", dtype=dtype, index_dir=tmp_path / "index")
    write(local)
    write(Store(backend, dtype=dtype, index_dir=tmp_path / "writer"))
    reader = Store(backend, index_dir=tmp_path / "reader")
    for numbers in (range(700, 710), range(0, ROWS, 3), EVERYTHING):
        both = [s.read(SPACE, prompts(numbers), SITES[1], pooling="last_token") for s in (local, reader)]
        assert torch.equal(*both)


def test_sequences_are_read_by_rows(backend: Strange, tmp_path: Path) -> None:
    given = [torch.randn(1 + n % 50, 300) for n in range(400)]
    asked = [f"sequence {n}" for n in range(400)]
    tokens = [list(range(n, n + len(rows))) for n, rows in enumerate(given)]
    writer = Store(backend, index_dir=tmp_path / "writer")
    writer.write(SPACE, tokens, {"resid_post.0": given, "resid_post.1": given})
    writer.close()
    backend.reads.clear()
    reader = Store(backend, index_dir=tmp_path / "reader")
    some = [3, 399, 200, 201, 202]
    found = reader.read(SPACE, [tokens[n] for n in some], "resid_post.1")
    assert all(torch.equal(a, given[n]) for a, n in zip(found, some, strict=True))
    assert len(asked) == 400
    assert sum(size for *_, size in backend.reads) < sum(rows.numel() * 4 for rows in given)
    last = reader.read(SPACE, tokens, "resid_post.0", positions="last")
    assert all(torch.equal(a.reshape(-1), rows[-1]) for a, rows in zip(last, given, strict=True))

"""Repairing objects that lie elsewhere: rewritten out of what is intact, removed where nobody can read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actcache.store.backend import MemoryBackend
from actcache.store.files import SEGMENT_NAME
from elsewhere import Watched, found, machine, names, objects, two
from store_helpers import every_token, make_table, pooled


@pytest.fixture
def backend() -> Watched:
    return Watched(MemoryBackend())


def test_repairing_rewrites_damaged_objects(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(200), dim=512))
    one.append(space, every_token(range(3)))
    one.flush()
    for name in objects(backend):
        data = bytearray(backend.read(name))
        if len(data) > 100_000:
            data[-5] ^= 1
            backend.inner._objects[name] = bytes(data)  # type: ignore[attr-defined]
    report = other.verify(repair=True)
    assert report.damaged
    assert report.ok
    assert report.lost > 0
    fresh, _ = machine(backend, tmp_path / "c")
    assert fresh.verify().damaged == []
    place = fresh.locate(space, table=make_table(range(200)), sites=["resid_post.0"], layout="last_token")
    assert place.found.all()
    place = fresh.locate(space, table=make_table(range(200)), sites=["resid_post.1"], layout="last_token")
    assert place.found.any()
    assert not place.found.all()
    one.refresh()
    assert one.verify().ok


def test_repairing_takes_what_this_host_has_of_a_damaged_object(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(200), dim=512))
    one.flush()
    before = one.locate(
        space, table=make_table(range(200)), sites=["resid_post.0", "resid_post.1"], layout="last_token"
    )
    (name,) = objects(backend)
    data = bytearray(backend.read(name))
    data[-5] ^= 1
    backend.inner._objects[name] = bytes(data)  # type: ignore[attr-defined]
    assert other.verify().lost > 0, "it has read nothing of it"
    for repair in (False, True):
        report = one.verify(repair=repair)
        assert report.damaged
        assert report.ok == repair
        assert (report.lost, report.lost_prompts, report.lost_sites) == (0, 0, {})
    fresh, _ = machine(backend, tmp_path / "c")
    assert fresh.verify().damaged == []
    place = fresh.locate(
        space, table=make_table(range(200)), sites=["resid_post.0", "resid_post.1"], layout="last_token"
    )
    assert place.found.all()
    assert np.array_equal(place.take(), before.take())


def test_repairing_removes_what_nobody_can_read(tmp_path: Path, backend: Watched) -> None:
    one, other, space = two(backend, tmp_path)
    one.append(space, pooled(range(3)))
    one.flush()
    one.append(space, pooled(range(3, 6)))
    one.flush()
    name = objects(backend)[0]
    data = bytearray(backend.read(name))
    data[400] ^= 0xFF
    backend.inner._objects[name] = bytes(data)  # type: ignore[attr-defined]
    report = other.verify(repair=True)
    assert report.ok
    assert name not in names(backend)
    assert sum(found(machine(backend, tmp_path / "c")[0], space, range(6))) == 3
    assert all(SEGMENT_NAME.fullmatch(n.rpartition("/")[2]) for n in objects(backend))

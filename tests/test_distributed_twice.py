"""A prompt that is in two units, which two workers do at the same moment, is there once: for every reader, and after
the store has tidied itself for every file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import actcache as ac
from distributed_helpers import OPTIONS, PROMPTS, bare_forwards, check_stored, make_model, set_fault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.usefixtures("one_ray_at_a_time"),
]

SITE = "resid_post.1"
DISTINCT = PROMPTS[:18]
# Two units: six prompts are in both, in batches with others.
ROWS = [*PROMPTS[:12], *reversed(PROMPTS[6:18])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"input_ids": ROWS}), tmp_path / "p.parquet")
    (tmp_path / "together").mkdir()
    return tmp_path / "p.parquet"


def check_once(place: Any, folder: Path, tmp_path: Path) -> None:
    """Each of `DISTINCT`, however it is asked for, by somebody who has never looked."""
    expected = bare_forwards(folder, DISTINCT)
    check_stored(place, expected, DISTINCT, index_dir=tmp_path / "fresh")
    opened = ac.Store(place, index_dir=tmp_path / "another")
    (space,) = opened.spaces()
    assert opened.statistics(space, SITE, pooling="last_token").count == len(DISTINCT)
    stream = ac.stream_activations(opened, SITE, space=space, pooling="last_token", batch_size=5, shuffle=False)
    assert sum(len(batch) for batch in stream) == len(DISTINCT)
    again = ac.UnifiedCache(folder, store=opened, **OPTIONS).warmup(ROWS)
    assert (again.activations_cached, again.activations_extracted) == (len(ROWS), 0)
    assert copies(opened, space) > len(DISTINCT)
    opened.compact()
    assert copies(opened, space) == len(DISTINCT)
    opened.close()
    check_stored(place, expected, DISTINCT, index_dir=tmp_path / "afterwards")


def copies(store: ac.Store, space: ac.SpaceInfo) -> int:
    """How many prompts all files hold together."""
    index = store._index(space.space)
    index.refresh(force=True)
    return sum(info.prompts for _, info in index.segments())


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_two_workers_at_the_same_prompts(
    engine: str, source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither stores a batch before the other has begun one, so that neither can know of the other's."""
    if engine == "ray":
        pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    set_fault(monkeypatch, together=str(tmp_path / "together"))
    share = {"num_cpus_per_worker": 0.5} if engine == "ray" else {}
    try:
        stats = ac.warmup_distributed(
            source, folder, engine=engine, num_workers=2, unit_prompts=12, store=tmp_path / "s", **share, **OPTIONS
        )
    finally:
        if engine == "ray":
            import ray

            ray.shutdown()
    assert (stats.total_prompts, stats.activations_cached, stats.activations_extracted) == (24, 0, 24)
    check_once(tmp_path / "s", folder, tmp_path)


RANK = """
import json, sys
import actcache as ac
source, folder, store, options = sys.argv[1:]
ac.warmup_distributed(source, folder, store=store, engine="rank", unit_prompts=12, **json.loads(options))
"""


def test_two_machines_at_the_same_prompts_of_a_bucket(
    bucket: str, source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks with a home of their own each, which share nothing but the bucket."""
    line = [sys.executable, "-c", RANK, str(source), str(folder), bucket + "/run", json.dumps(OPTIONS)]
    with monkeypatch.context() as during:
        set_fault(during, together=str(tmp_path / "together"), everywhere=True)
        ranks = []
        for k in range(2):
            own = {"RANK": str(k), "WORLD_SIZE": "2", "XDG_CACHE_HOME": str(tmp_path / f"home{k}")}
            ranks.append(subprocess.Popen(line, env={**os.environ, **own}))
    try:
        assert [rank.wait(240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert len(list((tmp_path / "together").iterdir())) == 2
    check_once(bucket + "/run", folder, tmp_path)

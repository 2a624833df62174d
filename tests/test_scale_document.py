"""docs/scale.md says what its script computes, and the script's arithmetic is that of real segments."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.store.prompts import PromptTable
from actcache.store.records import Records
from actcache.store.segment import write
from actcache.store.store import Store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_scale", ROOT / "scripts" / "make_scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_is_computed(script: Any) -> None:
    document = script.DOCUMENT.read_text()
    assert script.inserted(document) == document
    assert document.count("| 70B | last token, all layers |") == 3


@pytest.mark.parametrize(("prompts", "sites", "width"), [(200, 3, 64), (20, 24, 512), (1000, 1, 64)])
def test_what_precedes_the_rows_of_a_real_segment(
    script: Any, tmp_path: Path, prompts: int, sites: int, width: int
) -> None:
    with Store(tmp_path / "store", index_dir=tmp_path / "index") as store:
        space = store.open_space({"model": "x"}, {"model_name": "x"})
    ids = [np.arange(i, i + script.TOKENS, dtype=np.int32) for i in range(prompts)]
    texts = [str(i).zfill(script.TEXT_BYTES) for i in range(prompts)]
    rows = {f"resid_post.{k}": np.ones((prompts, width), np.float16) for k in range(sites)}
    table = PromptTable.build(ids, texts, text_context="context")
    info = write(tmp_path / "store" / "v1" / space, Records.pooled(table, "last_token", rows), space=space)
    data = prompts * sites * width * 2
    assert script.head_bytes(prompts, sites, width, data) == pytest.approx(info.size - data, rel=0.03)


def test_figures_by_hand(script: Any) -> None:
    model = script.Model("8B", 8.03e9, 32, 4096)
    one = script.cost(1_000_000_000, model, script.Kept("", True, False))
    assert one.data == 10**9 * 32 * 4096 * 2
    # 460 bytes of vectors for each byte of prompt, so that segments hold about a thousand prompts.
    assert one.segments == -(-(10**9) * (32 * 4096 * 2 + 569) // (256 << 20))
    assert one.pages == -(-one.segments // 1000)
    assert one.run_s == pytest.approx(2 * 8.03e9 * 64e9 / 400e12)
    whole = script.cost(10_000, model, script.Kept("", True, True))
    assert whole.data == 64 * script.cost(10_000, model, script.Kept("", True, False)).data
    assert script.size(2_621_440_000) == "2.62 GB"
    assert script.duration(7200) == "2 h"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["gpu.py", "--device", "cpu", "--shape", "tiny", "--quick"], 0, "half depth, every token"),
        (["gpu.py", "--device", "cpu"], 2, "use --shape tiny"),
        (["listing.py", "--segments", "100", "--prompts", "3"], 0, "bytes read"),
    ],
)
def test_benchmarks_run(arguments: list[str], status: int, said: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / arguments[0]), *arguments[1:], "--folder", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == status, run.stderr
    assert said in run.stdout + run.stderr

"""What tests of distributed runs share: prompts, what a bare forward gives of them, and what goes wrong in workers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.store.default import store_at
from actcache.testing.tiny import tiny_model

LAYERS = 2
PROMPTS = [[1 + (7 * i + k * k) % 50 for k in range(1 + i % 13)] + [3 + i // 50, 3 + i % 50] for i in range(160)]
OPTIONS: dict[str, Any] = {"compute_perplexity": False}
WHOLE_RUNS = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.usefixtures("one_ray_at_a_time"),
]
"""Marks of tests that start workers of every kind."""


def arguments(engine: str, **more: Any) -> dict[str, Any]:
    """Of a run with two workers."""
    # On a machine with one processor there are two of these all the same.
    share = {"num_cpus_per_worker": 0.5} if engine == "ray" else {}
    return {"engine": engine, "num_workers": 2, "unit_prompts": 12, **share, **OPTIONS, **more}


def make_model(folder: Path) -> Path:
    """A tiny GPT-2 without a tokenizer: 259 tokens, 64 positions."""
    tiny_model("gpt2", seed=1, n_layer=LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model that most of these tests run."""
    return make_model(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """What `PROMPTS` give there."""
    return bare_forwards(folder, PROMPTS)


def bare_forwards(folder: Path, prompts: Sequence[Sequence[int]]) -> Any:
    """What each block gives for the last token of each of `prompts`, alone: ``[N, LAYERS, 32]``."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    states: list[Any] = []
    for block in model.h:
        block.register_forward_hook(lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out))
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            states.clear()
            model(torch.tensor([list(prompt)]))
            rows.append(torch.stack([state[0, -1] for state in states]).numpy())
    return np.stack(rows)


def write(path: Path, prompts: Sequence[Any] = PROMPTS) -> Path:
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return path


def stored(store: Any, index_dir: Path | None = None) -> int:
    """How many prompts are there, for who has never looked."""
    opened = store_at(store) if store is None else ac.Store(store, index_dir=index_dir)
    found = sum(space.num_prompts for space in opened.spaces())
    opened.close()
    return found


def check_stored(store: Any, expected: Any, prompts: Sequence[Any] = PROMPTS, index_dir: Path | None = None) -> None:
    """Each of `prompts` is there once, and nothing else, with the values of a bare forward."""
    opened = ac.Store(store, index_dir=index_dir)
    (space,) = opened.spaces()
    assert space.num_prompts == len(prompts)
    for layer in range(LAYERS):
        site = f"resid_post.{layer}"
        assert opened.contains(space, prompts, site, pooling="last_token").all()
        found = opened.read(space, prompts, site, pooling="last_token").numpy()
        np.testing.assert_allclose(found, expected[:, layer], rtol=0, atol=5e-6 * np.abs(expected).max())
    assert opened.verify().ok
    opened.close()


def set_fault(monkeypatch: pytest.MonkeyPatch, **fault: Any) -> None:
    """Let that go wrong in workers that are started from now on; see `faulty/sitecustomize.py`."""
    here = str(Path(__file__).with_name("faulty"))
    monkeypatch.setenv("ACTCACHE_TEST_FAULT", json.dumps(fault))
    monkeypatch.syspath_prepend(here)
    # Processes of Ray have the environment, and what is in front of the path of this process is their driver's.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, sys.path)]))

"""A warm-up that is killed in mid run loses no finished batch, and going on gives what one run would have given."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.testing.tiny import tiny_model

_DRIVER = """
import signal, sys, time
import actcache as ac
# What runs in the background of a shell script is started with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from actcache.extract.backends.local import LocalSession

run, passes = LocalSession.run, []
def slowly(self, *given):
    passes.append(None)
    # The last of 100 leave whoever watches seconds to act in, however busy the machine is.
    time.sleep(0.03 if len(passes) < 88 else 1)
    return run(self, *given)
LocalSession.run = slowly
prompts = [[(7 * i + k) % 50 for k in range(1 + i % 23)] for i in range(400)]
ac.UnifiedCache(sys.argv[1], store=sys.argv[2], batch_size=4, cache_pooled=False).warmup(prompts)
"""

PROMPTS = [[(7 * i + k) % 50 for k in range(1 + i % 23)] for i in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_model("gpt2", seed=1, n_layer=3).save_pretrained(folder)
    return folder


DIFFERENT = [list(p) for p in {tuple(p): None for p in PROMPTS}]


def stored(place):
    return sum(space.num_prompts for space in ac.Store(place).spaces())


def having(place, *columns):
    """Which different prompts have vectors, and which have each of the other columns."""
    store = ac.Store(place)
    (space,) = store.spaces()
    vectors = np.logical_and.reduce([store.contains(space, DIFFERENT, f"resid_post.{layer}") for layer in range(3)])
    return vectors, [store.contains(space, DIFFERENT, name, pooling=pooling) for name, pooling in columns]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.1, 0.5, 0.9])
def test_kill_and_go_on(folder, tmp_path, moment):
    different = len(DIFFERENT)
    place = tmp_path / "store"
    child = subprocess.Popen([sys.executable, "-c", _DRIVER, str(folder), str(place)])
    deadline = time.monotonic() + 120
    while stored(place) < moment * different:
        assert child.poll() is None, "the warm-up ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()

    finished = stored(place)
    assert moment * different <= finished < different
    vectors, results = having(place, ("perplexity", "derived"), ("token_nll", None))
    assert vectors.sum() == finished
    assert not any((found & ~vectors).any() for found in results)
    cache = ac.UnifiedCache(folder, store=place, batch_size=4, cache_pooled=False)
    stats = cache.warmup(PROMPTS)
    assert stats.activations_cached == finished
    assert stats.activations_extracted == different - finished
    # Results of a batch are durable after its vectors, never before them.
    assert stats.perplexity_cached <= finished

    whole = ac.UnifiedCache(folder, store=tmp_path / "whole", batch_size=4, cache_pooled=False)
    whole.warmup(PROMPTS)
    resumed, mask = cache.get_activations(PROMPTS)
    expected, expected_mask = whole.get_activations(PROMPTS)
    assert torch.equal(mask, expected_mask)
    # Company in a batch differs between the two runs, so the last bits may.
    assert float((resumed - expected).abs().max() / expected.abs().max()) < 5e-6


@pytest.mark.slow
def test_interrupting_keeps_what_was_finished(folder, tmp_path):
    place = tmp_path / "store"
    child = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(folder), str(place)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while stored(place) < 100:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in error
    assert 100 <= stored(place) < len({tuple(p) for p in PROMPTS})
    assert not [p for p in place.rglob("*") if p.is_file() and "tmp" in p.name]

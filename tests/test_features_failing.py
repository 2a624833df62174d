"""Features of what fails, is damaged or killed on the way: what was done stays, and the rest is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import NotCachedError
from actcache.extract import features as encoding
from actcache.store import segment
from actcache.store.store import Store
from features_helpers import SITE, SPACE, N, Sae, new_store, same


def test_going_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_TOKENS_AT_ONCE", 16)
    store, sae = new_store(tmp_path), Sae()

    class Breaking(Sae):
        def encode(self, x: Tensor) -> Tensor:
            if len(self.seen) > 20:
                raise MemoryError("no more")
            return super().encode(x)

    with pytest.raises(MemoryError):
        ac.encode_store(store, Breaking(), SITE, space=SPACE)
    # The class is part of what an autoencoder is.
    features = ac.encode_store(store, sae, SITE, space=SPACE, digest="one")
    assert features.encoded == 40
    with pytest.raises(MemoryError):
        ac.encode_store(store, Breaking(seed=1), SITE, space=SPACE, digest="two")
    rest = ac.encode_store(store, Sae(seed=1), SITE, space=SPACE, digest="two")
    assert 0 < rest.found < 40 and rest.encoded == 40 - rest.found
    same(rest, Sae(seed=1))


def test_damaged_vectors_are_told_when_the_others_are_stored(tmp_path: Path) -> None:
    store, sae = Store(tmp_path / "store", index_dir=tmp_path / "index"), Sae(width=512)
    rows = torch.randn(600, 512)
    prompts = [[i + 1] for i in range(600)]
    store.write(SPACE, prompts, {SITE: list(rows[:, None])})
    (path,) = (store.root / SPACE.space).glob("*.safetensors")
    (matrix,) = segment.open(path).parts(SITE)
    with path.open("r+b") as file:
        file.seek(matrix.stop - 4)
        file.write(b"\xff\xff\x7f\x7f")
    fresh = Store(tmp_path / "store", index_dir=tmp_path / "fresh")
    with pytest.raises(NotCachedError, match=r"of 600 prompts.*the others are stored"):
        ac.encode_store(fresh, sae, SITE, space=SPACE)
    features = ac.encode_store(fresh, sae, SITE, space=SPACE)
    assert features.encoded == 0 and 0 < features.found < 600
    with torch.no_grad():
        (found,) = features.read(prompts[:1])
        torch.testing.assert_close(found.to_dense(), sae.encode_of(rows[:1]), rtol=1e-4, atol=1e-5)


def test_damaged_features_are_encoded_again(tmp_path: Path) -> None:
    store, sae = new_store(tmp_path), Sae()
    features = ac.encode_store(store, sae, SITE, space=SPACE)
    store.close()
    (path,) = (store.root / features.space).glob("*.safetensors")
    (matrix,) = segment.open(path).parts(f"features.of{N}.value")
    with path.open("r+b") as file:
        file.seek(matrix.start)
        file.write(b"\xff\xff\x7f\x7f")
    fresh = Store(tmp_path / "store", index_dir=tmp_path / "fresh")
    again = ac.encode_store(fresh, sae, SITE, space=SPACE)
    assert again.encoded > 0
    same(again, sae)


def test_two_threads_at_once_do_no_harm(tmp_path: Path) -> None:
    store, sae = new_store(tmp_path), Sae()
    results: list[Any] = []

    def work(mine: Sae) -> None:
        results.append(ac.encode_store(store, mine, SITE, space=SPACE))

    # Made here: weights are drawn from a generator that threads have in common.
    threads = [threading.Thread(target=work, args=(Sae(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.encoded + r.found for r in results] == [40, 40]
    same(results[0], sae)
    assert len(results[0].prompts()) == 40


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import features_helpers as t
from actcache.extract import features as encoding
import actcache as ac
encoding._TOKENS_AT_ONCE = 16
store = t.Store(sys.argv[1] + "/store", index_dir=sys.argv[1] + "/index")
class Deadly(t.Sae):
    def encode(self, x):
        if len(self.seen) == 30:
            store.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(x)
ac.encode_store(store, Deadly(), t.SITE, space=t.SPACE, digest="one")
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_had_done(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    store.close()
    child = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(Path(__file__).parent)],
        timeout=120, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL
    sae = Sae()
    fresh = Store(tmp_path / "store", index_dir=tmp_path / "fresh")
    features = ac.encode_store(fresh, sae, SITE, space=SPACE, digest="one")
    assert features.encoded + features.found == 40 and features.encoded > 0
    same(features, sae)
    for path in (fresh.root / features.space).glob("*.safetensors"):
        assert segment.validate(path) == []

"""What holds for every test: no network, and no trace outside the test's own folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actcache.model import host_memo

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported. Models of 32 dimensions have no work to share out: threads that wait for one another make
# these tests several times slower on a machine that is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_cache_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default store and this host's state are folders of the test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("ACTCACHE_DIR", str(folder / "store"))
    monkeypatch.delenv("ACTCACHE_BACKEND", raising=False)
    # What another test has learnt about models is in memory only, and no other process of this test would know it.
    monkeypatch.setattr(host_memo, "_default", host_memo.HostMemo())
    return folder

"""The example of a backend of one's own does what a backend has to do."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from types import ModuleType

import pytest

import actcache as ac
from actcache.testing import CacheBackendTests

EXAMPLE = Path(__file__).parents[1] / "examples" / "fsspec_backend.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("fsspec")
    spec = importlib.util.spec_from_file_location("fsspec_backend", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OfFsspec(CacheBackendTests):
    many = 200

    @pytest.fixture(autouse=True)
    def _kind(self, example: ModuleType) -> None:
        self.kind = example.FsspecBackend

    def second(self, backend: ac.CacheBackend) -> ac.CacheBackend:
        other: ac.CacheBackend = self.kind(backend.url)
        return other


class TestFiles(OfFsspec):
    @pytest.fixture
    def backend(self, example: ModuleType, tmp_path: Path) -> ac.CacheBackend:
        found: ac.CacheBackend = example.FsspecBackend(f"file://{tmp_path}/place")
        return found


class TestMemory(OfFsspec):
    @pytest.fixture
    def backend(self, example: ModuleType) -> ac.CacheBackend:
        found: ac.CacheBackend = example.FsspecBackend(f"memory://{uuid.uuid4().hex}/place")
        return found

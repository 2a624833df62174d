"""Every backend does what a backend has to do."""

from __future__ import annotations

from pathlib import Path

import pytest

import actcache as ac
from actcache.testing import CacheBackendTests, FaultyBackend


class TestLocal(CacheBackendTests):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> ac.CacheBackend:
        return ac.LocalBackend(tmp_path / "place")

    def second(self, backend: ac.CacheBackend) -> ac.CacheBackend:
        assert isinstance(backend, ac.LocalBackend)
        return ac.LocalBackend(backend.folder)


class TestMemory(CacheBackendTests):
    @pytest.fixture
    def backend(self) -> ac.CacheBackend:
        return ac.MemoryBackend()


class TestObject(CacheBackendTests):
    @pytest.fixture
    def backend(self, bucket: str) -> ac.CacheBackend:
        return ac.ObjectBackend(f"{bucket}/of/this-test")

    def second(self, backend: ac.CacheBackend) -> ac.CacheBackend:
        return ac.ObjectBackend(backend.url)


class TestLogging(CacheBackendTests):
    @pytest.fixture
    def backend(self) -> ac.CacheBackend:
        return ac.LoggingBackend(ac.MemoryBackend())


class TestFaultyWithoutFaults(CacheBackendTests):
    @pytest.fixture
    def backend(self) -> ac.CacheBackend:
        return FaultyBackend(ac.MemoryBackend())

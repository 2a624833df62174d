"""Every backend does what a backend has to do."""

from __future__ import annotations

from pathlib import Path

import pytest

import actcache as ac
from actcache.testing import CacheBackendTests, FaultyBackend
from servers import S3Server, only_aws


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


@pytest.mark.slow
class TestSwift(CacheBackendTests):
    """Another server that speaks S3, which holds signatures against what they sign."""

    many = 300
    examples = 5

    @pytest.fixture
    def backend(self, swift: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ac.CacheBackend:
        only_aws(monkeypatch, swift.environment(tmp_path))
        return ac.ObjectBackend(f"s3://{swift.make_bucket()}/x")

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

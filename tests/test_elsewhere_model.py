"""A store elsewhere against a dictionary: any sequence of operations on two machines, with faults and late listings."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from actcache.errors import BackendError
from actcache.store import uploading
from actcache.store.backend import MemoryBackend, ObjectInfo
from actcache.store.records import TOKENS, Records
from actcache.store.store import Store
from elsewhere import Wrapped, machine
from store_helpers import CONTEXT, growing_writer, make_table, text, vector

GB = 2**30
NUMBERS = range(16)
FORMS: dict[str, tuple[str, dict[str, int]]] = {
    "pooled": ("last_token", {"resid_post.0": 8, "resid_post.1": 8, "mlp_act.0": 19}),
    "whole": (TOKENS, {"resid_post.0": 5, "z.1": 12}),
}
some_numbers = st.lists(st.sampled_from(list(NUMBERS)), min_size=1, max_size=6)
Held = dict[tuple[str, str], set[int]]
Found = TypeVar("Found")


class Faulty(Wrapped):
    """Fails at the call numbers told, before or after it did what was asked; lists what was there some time ago."""

    def __init__(self, inner: MemoryBackend) -> None:
        super().__init__(inner)
        self.faults: list[tuple[int, bool]] = []
        self.late = 0
        self._before: list[ObjectInfo] = []

    def _call(self, work: Callable[[], Any]) -> Any:
        late = None
        self.faults = [(left - 1, after) for left, after in self.faults]
        if self.faults and self.faults[0][0] <= 0:
            late = self.faults.pop(0)[1]
        if late is False:
            raise BackendError("cut off before")
        found = work()
        if late:
            raise BackendError("cut off after")
        return found

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        def work() -> list[ObjectInfo]:
            now = list(self.inner.list())
            shown = self._before if self.late > 0 else now
            self.late -= 1
            self._before = now
            return [info for info in shown if info.name.startswith(prefix)]

        return iter(self._call(work))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        return self._call(lambda: self.inner.read(name, start, stop))

    def put(self, name: str, source: Any) -> None:
        self._call(lambda: self.inner.put(name, source))

    def delete(self, name: str) -> None:
        self._call(lambda: self.inner.delete(name))

    def heal(self) -> bool:
        """Work from now on; whether it had not."""
        broken = bool(self.faults) or self.late > 0
        self.faults, self.late = [], 0
        return broken


class ElsewhereMachine(RuleBasedStateMachine):
    """`shared[layout, site]`: the prompts that everybody must find; `own[host]`: those that this host must find, too.

    What is stored for a prompt is always the same, as it is for activations.
    """

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="actcache-model-"))
        self.backend = Faulty(MemoryBackend())
        self.patched = mock.patch.object(uploading, "LINGER_S", 3600.0)
        self.patched.start()
        self.names = [f"{self.folder}/{k}" for k in range(2)]
        self.left: list[Store] = []
        self.fresh = itertools.count()
        self.hosts = [machine(self.backend, Path(name))[0] for name in self.names]
        self.space = machine(self.backend, self.folder / "x")[1]
        self.shared: Held = {}
        self.own: list[Held] = [{}, {}]
        self.writers = [growing_writer(host, self.space) for host in self.hosts]
        for writer, host in zip(self.writers, self.hosts, strict=True):
            writer._uploader = host._uploader

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.backend.heal()
            uploading._at_work.clear()
            self.patched.stop()
            shutil.rmtree(self.folder)

    # -- what goes wrong ---------------------------------------------------------------------------------

    @rule(faults=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=3))
    def break_off(self, faults: list[tuple[int, bool]]) -> None:
        self.backend.faults = sorted(faults)

    @rule(times=st.integers(1, 4))
    def list_late(self, times: int) -> None:
        self.backend.late = times

    def until_done(self, work: Callable[[], Found]) -> tuple[Found, bool]:
        """What `work` gives, tried again after faults, of which there are few; whether nothing went wrong."""
        for attempt in range(20):
            try:
                return work(), attempt == 0
            except BackendError:
                continue
        raise AssertionError("it goes on failing")

    # -- what is done ------------------------------------------------------------------------------------

    @rule(
        host=st.integers(0, 1), form=st.sampled_from(sorted(FORMS)), numbers=some_numbers, data=st.data(),
        growing=st.booleans(),
    )  # fmt: skip
    def write(self, host: int, form: str, numbers: list[int], data: st.DataObject, growing: bool) -> None:
        layout, widths = FORMS[form]
        sites = data.draw(st.lists(st.sampled_from(sorted(widths)), min_size=1, unique=True))
        numbers = sorted(set(numbers))
        rows = {s: np.concatenate([self._values(i, s, widths[s], layout) for i in numbers]) for s in sites}
        table = make_table(numbers)
        made = Records.tokens(table, rows) if layout == TOKENS else Records.pooled(table, layout, rows)
        if growing:
            self.until_done(lambda: self.writers[host].append([made]))
        else:
            self.until_done(lambda: self.hosts[host].append(self.space, made))
        for site in sites:
            self.own[host].setdefault((layout, site), set()).update(numbers)

    def _values(self, i: int, site: str, dim: int, layout: str) -> np.ndarray:
        rows = 1 + i % 7 if layout == TOKENS else 1
        values: np.ndarray = vector(i, site, dim) + np.arange(rows, dtype=np.float32)[:, None]
        return values

    @rule(host=st.integers(0, 1))
    def flush(self, host: int) -> None:
        self.until_done(self.hosts[host].flush)
        # The test's writer is not one of the store's own.
        self.until_done(lambda: self.writers[host].finish(True))
        self._uploaded(host)

    def _uploaded(self, host: int) -> None:
        for key, numbers in self.own[host].items():
            self.shared.setdefault(key, set()).update(numbers)
        self.own[host] = {}

    @rule(host=st.integers(0, 1), numbers=some_numbers, as_text=st.booleans())
    def invalidate(self, host: int, numbers: list[int], as_text: bool) -> None:
        # What a late listing does not show is not known to be there.
        self.backend.late = 0
        prompts: Any = [text(i) for i in numbers] if as_text else make_table(numbers)
        held = self._held(host)
        count, at_once = self.until_done(lambda: self.hosts[host].invalidate(self.space, prompts))
        assert not at_once or count == len(held & set(numbers))
        for versions in [*self.shared.values(), *self.own[host].values()]:
            versions.difference_update(numbers)

    def _held(self, host: int) -> set[int]:
        return set().union(*self.shared.values(), *self.own[host].values())

    @rule(host=st.integers(0, 1), one_space=st.booleans())
    def compact(self, host: int, one_space: bool) -> None:
        self.flush(host)
        store = self.hosts[host]
        self.until_done(lambda: store.merge(self.space) if one_space and self._held(host) else store.compact())

    @rule(host=st.integers(0, 1), share=st.floats(0.2, 1.1))
    def evict(self, host: int, share: float) -> None:
        self.flush(host)
        store = self.hosts[host]
        self.backend.late = 0
        before = self._size()
        report, at_once = self.until_done(lambda: store.evict(share * before / GB))
        if at_once:
            assert self._size() == report.bytes_kept
        left = any(info.name.endswith(".safetensors") for info in self.backend.inner.list())
        assert self._size() <= max(before if share >= 1 else int(share * before), 0) or not left
        self.backend.heal()
        store.refresh()
        for (layout, site), numbers in self.shared.items():
            place = store.locate(self.space, table=make_table(NUMBERS), sites=[site], layout=layout)
            found = set(np.flatnonzero(place.found).tolist())
            assert found <= numbers
            assert share < 1 or found == numbers
            self.shared[layout, site] = found

    def _size(self) -> int:
        return sum(info.size for info in self.backend.inner.list())

    @rule(host=st.integers(0, 1))
    def clear(self, host: int) -> None:
        self.backend.late = 0
        held = self._held(host)
        count, at_once = self.until_done(self.hosts[host].clear)
        assert not at_once or count == len(held)
        self.shared, self.own[host] = {}, {}

    @rule(host=st.integers(0, 1), repair=st.booleans())
    def verify(self, host: int, repair: bool) -> None:
        report, _ = self.until_done(lambda: self.hosts[host].verify(repair))
        assert report.damaged == []

    @rule(host=st.integers(0, 1), killed=st.booleans(), forget=st.booleans())
    def reopen(self, host: int, killed: bool, forget: bool) -> None:
        """The process ends; where it was not killed what this host keeps may be lost as well."""
        if killed:
            for file in self.writers[host]._files.values():
                file.close()
            # It does nothing any more.
            self.left.append(self.hosts[host])
            uploading._at_work.clear()
        else:
            self.flush(host)
            self.until_done(self.hosts[host].close)
            if forget:
                shutil.rmtree(self.names[host], ignore_errors=True)
        self.hosts[host] = machine(self.backend, Path(self.names[host]))[0]
        # It would upload what was left at a time of its own.
        self.hosts[host]._uploader._begun = True  # type: ignore[union-attr]
        self.writers[host] = growing_writer(self.hosts[host], self.space)
        self.writers[host]._uploader = self.hosts[host]._uploader

    @invariant()
    def every_host_finds_what_it_must_and_nothing_else(self) -> None:
        if not hasattr(self, "shared"):
            return
        broken = self.backend.faults, self.backend.late
        self.backend.heal()
        stores = list(self.hosts)
        if next(self.fresh) % 5 == 4:
            stores.append(machine(self.backend, self.folder / f"fresh {next(self.fresh)}")[0])
        for host, store in enumerate(stores):
            store.refresh()
            own = self.own[host] if host < 2 else {}
            for layout, widths in FORMS.values():
                for site, dim in widths.items():
                    expected = self.shared.get((layout, site), set()) | own.get((layout, site), set())
                    place = store.locate(
                        self.space, texts=[text(i) for i in NUMBERS], text_context=CONTEXT, sites=[site], layout=layout
                    )
                    assert set(np.flatnonzero(place.found).tolist()) == expected, (host, layout, site)
                    for i in expected:
                        rows = place.rows(i)[0] if layout == TOKENS else place.take(index=[i])[0]
                        np.testing.assert_array_equal(rows, self._values(i, site, dim, layout))
        self.backend.faults, self.backend.late = broken


ElsewhereMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestElsewhereMachine = pytest.mark.slow(ElsewhereMachine.TestCase)

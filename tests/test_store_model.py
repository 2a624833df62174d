"""The store against a dictionary: any sequence of operations, on two hosts, in every layout, width and dtype."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actcache.store.growing import GrowingFile
from actcache.store.records import TOKENS, Records
from actcache.store.store import Store
from store_helpers import CONTEXT, growing_writer, make_table, text, vector

GB = 2**30
NUMBERS = range(24)
# Sites of different widths; those of one line are written together, or one of them alone.
FORMS: dict[str, tuple[str, dict[str, int], Any]] = {
    "pooled": ("last_token", {"resid_post.0": 8, "resid_post.1": 8, "mlp_act.0": 19}, np.float32),
    "halves": ("mean", {"resid_post.0": 8, "resid_post.1": 8}, np.float16),
    "whole": (TOKENS, {"resid_post.0": 5, "z.1": 12}, np.float32),
}
some_numbers = st.lists(st.sampled_from(list(NUMBERS)), min_size=1, max_size=8)


def values(i: int, site: str, dim: int, version: int, tokens: int, dtype: Any) -> np.ndarray:
    """What version `version` of a prompt has at `site`: rows ``[tokens, dim]``."""
    steps = np.arange(tokens, dtype=np.float32)[:, None]
    return ((vector(i, site, dim) + steps) * (1 + version % 7)).astype(dtype)


class StoreMachine(RuleBasedStateMachine):
    """`model[layout, site][i]` is the version that must be read, as long as it has not been evicted."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="actcache-model-"))
        self.hosts = [self._open("one"), self._open("two")]
        self.space = self.hosts[0].open_space({"weights": "abc"}, {"model_name": "org/model"})
        self.hosts[1].open_space({"weights": "abc"}, {"model_name": "org/model"})
        self.model: dict[tuple[str, str], dict[int, int]] = {}
        self.version = 0
        self.writers = [growing_writer(host, self.space) for host in self.hosts]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for host in self.hosts:
                host.close()
            shutil.rmtree(self.folder)

    def _open(self, name: str) -> Store:
        return Store(self.folder / "store", index_dir=self.folder / name)

    @rule(
        host=st.integers(0, 1), form=st.sampled_from(sorted(FORMS)), numbers=some_numbers, data=st.data(),
        growing=st.booleans(),
    )  # fmt: skip
    def write(self, host: int, form: str, numbers: list[int], data: st.DataObject, growing: bool) -> None:
        """Prompts may occur twice in a batch, and may be there already; the last one counts."""
        layout, widths, dtype = FORMS[form]
        sites = data.draw(st.lists(st.sampled_from(sorted(widths)), min_size=1, unique=True))
        table = make_table(numbers)
        columns: dict[str, list[np.ndarray]] = {site: [] for site in sites}
        for i in numbers:
            self.version += 1
            for site in sites:
                tokens = 1 + i % 7 if layout == TOKENS else 1
                columns[site].append(values(i, site, widths[site], self.version, tokens, dtype))
                self.model.setdefault((layout, site), {})[i] = self.version
        rows = {site: np.concatenate(parts) for site, parts in columns.items()}
        made = Records.tokens(table, rows) if layout == TOKENS else Records.pooled(table, layout, rows)
        if growing:
            self.writers[host].append([made])
        else:
            self.hosts[host].append(self.space, made)

    @rule(host=st.integers(0, 1), in_place=st.booleans(), merge=st.booleans())
    def finish(self, host: int, in_place: bool, merge: bool) -> None:
        """What grew becomes segments, where it is or elsewhere."""
        with mock.patch.object(GrowingFile, "is_well_filled", in_place):
            self.writers[host].finish(merge)

    @rule(host=st.integers(0, 1), numbers=some_numbers, as_text=st.booleans())
    def invalidate(self, host: int, numbers: list[int], as_text: bool) -> None:
        held = {i for versions in self.model.values() for i in versions}
        prompts: Any = [text(i) for i in numbers] if as_text else make_table(numbers)
        assert self.hosts[host].invalidate(self.space, prompts) == len(held & set(numbers))
        for versions in self.model.values():
            for i in numbers:
                versions.pop(i, None)

    @rule(host=st.integers(0, 1))
    def merge(self, host: int) -> None:
        self.hosts[host].merge(self.space)

    @rule(host=st.integers(0, 1))
    def compact(self, host: int) -> None:
        self.hosts[host].compact()

    @rule(host=st.integers(0, 1), share=st.floats(0.2, 1.1))
    def evict(self, host: int, share: float) -> None:
        """What goes is for the store to choose; the size is not."""
        store = self.hosts[host]
        before = self._on_disk(store)
        report = store.evict(share * before / GB)
        after = self._on_disk(store)
        assert after == report.bytes_kept
        # The last tombs stay for an hour, since a merge elsewhere may still need them.
        assert after <= max(before if share >= 1 else int(share * before), 0) or not list(
            store.root.rglob("*.safetensors")
        )
        lost: set[int] = set()
        for (layout, site), versions in self.model.items():
            place = store.locate(self.space, table=make_table(NUMBERS), sites=[site], layout=layout, check=False)
            # An older copy may come to light where a newer one went: it is what was stored, only older.
            for k in range(len(NUMBERS)):
                if not place.found[k]:
                    lost |= {k} & versions.keys()
                    versions.pop(k, None)
                elif k in versions:
                    versions[k] = self._version_of(place, k, site, layout)
        assert report.prompts >= len(lost)
        assert share < 1 or not lost

    def _on_disk(self, store: Store) -> int:
        status = [f.stat() for f in store.root.rglob("*") if f.is_file() and f.suffix != ".tmp"]
        return sum(min(s.st_size, 512 * s.st_blocks) for s in status)

    def _version_of(self, place: Any, k: int, site: str, layout: str) -> int:
        form = next(f for f in FORMS.values() if f[0] == layout)
        tokens = 1 + k % 7 if layout == TOKENS else 1
        rows = place.rows(k)[0] if layout == TOKENS else place.take(index=[k])[0]
        for version in range(7):
            if np.array_equal(rows, values(k, site, form[1][site], version, tokens, form[2])):
                return version
        raise AssertionError(f"prompt {k} at {site}: not any version of it")

    @rule(host=st.integers(0, 1), forget=st.booleans())
    def reopen(self, host: int, forget: bool) -> None:
        """The process ends; with `forget` the index of the host is lost, too."""
        self.hosts[host].close()
        for file in self.writers[host]._files.values():
            file.close()
        if forget:
            shutil.rmtree(self.folder / ("one", "two")[host], ignore_errors=True)
        self.hosts[host] = self._open(("one", "two")[host])
        self.hosts[host].open_space({"weights": "abc"}, {"model_name": "org/model"})
        self.writers[host] = growing_writer(self.hosts[host], self.space)

    @precondition(lambda self: any(self.model.values()))
    @rule(host=st.integers(0, 1))
    def clear(self, host: int) -> None:
        held = {i for versions in self.model.values() for i in versions}
        assert self.hosts[host].clear() == len(held)
        self.model.clear()

    @rule(host=st.integers(0, 1), repair=st.booleans())
    def verify(self, host: int, repair: bool) -> None:
        report = self.hosts[host].verify(repair)
        assert report.ok
        assert report.damaged == []

    @invariant()
    def every_host_reads_what_the_dictionary_says(self) -> None:
        if not hasattr(self, "model"):
            return
        held = {i for versions in self.model.values() for i in versions}
        for host in self.hosts:
            assert host.contains(self.space, [text(i) for i in NUMBERS]).tolist() == [i in held for i in NUMBERS]
            for layout, widths, dtype in FORMS.values():
                for site, dim in widths.items():
                    versions = self.model.get((layout, site), {})
                    place = host.locate(
                        self.space, texts=[text(i) for i in NUMBERS], text_context=CONTEXT, sites=[site], layout=layout
                    )
                    assert np.flatnonzero(place.found).tolist() == sorted(versions)
                    for i, version in versions.items():
                        tokens = 1 + i % 7 if layout == TOKENS else 1
                        rows = place.rows(i)[0] if layout == TOKENS else place.take(index=[i])[0]
                        np.testing.assert_array_equal(rows, values(i, site, dim, version, tokens, dtype))


StoreMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreMachine = StoreMachine.TestCase

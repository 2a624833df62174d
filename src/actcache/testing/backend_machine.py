"""A backend against a dictionary: hypothesis looks for steps after which they differ."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from actcache.store.backend import CacheBackend

NAMES = ["a", "b", "v1/a", "v1/s/a", "v1/s/b", "v1/st/a", "v1-/a", "w/x/y/z"]
PREFIXES = ["", "v1/", "v1/s/", "v1/st/", "v1-/", "v/", "w/x/", "none/"]


def content(name: str) -> bytes:
    """What is put under a name, always: an object does not change."""
    return name.encode() * (len(name) * 97 % 400)


def like_a_dictionary(backend: CacheBackend, other: CacheBackend, *, steps: int = 25, examples: int = 25) -> None:
    """Run the machine on the empty place of `backend` and `other`, which by turns do and see every step."""
    both = (backend, other)
    sides = st.sampled_from([0, 1])
    names = st.sampled_from(NAMES)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.model: dict[str, bytes] = {}

        @rule(side=sides, name=names, as_array=st.booleans())
        def put(self, side: int, name: str, as_array: bool) -> None:
            data = content(name)
            both[side].put(name, bytearray(data) if as_array else data)
            self.model[name] = data

        @rule(side=sides, name=names)
        def delete(self, side: int, name: str) -> None:
            both[side].delete(name)
            self.model.pop(name, None)

        @rule(side=sides, name=names, start=st.integers(0, 900), length=st.none() | st.integers(0, 900))
        def read(self, side: int, name: str, start: int, length: int | None) -> None:
            stop = None if length is None else start + length
            try:
                found: bytes | None = bytes(both[side].read(name, start, stop))
            except FileNotFoundError:
                found = None
            data = self.model.get(name)
            assert found == (None if data is None else data[start:stop])

        @rule(side=sides, prefix=st.sampled_from(PREFIXES))
        def listed(self, side: int, prefix: str) -> None:
            found = sorted((o.name, o.size) for o in both[side].list(prefix))
            assert found == sorted((n, len(d)) for n, d in self.model.items() if n.startswith(prefix))

        @invariant()
        def is_the_same(self) -> None:
            assert sorted(o.name for o in backend.list()) == sorted(self.model)

        def teardown(self) -> None:
            for name in self.model:
                backend.delete(name)

    checks = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Machine, settings=checks)

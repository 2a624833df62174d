"""The public surface changes only on purpose."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path

import actcache as ac
import public_names

SNAPSHOT = Path(__file__).parent / "snapshots" / "public_names.txt"


def test_names_and_signatures_are_those_that_were_agreed() -> None:
    known = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    now = list(public_names.lines())
    changes = list(difflib.unified_diff(known, now, "agreed", "now", lineterm="", n=0))
    assert not changes, "\n".join(
        [*changes, "On purpose: python tests/public_names.py > tests/snapshots/public_names.txt"]
    )


def test_every_public_name_has_a_docstring() -> None:
    without = []
    for name in ac.__all__:
        value = getattr(ac, name)
        if callable(value) and not inspect.getdoc(value):
            without.append(name)
        if inspect.isclass(value) and not issubclass(value, BaseException):
            ours = [base for base in value.__mro__ if base.__module__.startswith("actcache")]
            for inner in {n for base in ours for n in vars(base) if not n.startswith("_")}:
                member = inspect.getattr_static(value, inner)
                if (inspect.isfunction(member) or isinstance(member, property)) and not inspect.getdoc(member):
                    without.append(f"{name}.{inner}")
    assert without == []


def test_a_change_is_seen() -> None:
    def before(a: int) -> str: ...
    def after(a: int, b: int = 0) -> str: ...

    assert list(public_names.described("f", before)) != list(public_names.described("f", after))

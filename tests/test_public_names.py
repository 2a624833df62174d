"""The public surface changes only on purpose."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def raised_by(function: Callable[..., Any]) -> set[str]:
    """The classes of errors that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    given = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    classes = [one.func if isinstance(one, ast.Call) else one for one in given]
    return {one.id for one in classes if isinstance(one, ast.Name) and one.id[0].isupper()}


def described_functions() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Every public function and method that is ours: its name, itself, and where its errors may be told."""
    for name in ac.__all__:
        value = getattr(ac, name)
        if inspect.isfunction(value):
            yield name, value, inspect.getdoc(value) or ""
        for base in value.__mro__ if inspect.isclass(value) else ():
            for inner, member in vars(base).items() if base.__module__.startswith("actcache.") else ():
                function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
                if not inspect.isfunction(function) or (inner.startswith("_") and inner != "__init__"):
                    continue
                # Of a dataclass nobody has written it.
                if function.__code__.co_filename.startswith("<"):
                    continue
                told = [inspect.getdoc(function), *(one.__doc__ for one in value.__mro__)]
                yield f"{name}.{inner}", function, " ".join(filter(None, told))


def test_every_public_function_tells_what_it_raises() -> None:
    untold = {name: raised_by(function) - set(words_of(told)) for name, function, told in described_functions()}
    assert {name: classes for name, classes in untold.items() if classes} == {}


def words_of(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text).split()


def test_an_error_that_is_not_told_is_seen() -> None:
    def refuses(a: int) -> None:
        if a:
            raise ValueError(a)
        raise

    assert raised_by(refuses) == {"ValueError"}

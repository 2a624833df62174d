"""Rooms import downwards only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import actcache

PACKAGE = Path(actcache.__file__).parent
# From the ground up; rooms of one floor do not import each other, except where ALLOWED says so.
FLOORS = (
    ("errors", "config", "progress", "wording", "written", "_version", "_callable_room"),
    ("model",),
    ("store", "capture"),
    ("derive",),
    ("extract",),
    ("share", "stream"),
    ("unified",),
    ("selftest", "probing", "distributed"),
    ("report",),
    ("cli",),
    ("demo", "testing", "__main__"),
)
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
ALLOWED = {
    ("config", "errors"),
    ("progress", "errors"),
    ("progress", "config"),
    ("__main__", "cli"),
    ("stream", "share"),
}
# Outside tests, only the verbs that run the demo or its model may.
DEMO_VERBS = ("cli/demo.py", "cli/selftest.py")
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "sklearn",
    "pyarrow",
    "matplotlib",
    "ray",
    "nnsight",
    "obstore",
    "pandas",
}
NO_TORCH_ROOMS = ("errors", "config", "progress", "store", "cli", "demo", "__init__")


def modules() -> list[str]:
    return sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def imports(tree: ast.AST, *, module_level: bool = False) -> Iterator[str]:
    """Full names of imported modules; with `module_level` only those that importing the file imports."""
    for node in ast.iter_child_nodes(tree):
        if module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            # Names for annotations are no dependency at run time.
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node, module_level=module_level)


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(m) for m in modules()} - {"__init__"}
    assert rooms <= set(LEVEL), f"say in FLOORS where {rooms - set(LEVEL)} stand"


def test_no_module_is_two_rooms() -> None:
    """About 400 lines are one subject: what has outgrown this is split."""
    lengths = {module: (PACKAGE / module).read_text(encoding="utf-8").count("\n") for module in modules()}
    assert not {module: length for module, length in lengths.items() if length > 420}


@pytest.mark.parametrize("module", modules())
def test_imports_go_downwards(module: str) -> None:
    room = room_of(module)
    if room == "__init__":
        return
    for name in imports(ast.parse((PACKAGE / module).read_text())):
        parts = name.split(".")
        if parts[0] != "actcache" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        target = parts[1]
        if target == room or (room, target) in ALLOWED or (module in DEMO_VERBS and target == "demo"):
            continue
        assert LEVEL[target] < LEVEL[room], f"{module} imports {name}, which stands on or above its floor"


@pytest.mark.parametrize("module", [m for m in modules() if room_of(m) in NO_TORCH_ROOMS])
def test_light_rooms_import_nothing_heavy(module: str) -> None:
    found = {name.split(".")[0] for name in imports(ast.parse((PACKAGE / module).read_text()), module_level=True)}
    assert not found & HEAVY


def test_the_check_sees_what_it_should() -> None:
    source = """
from typing import TYPE_CHECKING
import actcache.store.store
if TYPE_CHECKING:
    import torch
def f():
    from actcache import unified
class C:
    import numpy
"""
    assert list(imports(ast.parse(source))) == [
        "typing", "typing.TYPE_CHECKING", "actcache.store.store", "actcache", "actcache.unified", "numpy",
    ]  # fmt: skip
    assert "actcache.unified" not in list(imports(ast.parse(source), module_level=True))

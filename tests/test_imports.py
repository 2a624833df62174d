"""The face: public names are loaded lazily, and importing the package costs next to nothing."""

from __future__ import annotations

import ast
import inspect
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import actcache as ac

HEAVY = ("torch", "transformers", "numpy", "rich", "click", "huggingface_hub", "safetensors")
FACE = Path(ac.__file__)
# Rooms that are named as their main function.
ROOMS = ("capture", "selftest")


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = python("-c", "import sys, actcache; print(*sys.modules)").split()
    assert "actcache" in loaded
    assert not set(HEAVY) & set(loaded)


def test_asking_for_the_cache_report_imports_no_torch() -> None:
    loaded = python("-c", "import sys, actcache; actcache.cache_info(); print(*sys.modules)").split()
    assert "actcache.store.store" in loaded
    assert not {"torch", "transformers"} & set(loaded)


@pytest.mark.slow
def test_importing_the_package_is_quick() -> None:
    def seconds(statement: str) -> float:
        """Of the processor: the clock on the wall tells what else the machine does."""
        before = os.times()
        python("-c", statement)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    rounds = [(seconds("pass"), seconds("import actcache")) for _ in range(11)]
    assert statistics.median(with_it - without for without, with_it in rounds) < 0.060


@pytest.mark.parametrize("name", ac.__all__)
def test_every_public_name_loads_and_is_described(name: str) -> None:
    value = getattr(ac, name)
    assert name in dir(ac)
    if name != "__version__":
        assert inspect.getdoc(value)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(FACE.read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            seen[alias.asname or alias.name] = (node.module, alias.name)
    assert sorted(seen) == sorted(ac.__all__) == sorted(ac._PUBLIC)
    for name, (module, attribute) in seen.items():
        loaded = sys.modules.get(f"{module}.{attribute}") or getattr(
            __import__(str(module), fromlist=[attribute]), attribute
        )
        if name not in ROOMS:
            assert getattr(ac, name) is loaded


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_stands_for_its_main_function(name: str) -> None:
    python("-c", f"import actcache.{name}; import actcache as ac; assert callable(ac.{name})")
    python("-c", f"import actcache as ac; f = ac.{name}; import actcache.{name} as room; assert f is room is ac.{name}")


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'UnifiedCache'"):
        _ = ac.UnifedCache  # type: ignore[attr-defined]


def test_the_tiny_models_come_with_their_package_and_no_sooner() -> None:
    code = "import sys, actcache.testing.hub; print('torch' in sys.modules)\nfrom actcache.testing import tiny_model"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False"]
    with pytest.raises(ImportError, match="tiny_modl"):
        from actcache.testing import tiny_modl  # noqa: F401

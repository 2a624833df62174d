"""What a wheel holds, and what the Makefile refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import actcache as ac

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    assert made.stat().st_size < 10 * 2**20
    return zipfile.ZipFile(made)


def test_the_wheel_holds_the_package_its_types_and_the_demo_model(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*.py")}
    assert sources <= names
    model = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {"actcache/py.typed"} | {f"actcache/demo/model/{name}" for name in model} <= names
    assert {"actcache/capture/lens.css", "actcache/capture/lens.js"} <= names
    assert {name.split("/")[0] for name in names} == {"actcache", f"actcache-{ac.__version__}.dist-info"}


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"actcache-{ac.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == ac.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    needed = {r.split(";")[0].split(">")[0].strip() for r in metadata.get_all("Requires-Dist") if "extra ==" not in r}
    assert needed == {
        "torch", "transformers", "safetensors", "numpy", "ml-dtypes", "huggingface-hub", "xxhash", "platformdirs",
        "tqdm", "click", "rich",
    }  # fmt: skip
    assert set(metadata.get_all("Provides-Extra")) == {"demo", "dev", "hub", "nnsight", "probe", "ray", "s3", "viz"}
    assert "actcache = actcache.cli.app:main" in wheel.read(f"{info}/entry_points.txt").decode()


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_alone_lists_what_there_is() -> None:
    done = make()
    assert done.returncode == 0
    for target in (
        "venv",
        "venv-peers",
        "venv-lmprobe",
        "venv-swift",
        "demo",
        "test",
        "test-all",
        "coverage",
        "mutations",
        "lint",
        "types",
        "bench",
        "bench-peers",
        "docs",
        "format",
    ):
        assert f"\n  {target} " in done.stdout


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; *) echo 3.9.2;; esac\n')
    old.chmod(0o755)
    done = make("venv", f"PYTHON={old}", "VENV=" + str(tmp_path / "venv"))
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "3.9.2" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_not_there_is_refused() -> None:
    done = make("venv", "PYTHON=python-that-is-not-there")
    assert done.returncode != 0
    assert "does not run" in done.stderr

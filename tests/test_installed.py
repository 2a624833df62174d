"""Wheel and source distribution are built, installed into environments of their own, and used from elsewhere."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import actcache as ac

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SMOKE = Path(__file__).with_name("installed_smoke.py")
MEGABYTE = 2**20


class Built(NamedTuple):
    """What is published, and the wheel that is made out of the source distribution alone."""

    wheel: Path
    sources: Path
    again: Path


def hatchling(folder: Path, out: Path, *targets: str) -> None:
    wanted = [word for target in targets for word in ("-t", target)]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", *wanted, "-d", str(out)],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    hatchling(ROOT, folder / "dist", "wheel", "sdist")
    (wheel,), (sources,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sources) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    hatchling(folder / "unpacked" / f"actcache-{ac.__version__}", folder / "again", "wheel")
    (again,) = (folder / "again").glob("*.whl")
    return Built(wheel, sources, again)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_both_are_small(built: Built) -> None:
    assert built.wheel.stat().st_size < 12 * MEGABYTE
    assert built.sources.stat().st_size < 12 * MEGABYTE


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    info = f"actcache-{ac.__version__}.dist-info/"
    held = {name for name in contents(built.wheel) if not name.startswith(info)}
    package = {
        file.relative_to(ROOT / "src").as_posix()
        for file in (ROOT / "src" / "actcache").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == package
    assert {"actcache/py.typed", "actcache/demo/model/model.safetensors", "actcache/report/page.css"} <= held


def test_the_sources_hold_what_developing_takes_and_no_litter(built: Built) -> None:
    with tarfile.open(built.sources) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames()}
    wanted = {"Makefile", "mkdocs.yml", "LICENSE", "scripts/make_venv.sh", "tests/conftest.py", "docs/format.md"}
    assert wanted <= held
    litter = ("__pycache__", ".pyc", ".hypothesis", ".pytest_cache", ".venv", "build/", "dist/")
    assert [name for name in held if any(part in name for part in litter)] == []


def test_the_sources_make_the_same_wheel(built: Built) -> None:
    assert contents(built.again) == contents(built.wheel)


@pytest.mark.parametrize("which", ["wheel", "again"])
def test_it_works_where_it_is_installed(built: Built, which: str, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, capture_output=True, timeout=300)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", getattr(built, which)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    # What the package needs is taken from the environment of these tests, which spares a download of torch; an editable
    # install of the package there is not: paths that a `.pth` file adds are not searched for others.
    (here,) = environment.glob("lib/python*/site-packages")
    (here / "dependencies.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ACTCACHE_"))}
    done = subprocess.run(
        [python, "-I", SMOKE, elsewhere],
        cwd=elsewhere,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.splitlines()[-1] == "all of it works"

"""Stands for `pip install` where a page is tried: refuses what is not this project, nor a package of the page."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text("utf-8"))["project"]


def install(folder: Path) -> None:
    """Put the modules of a package and its entry points where the page's process finds them: into its own folder."""
    said = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    about = said["project"]
    assert all(re.fullmatch(r"actcache(\[[\w,]+\])?", wanted) for wanted in about["dependencies"]), about
    for module in said["tool"]["setuptools"]["py-modules"]:
        shutil.copy(folder / f"{module}.py", ".")
    place = Path(f"{about['name']}-{about['version']}.dist-info")
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in about["entry-points"].items()
    )
    (place / "entry_points.txt").write_text(points)


def main(arguments: list[str]) -> int:
    command, *wanted = arguments
    assert command == "install" and wanted, arguments
    for requirement in wanted:
        if requirement.startswith("./"):
            install(Path(requirement))
            continue
        found = re.fullmatch(r"(actcache|\.)(?:\[([\w,]+)\])?", requirement)
        assert found, requirement
        extras = set(found[2].split(",")) if found[2] else set()
        assert extras <= set(PROJECT["optional-dependencies"]), extras
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

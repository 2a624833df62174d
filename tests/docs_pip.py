"""Stands for `pip install` where a page is tried: refuses what would not install this project."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text("utf-8"))["project"]


def main(arguments: list[str]) -> int:
    command, *wanted = arguments
    assert command == "install" and wanted, arguments
    for requirement in wanted:
        found = re.fullmatch(r"(actcache|\.)(?:\[([\w,]+)\])?", requirement)
        assert found, requirement
        extras = set(found[2].split(",")) if found[2] else set()
        assert extras <= set(PROJECT["optional-dependencies"]), extras
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

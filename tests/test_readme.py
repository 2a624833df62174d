"""What the README shows works as it stands there; `test_docs.py` runs all of its blocks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from documents import ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_script_runs_as_pasted_and_finds_what_it_has_stored(tmp_path: Path) -> None:
    first = next(block for block in blocks(README) if block.language == "python")
    (tmp_path / "example.py").write_text(first.code, encoding="utf-8")
    outputs = [
        subprocess.run(
            [sys.executable, "example.py"], capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout.splitlines()
        for _ in range(2)
    ]
    assert outputs[0][0] == "3 computed, 0 found"
    assert outputs[1][0] == "0 computed, 3 found"
    assert "second time `0 computed, 3 found`" in README
    assert outputs[0][1:] == outputs[1][1:]
    assert outputs[0][-1].split("  ")[-2].startswith("' Paris'")


def test_it_is_short() -> None:
    """It is read in two minutes; all that is more belongs into docs/."""
    assert len(re.findall(r"\w+", README)) < 1600


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    package = ROOT / "src" / "actcache"
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        if path != "example.py":
            assert any((place / path).exists() for place in (ROOT, package)), path


def test_every_page_of_the_site_is_reached_from_it() -> None:
    reached = set(re.findall(r"\]\((docs/[^)#]+)\)", README))
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")}
    # The site's own first page, and the reference, which is read on the site.
    assert not {page for page in pages - reached if page != "docs/index.md" and "/reference/" not in page}

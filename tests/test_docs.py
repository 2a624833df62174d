"""Every code block of the README and of the documentation runs, in the order in which a reader meets it."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import actcache as ac

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PRELUDES = Path(__file__).parent / "docs_preludes"
"""What a page takes for granted: scripts that make it, by the name of the page."""
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for _, named, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if named == language]


def run(code: str, page: str, folder: Path) -> None:
    """Run a script behind the prelude of its page."""
    prelude = PRELUDES / f"{Path(page).with_suffix('').as_posix().replace('/', '_')}.py"
    script = folder / "page.py"
    script.write_text((prelude.read_text(encoding="utf-8") if prelude.exists() else "") + code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in PAGES if blocks(DOCS / name, "python")])
def test_python_runs(page: str, tmp_path: Path) -> None:
    run("\n".join(blocks(DOCS / page, "python")), page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in PAGES if blocks(DOCS / name, "sh")])
def test_commands_run(page: str, tmp_path: Path) -> None:
    shell = f'set -e\nactcache() {{ "{sys.executable}" -m actcache "$@"; }}\n' + "\n".join(blocks(DOCS / page, "sh"))
    run(f"import subprocess\n\nraise SystemExit(subprocess.run(['sh', '-c', {shell!r}]).returncode)\n", page, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page: str) -> None:
    """A block that is to be run has the language of what runs it; anything else has none, or one of these."""
    for _, language, _ in _BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        assert language in ("", "python", "sh", "json", "yaml", "toml"), language


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(_BLOCK, "", (DOCS / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (DOCS / page).parent / path if path else DOCS / page
        assert file.exists() and file.resolve().is_relative_to(DOCS), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads], target


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    reference = (tmp_path / "site" / "reference" / "extraction.html").read_text(encoding="utf-8")
    assert "compute_perplexity_from_cache" in reference


def test_every_public_name_is_in_the_reference() -> None:
    listed = set()
    for page in (DOCS / "reference").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            listed.add(path.rpartition(".")[2])
            # Of a module all that is public in it is shown.
            with contextlib.suppress(ImportError):
                listed.update(vars(importlib.import_module(path)))
    renamed = {"sites": "list_sites", "__version__": "errors", "DEFAULT_SHARD_BYTES": "push_dataset"}
    assert not {name for name in ac.__all__ if renamed.get(name, name) not in listed}

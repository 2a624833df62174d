"""Every code block of the README and of the documentation is run, or held against something, by a test."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import actcache as ac
from actcache.cli.app import VERBS
from documents import DOCS, ROOT, RUN, blocks, complaints, layouts, prose, run

PAGES = ["README.md", *sorted(page.relative_to(ROOT).as_posix() for page in DOCS.rglob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language in RUN for b in blocks(read(page)))])
def test_it_runs_as_it_stands_there(page: str, tmp_path: Path) -> None:
    run(read(page), tmp_path)


@pytest.mark.slow
def test_the_backend_that_a_page_writes_passes_the_tests_it_names(tmp_path: Path) -> None:
    code = [block.code for block in blocks(read("docs/buckets.md")) if block.language == "python"]
    (made,) = [text.split("\n\n\nwith ac.Store(")[0] for text in code if "(ac.CacheBackend)" in text]
    (held,) = [text for text in code if "(CacheBackendTests)" in text]
    (tmp_path / "test_mine.py").write_text(f"import actcache as ac\n{made}\n\n{held}", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "test_mine.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.search(r"\b(\d{2,}) passed", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_left_out(page: str) -> None:
    """A block in a language that nothing runs, or in none, would rot."""
    assert not complaints(read(page))


@pytest.mark.parametrize(
    "text",
    [
        "```\nactcache info\n```",
        "```py\nprint()\n```",
        "```console\n$ actcache info\n```",
        "- a list\n\n  ```bash\n  actcache info\n  ```",
        "~~~rust\nfn main() {}\n~~~",
        "A word:\n\n    print('indented')",
        "<pre>print()</pre>",
        "```text\nbehind nothing\n```",
        "```python\nprint(1)\n```\n```json\n{}\n```\n```text\n1\n```",
        "```json\n{1: 2}\n```",
        "```toml\na b\n```",
        "```bibtex\n@software{a,\n```",
    ],
)
def test_what_would_be_left_out_is_found(text: str) -> None:
    assert complaints(f"# A page\n\n{text}\n")


def test_blocks_run_in_order_and_what_they_print_is_compared(tmp_path: Path) -> None:
    page = "```python\nx = 2\n```\n```sh\nA=3; echo $A\n```\n- in a list:\n  ```sh\n  echo $A$A > a\n  ```\n"
    page += "```python\nprint(x, open('a').read())\n```\n```text\n2 33\n```\n"
    assert run(page, tmp_path) == ["", "3\n", "", "2 33\n\n"]
    with pytest.raises(AssertionError, match="2 34"):
        run(page.replace("2 33", "2 34"), tmp_path)
    with pytest.raises(AssertionError):
        run("```sh\nfalse\ntrue\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="2 blocks, and 1 of them"):
        run("```python\nraise SystemExit\n```\n```sh\ntrue\n```\n", tmp_path)


def test_files_have_the_names_that_pages_say(tmp_path: Path) -> None:
    bucket, space = ac.MemoryBackend(), ac.new_space("a model", weights="1")
    for store in (ac.Store(tmp_path / "store"), ac.Store(bucket)):
        for text in ("one", "two"):
            store.write(space, [text], {"resid_post.0": [torch.ones(3, 4)]})
        store.flush()
        store.invalidate(space, ["one"])
        store.flush()
    ac.push_dataset(tmp_path / "set", "a model", None, store=tmp_path / "store", space=space.space)
    made = {
        "docs/format.md": {f"<store>/{name}" for name in files(tmp_path / "store")},
        "docs/buckets.md": {f"<prefix>/{found.name}" for found in bucket.list()},
        "docs/datasets.md": files(tmp_path / "set"),
    }
    for page, names in made.items():
        patterns = layouts(read(page))
        assert len(names) > 1 and patterns
        assert not {name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)}, page


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(page))):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        # The site has nothing but the pages of its folder.
        assert not page.startswith("docs/") or file.resolve().is_relative_to(DOCS), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", prose(file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads], target


def test_the_citation_is_the_same_wherever_it_is_given() -> None:
    about = dict(re.findall(r'^(\S+): "?(.*?)"?$', read("CITATION.cff"), re.MULTILINE))
    (entry,) = [block.code for block in blocks(read("README.md")) if block.language == "bibtex"]
    told = dict(re.findall(r"^  (\w+) = \{+(.*?)\}+,?$", entry, re.MULTILINE))
    (author,) = re.findall(r'^authors = \[\{ name = "(.*)" \}\]$', read("pyproject.toml"), re.MULTILINE)
    assert told["title"] == about["title"] and about["version"] == ac.__version__ and about["license"] == "Apache-2.0"
    assert told["author"] == author and f"  - name: {author}\n" in read("CITATION.cff")


def test_every_page_can_be_found_in_the_navigation() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", read("mkdocs.yml"), re.MULTILINE)
    assert sorted(f"docs/{page}" for page in listed) == [page for page in PAGES if page.startswith("docs/")]


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


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_names_and_verbs_that_are_spoken_of_exist(page: str) -> None:
    for code in re.findall(r"`([^`\n]+)`", prose(read(page))):
        for dotted in re.findall(r"\bac\.([A-Za-z_][\w.]*\w)", code):
            found: object = ac
            for name in dotted.split("."):
                assert hasattr(found, name), f"ac.{dotted}"
                found = getattr(found, name)
        for verb in re.findall(r"^actcache ([a-z][a-z-]*)", code):
            assert verb in VERBS, code

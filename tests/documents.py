"""Code blocks of a page of the documentation: found as Markdown has them, and run one after the other."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
STANDINS = Path(__file__).parent / "docs_bin"
"""Commands that a page names and a test must not run as they are: `make`, `pip`."""

RUN = ("python", "sh")
SHOWN = ("text", "layout", "json", "toml", "bibtex")
"""What is no program. `text` is what the block before it prints; `layout` is what names files have."""
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_DECIMAL = re.compile(r"-?\d+\.\d+")
_SAID = "\x00block {}\x00"


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """Every fenced block, also those in lists, of other fences and without a language."""
    found: list[Block] = []
    lines = text.split("\n")
    start = 0
    while start < len(lines):
        opened = _FENCE.match(lines[start])
        if not opened:
            start += 1
            continue
        indent, fence, language = opened.groups()
        end = start + 1
        while end < len(lines) and not re.fullmatch(rf" *{fence[0]}{{{len(fence)},}} *", lines[end]):
            end += 1
        if end == len(lines):
            raise ValueError(f"line {start + 1}: a block that is never closed")
        code = "\n".join(line.removeprefix(indent) for line in lines[start + 1 : end]) + "\n"
        found.append(Block(language.strip(), code, start + 1))
        start = end + 1
    return found


def prose(text: str) -> str:
    """`text` without its fenced blocks; lines keep their numbers."""
    lines = text.split("\n")
    for block in blocks(text):
        for number in range(block.line - 1, block.line + block.code.count("\n") + 1):
            lines[number] = ""
    return "\n".join(lines)


def complaints(text: str) -> list[str]:
    """What of `text` looks like code and would be run, or held against anything, by no test."""
    found = []
    before: Block | None = None
    for block in blocks(text):
        if block.language not in (*RUN, *SHOWN):
            found.append(f"line {block.line}: {block.language or 'no language'}")
        elif block.language == "text" and (before is None or before.language not in RUN):
            found.append(f"line {block.line}: text that follows nothing that prints")
        elif why := _unreadable(block):
            found.append(f"line {block.line}: {why}")
        before = block
    lines = prose(text).split("\n")
    for number, line in enumerate(lines[1:], start=2):
        if re.match(r"(    |\t)", line) and not lines[number - 2].strip():
            found.append(f"line {number}: an indented block")
        if "<pre" in line or "<code" in line:
            found.append(f"line {number}: a block in HTML")
    return found


def _unreadable(block: Block) -> str:
    try:
        if block.language == "json":
            json.loads(block.code)
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "bibtex":
            assert re.fullmatch(r"@\w+\{\w+,\n(?:  \w+ = \{.*\},?\n)+\}\n", block.code)
    except (ValueError, AssertionError) as error:
        return f"no {block.language}: {error}"
    return ""


def layouts(text: str) -> list[re.Pattern[str]]:
    """A pattern for each line of every `layout`: `<names>` and `*` stand for anything but a slash."""
    found = []
    for block in blocks(text):
        for line in block.code.splitlines() if block.language == "layout" else []:
            name = re.split(r"\s{2,}", line.strip())[0]
            parts = [re.escape(part).replace(r"\*", "[^/]+") for part in name.split("/")]
            found.append(re.compile(re.sub(r"<(?!store|prefix)\w+>", "[^/]+", "/".join(parts))))
    return found


def run(text: str, folder: Path) -> list[str]:
    """Run the blocks of `text` in their order, as one session in an empty folder; what each of them printed.

    An error where one fails, or prints something else than the `text` that follows it.
    """
    todo = [block for block in blocks(text) if block.language in RUN]
    script: list[str] = []
    for number, block in enumerate(todo):
        script.append(f"print({_SAID.format(number)!r}, end='', flush=True)")
        script.append(block.code if block.language == "python" else f"__import__('docs_shell').run({block.code!r})")
    (folder / "page.py").write_text("\n".join(script), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        "PATH": os.pathsep.join([str(STANDINS), str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "DOCS_PYTHON": sys.executable,
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    said = re.split(r"\x00block \d+\x00", done.stdout)[1:]
    assert len(said) == len(todo), f"{len(todo)} blocks, and {len(said)} of them were run"
    _compare(text, said)
    return said


def _compare(text: str, said: list[str]) -> None:
    """Words have to agree, with `...` for any of them; numbers but for the last digit, which depends on the machine."""
    checker, options = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    number = -1
    for block in blocks(text):
        number += block.language in RUN
        if block.language == "text":
            right = checker.check_output(block.code, _as_told(said[number], block.code), options)
            assert right, f"line {block.line} says\n{block.code}\nand what is printed is\n{said[number]}"


def _as_told(said: str, told: str) -> str:
    """`said`, with the numbers of `told` where they are as good as equal."""
    numbers = iter(_DECIMAL.findall(told))

    def closest(found: re.Match[str]) -> str:
        wanted = next(numbers, "")
        unit = 10.0 ** -len(wanted.partition(".")[2])
        return wanted if wanted and abs(float(wanted) - float(found[0])) < 2.5 * unit else found[0]

    return _DECIMAL.sub(closest, said)

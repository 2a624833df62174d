"""What the README shows works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_python_examples_run_in_order(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks("python")))
    outputs = [
        subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        for _ in range(2)
    ]
    first, second = (output.splitlines() for output in outputs)
    assert first[0].startswith("(3, 2, ")
    assert "0 were stored, 3 extracted" in first
    assert "3 were stored, 0 extracted" in second
    assert first[0] == second[0]


@pytest.mark.slow
def test_the_commands_run_in_order(tmp_path: Path) -> None:
    (commands,) = [b for b in blocks("sh") if "actcache warmup" in b]
    # The environment of the test stands for the one that `make` makes; nobody is there to answer a question.
    commands = commands.replace(". .venv/bin/activate\n", "").replace("clear $MODEL", "clear $MODEL --yes")
    shell = f'set -e\nactcache() {{ "{sys.executable}" -m actcache "$@"; }}\n{commands}'
    done = subprocess.run(
        ["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert "2 prompts: 0 were stored, 2 extracted" in done.stdout
    assert "to extract       2 prompts" in done.stdout
    assert "Big Ben is in the city of" in done.stdout
    assert "4 prompts deleted" in done.stdout


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name: str) -> None:
    root = README.parent
    text = (root / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (root / target).exists(), target
    package = root / "src" / "actcache"
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert any((place / path).exists() for place in (root, package)), path

"""The notebooks run from the first cell to the last, and say what they are committed with.

Cells of which another processor may make something else have a tag: ``trained`` (numbers that training ends with) and
``found`` (what is found in what was trained, of which only the number of lines is sure).
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: Any) -> str:
    """What a cell prints and shows as text. Progress and warnings go to the other stream."""
    parts = [
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
        if output.get("name") != "stderr"
    ]
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def pictures_of(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def difference(committed: Any, fresh: Any) -> str:
    """What a fresh run of a cell says that the committed one does not, in words; empty where they say the same."""
    tags = committed.metadata.get("tags", [])
    old, new = text_of(committed), text_of(fresh)
    if pictures_of(committed) != pictures_of(fresh):
        return f"{pictures_of(fresh)} pictures where {pictures_of(committed)} are committed"
    if "found" in tags:
        return "" if len(old.splitlines()) == len(new.splitlines()) else f"other lines:\n{old}\n{new}"
    if NUMBER.sub("#", old).split() != NUMBER.sub("#", new).split():
        return f"other words:\n{old}\n{new}"
    apart = 0.25 if "trained" in tags else 0.01
    for a, b in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
        # The last digit of what is printed may be rounded the other way.
        last = 10.0 ** -len(a.partition(".")[2]) if "." in a else 0.0
        if not math.isclose(float(a), float(b), rel_tol=apart, abs_tol=1.01 * last):
            return f"{b} where {a} is committed, in:\n{old}\n{new}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_says_what_is_committed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1] / "src"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    committed = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(committed)
    for cell in code_cells(fresh):
        cell.outputs = []
    client = NotebookClient(fresh, timeout=400, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    for old, new in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert not (said := difference(old, new)), f"{path.name}, cell {old.execution_count}: {said}"


def printed(text: str, *tags: str) -> Any:
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", name="stdout", text=text)])
    cell.metadata["tags"] = list(tags)
    return cell


@pytest.mark.parametrize(
    ("committed", "fresh", "tags"),
    [
        ("layer 3: Paris 0.70", "layer 3: London 0.70", ()),
        ("layer 3: Paris 0.70", "layer 3: Paris 0.75", ()),
        ("layer 3: Paris", "layer 4: Paris", ()),
        ("(568, 6, 128)", "(568, 6)", ()),
        ("epoch 0: unexplained 0.609", "epoch 0: unexplained 0.9", ("trained",)),
        ("epoch 0: unexplained 0.609", "", ("trained",)),
        ("one\ntwo", "one", ("found",)),
    ],
)
def test_a_run_that_says_something_else_is_noticed(committed: str, fresh: str, tags: tuple[str, ...]) -> None:
    assert difference(printed(committed, *tags), printed(fresh))
    assert not difference(printed(committed, *tags), printed(committed))


def test_what_processors_do_otherwise_is_no_difference() -> None:
    assert not difference(printed("mean -7082.79, 0.70"), printed("mean -7083.4,  0.71"))
    assert not difference(printed("494 of 512 features", "trained"), printed("470 of 512 features"))
    noisy = printed("568 prompts are there")
    noisy.outputs.insert(0, nbformat.v4.new_output("stream", name="stderr", text="Loading weights: 7%"))
    assert not difference(printed("568 prompts are there"), noisy)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_is_committed_with_is_whole_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size < 150_000
    assert str(Path.home()) not in path.read_text(encoding="utf-8") and "/tmp/" not in path.read_text(encoding="utf-8")

"""Run the notebooks from the first cell to the last, and keep what they print and draw.

    python scripts/make_notebooks.py [NOTEBOOK ...]

Each runs in an empty folder with an empty store. What a cell says on standard error (bars, warnings) is not kept.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="actcache-notebook-") as folder:
        os.environ.update(
            PYTHONPATH=str(ROOT / "src"), IPYTHONDIR=folder, ACTCACHE_DIR=f"{folder}/store", HF_HUB_OFFLINE="1"
        )
        NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        # When each cell ran is of no use to a reader, and another one every time.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # Of the kernel that happened to run it the name of the language is enough.
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        run(Path(name))
        print(name)

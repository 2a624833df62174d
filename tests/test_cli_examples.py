"""The examples of `--help`, each of them typed as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actcache.cli.examples import EXAMPLES

WRITTEN = ("lens.html", "layer6.safetensors", "all.npz", "store.html", "gpt2.html", "dataset.html")


@pytest.mark.slow
def test_every_example_does_what_it_says(bucket: str, tmp_path: Path) -> None:
    for needed in ("pyarrow", "sklearn"):
        pytest.importorskip(needed)
    script = Path(__file__).with_name("cli_examples.py")
    ran = subprocess.run(
        [sys.executable, script, bucket], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
    )
    assert ran.returncode == 0, ran.stderr
    told = {line: (status, out, err) for line, status, out, err in json.loads(ran.stdout.splitlines()[-1])}
    assert set(told) == {line for lines in EXAMPLES.values() for line in lines}
    for line, (status, out, err) in told.items():
        assert status == 0 and out.strip(), (line, err)
        assert "actcache: " not in err, (line, err)
        if "--json" in line:
            json.loads(out)
    for name in WRITTEN:
        assert (tmp_path / name).stat().st_size > 500, name

    def said(beginning: str) -> str:
        return told[min((line for line in told if line.startswith(f"actcache {beginning}")), key=len)][1]

    assert said("warmup gpt2 --prompt").startswith("1 prompt: 0 were stored, 1 extracted")
    assert said("warmup gpt2 prompts.jsonl").startswith("3 prompts: 0 were stored, 3 extracted")
    assert re.search(r"' Paris'", said('lens gpt2 "The Eiffel'))
    assert said("migrate org/name --dry-run").count("  add  ") > 3 and "removed" in said("migrate org/name")
    assert "1 layer," in said("load org/name") and "12 layers," in said("load ./folder")
    assert said("import vectors.npy").endswith("2 prompts imported.\n")
    assert "0 prompts deleted" not in said("clear gpt2 --space")

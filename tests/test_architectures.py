"""docs/architectures.md is what the selftests of all families give today."""

from __future__ import annotations

import copy
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import actcache as ac
import zoo
from actcache.testing.tiny import FAMILIES

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_architectures.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_architectures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _load()
TEXT = script.DOCUMENT.read_text(encoding="utf-8")
ROWS, MADE_WITH = script.parse(TEXT)


def without_rounding(row: Any) -> tuple[str, dict[str, str], dict[str, str]]:
    """Which values are equal to the last bit depends on the machine."""
    return row.name, {k: "within" if v == "exact" else v for k, v in row.cells.items()}, row.notes


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_row_of_each_family_is_what_its_selftest_gives(family: str) -> None:
    report = ac.selftest(zoo.model_of(family))
    assert report.ok, report.verdict
    expected = [copy.deepcopy(row) for row in ROWS if row.name.split(",")[0] == family]
    made = script.rows_of(family, report)
    if version("transformers").split(".")[0] != MADE_WITH.split(".")[0]:
        # What it records of ModernBERT, for one, has changed.
        for row in (*made, *expected):
            row.cells["hidden_states"] = ""
    made, expected = [without_rounding(row) for row in made], [without_rounding(row) for row in expected]
    assert made == expected, f"run {SCRIPT.name} again"


def test_the_document_has_every_family_and_today_s_text() -> None:
    assert list(dict.fromkeys(row.name.split(",")[0] for row in ROWS)) == list(FAMILIES)
    assert script.render(ROWS, MADE_WITH) == TEXT, f"run {SCRIPT.name} again"


def test_the_document_says_what_is_so() -> None:
    """A few rows by hand."""
    rows = {row.name: row.cells for row in ROWS}
    assert rows["gpt2"]["block"] == "pre-norm"
    assert rows["falcon"]["block"] == "parallel"
    assert rows["falcon"]["resid_mid"] == "-"
    assert rows["bert"]["block"] == "post-norm"
    assert rows["bert"]["final_norm"] == "-"
    assert rows["mamba"]["block"] == "mixer"
    assert rows["mamba"]["hidden_states"] == "out, norm"
    assert rows["llama-dynamic"]["batching"] == "equal"
    assert rows["t5, decoder"]["cross_attn_out"] in ("exact", "within")
    assert rows["t5, encoder"]["cross_attn_out"] == rows["t5, encoder"]["logits"] == "-"
    assert all(row["resid_post"] in ("exact", "within") for row in rows.values())


def test_nothing_wrong_gets_into_the_document() -> None:
    model = zoo.tiny_model("llama", num_hidden_layers=2)
    report = ac.selftest(model, layers="last")
    wrong = ac.SelftestReport(**{**vars(report), "ok": False, "verdict": "Wrong: mlp_out.1"})
    with pytest.raises(SystemExit, match=r"llama: Wrong: mlp_out\.1"):
        script.rows_of("llama", wrong)

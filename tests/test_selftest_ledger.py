"""How a selftest compares numbers: which differences are roundings, and which rows may be excused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actcache.selftest.ledger import Ledger, row_errors, row_scale


def test_a_large_token_hides_no_other() -> None:
    theirs = torch.ones(4, 8)
    theirs[0] *= 1e4
    ours = theirs.clone()
    ours[2, 3] += 1e-3
    assert float(row_errors(ours, theirs, row_scale(theirs))[2]) == pytest.approx(1e-3, rel=1e-3)
    # One that gives almost nothing is measured by the others.
    theirs[3] = 1e-6
    ours = theirs.clone()
    ours[3] += 1e-7
    assert float(row_errors(ours, theirs, row_scale(theirs))[3]) == pytest.approx(1e-7, rel=1e-2)


def compared(ledger: Ledger, check: str, site: str, ours: Tensor, theirs: Tensor, prompt: int = 0) -> bool:
    return ledger.compare(check, site, ours, theirs, row_scale(theirs), prompts=[prompt] * len(ours))


def test_what_is_no_number_is_no_rounding() -> None:
    numbers = torch.ones(2, 3)
    none = torch.tensor([[1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]])
    ledger = Ledger(1e-5)
    ledger.expect("alone", "")
    assert compared(ledger, "alone", "a", none, none.clone())
    assert not compared(ledger, "alone", "b", none, numbers)
    assert not compared(ledger, "alone", "c", numbers, none)
    assert not compared(ledger, "alone", "d", numbers[:, :2], numbers)
    assert not compared(ledger, "alone", "e", torch.full((2, 3), torch.inf), numbers)
    assert not compared(ledger, "alone", "f", numbers, torch.zeros(2, 3))
    verdicts = [cell.verdict for name in "abcdef" if (cell := ledger.cell(name)) is not None]
    assert verdicts == ["exact", "wrong", "wrong", "wrong", "wrong", "wrong"]


def test_the_worst_of_many_comparisons_counts() -> None:
    ledger = Ledger(1e-3)
    ledger.expect("alone", "one by one")
    ledger.expect("padded", "in batches")
    value = torch.ones(3, 2)
    assert compared(ledger, "alone", "embed", value, value)
    assert compared(ledger, "padded", "embed", value * (1 + 1e-4), value)
    cell = ledger.cell("embed")
    assert cell is not None
    assert (cell.verdict, cell.check) == ("within tolerance", "padded")
    assert cell.error == pytest.approx(1e-4, rel=1e-2)
    assert not compared(ledger, "padded", "embed", value * 1.01, value, prompt=7)
    assert compared(ledger, "padded", "embed", value, value)
    cell = ledger.cell("embed")
    assert cell is not None
    assert cell.verdict == "wrong"
    assert "in batches" in str(cell.why) and "prompt 7" in str(cell.why)
    alone, padded = ledger.checks()
    assert (alone.verdict, alone.compared) == ("exact", 1)
    assert (padded.verdict, padded.compared, padded.site) == ("wrong", 3, "embed")


def test_excused_rows_are_left_out_only_where_they_are_off() -> None:
    theirs = torch.ones(3, 2)
    ours = theirs.clone()
    ours[0] *= 2
    ours[1] *= 1 + 1e-4
    for skip, right in [([True, True, False], True), ([False, True, True], False)]:
        ledger = Ledger(1e-3)
        ledger.expect("padded", "")
        assert ledger.compare("padded", "mlp_out.0", ours, theirs, row_scale(theirs), skip=torch.tensor(skip)) == right
        cell = ledger.cell("mlp_out.0")
        assert cell is not None
        assert cell.error == pytest.approx(1e-4 if right else 1.0, rel=1e-2)

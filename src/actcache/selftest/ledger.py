"""Every comparison of a selftest, kept by check and by site."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actcache.errors import ActCacheError
from actcache.selftest.report import Cell, Check, Verdict


@dataclass
class _Record:
    """What was seen of one site in one check, or of a whole check."""

    compared: int = 0
    exact: bool = True
    error: float = -1.0
    where: str | None = None
    wrong: str | None = None


@dataclass
class _Run:
    about: str
    # Whether differences are rounding by their nature, so that they say nothing about a site unless they are too large.
    rounded: bool = False
    sites: dict[str, _Record] = field(default_factory=dict)
    why_not: str | None = None
    broken: str | None = None


class Ledger:
    """Comparisons are noted under a check and a site; `checks` and `cells` sum them up.

    `tolerance`: the largest error that rounding explains.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._runs: dict[str, _Run] = {}

    def expect(self, name: str, about: str, *, rounded: bool = False) -> None:
        """Announce a check; checks are listed in this order. `rounded`: not even correct values are equal bit for bit,
        so that what it finds counts in a cell only when it is wrong."""
        self._runs.setdefault(name, _Run(about, rounded))

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """An error of ours inside the block is what the check found."""
        try:
            yield
        except ActCacheError as error:
            self._runs[name].broken = f"{type(error).__name__}: {error}"

    def not_applicable(self, name: str, why: str) -> None:
        """Say why a check compares nothing."""
        self._runs[name].why_not = why

    def compare(
        self, check: str, site: str, ours: Tensor, theirs: Tensor, *, skip: Tensor | None = None, prompt: int = 0
    ) -> bool:
        """Hold `ours` against `theirs` ``[T, D]``, the values of one prompt; `ours` may be its last row alone. Rows
        marked in `skip` ``[T]`` are left out when they are off by more than the tolerance. Whether it is right."""
        rows = theirs[-len(ours) :]
        if ours.shape != rows.shape:
            shapes = f"has the shape {list(ours.shape)}, not {list(rows.shape)}"
            return self.note(check, site, float("inf"), wrong=shapes)
        if same(ours, rows):
            return self.note(check, site, 0.0)
        errors = row_errors(ours, theirs)
        if skip is not None:
            errors = errors[~(skip[-len(ours) :] & (errors > self.tolerance))]
        error = float(errors.max()) if len(errors) else 0.0
        if error <= self.tolerance:
            return self.note(check, site, error, exact=False)
        tokens = "1 token" if len(theirs) == 1 else f"{len(theirs)} tokens"
        return self.note(check, site, error, wrong=f"is off by {error:.2g} on prompt {prompt} ({tokens})")

    def note(self, check: str, site: str, error: float, *, exact: bool = True, wrong: str | None = None) -> bool:
        """Note one comparison with its result; `exact`: bit for bit. Whether it is right."""
        record = self._runs[check].sites.setdefault(site, _Record())
        record.compared += 1
        record.exact &= exact and wrong is None
        if error > record.error:
            record.error = error
            record.wrong = wrong or record.wrong
        elif wrong is not None:
            record.wrong = record.wrong or wrong
        return wrong is None

    def checks(self) -> list[Check]:
        """Every check that was announced."""
        return [self._check(name, run) for name, run in self._runs.items()]

    def _check(self, name: str, run: _Run) -> Check:
        records = run.sites
        if run.broken is not None:
            return Check(name, run.about, "wrong", why=run.broken)
        if not records:
            return Check(name, run.about, "not applicable", why=run.why_not or "nothing was there to compare.")
        site = max(records, key=lambda s: (records[s].wrong is not None, records[s].error))
        wrong = sum(record.wrong is not None for record in records.values())
        verdict: Verdict = "wrong" if wrong else "exact"
        if not wrong and not all(record.exact for record in records.values()):
            verdict = "within tolerance"
        more = f", and {wrong - 1} other sites" if wrong > 1 else ""
        why = f"{site} {records[site].wrong}{more}" if wrong else None
        compared = sum(record.compared for record in records.values())
        error = records[site].error
        return Check(name, run.about, verdict, error, site if error > 0 else None, compared, why)

    def cell(self, site: str) -> Cell | None:
        """The verdict on one site over all checks; None when it was never compared."""
        found = {
            name: run.sites[site]
            for name, run in self._runs.items()
            if site in run.sites and not (run.rounded and run.sites[site].wrong is None)
        }
        if not found:
            return None
        worst = max(found, key=lambda name: (found[name].wrong is not None, found[name].error))
        record = found[worst]
        verdict: Verdict = "wrong" if record.wrong is not None else "exact"
        if verdict == "exact" and not all(r.exact for r in found.values()):
            verdict = "within tolerance"
        why = None if record.wrong is None else f"{self._runs[worst].about}: {record.wrong}"
        return Cell(site, verdict, record.error, worst if record.error > 0 else None, why)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors hold the same numbers; nan is nan."""
    if ours.dtype != theirs.dtype:
        return False
    return torch.equal(ours, theirs) or bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def row_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """For each row of `ours`, max |difference| / max |value|, float64 ``[T]``; infinite where one has no number.

    `theirs` are all rows of the prompt, the last of which belong to `ours`. A row is measured by its own largest value,
    since the first token of many models is a thousand times larger than the others and would hide them, but by no less
    than that of the prompt's median row: a branch that gives almost nothing still rounds as its input does.
    """
    whole = theirs.double()
    largest = whole.abs().amax(-1)
    scale = torch.maximum(largest, largest.median())[-len(ours) :]
    difference = (ours.double() - whole[-len(ours) :]).abs().amax(-1)
    errors = torch.where(difference > 0, difference / scale, 0.0)
    return torch.where(difference.isnan() | scale.isnan(), torch.inf, errors)


def tolerance_of(dtype: torch.dtype, depth: int) -> float:
    """The largest error between two correct passes of a model in `dtype` over `depth` blocks.

    Another batch means other shapes and other orders of the same sums inside matrix products, so values differ by
    their rounding. float32 and wider: 1e-5, a few times what is measured (at most 3e-6, over all architectures and 48
    blocks), and a hundredth of what a prompt's neighbours do to it when they are not masked. Half precision rounds the
    stream twice in each block, by up to half an eps of its size in either pass: as a random walk that is
    eps * sqrt(2 * depth) of the largest value, with a factor of 2 for the rounding inside the branches. Measured on
    four blocks in bfloat16, over all architectures: at most 2.3e-2, where this allows 4.4e-2.
    """
    eps = torch.finfo(dtype).eps
    return 1e-5 if eps < 1e-6 else 2 * eps * (2 * depth) ** 0.5

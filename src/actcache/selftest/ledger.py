"""Every comparison of a selftest, kept by check and by site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        self,
        check: str,
        site: str,
        ours: Tensor,
        theirs: Tensor,
        scale: Tensor,
        *,
        skip: Tensor | None = None,
        prompts: Sequence[int] = (),
    ) -> bool:
        """Hold rows ``[N, D]`` against those of prompts run alone, whose `scale` ``[N]`` is that of `row_scale`.

        Rows marked in `skip` ``[N]`` are left out when they are off by more than the tolerance. `prompts` says whose
        each row is. Whether everything is right.
        """
        count = len(set(prompts)) or 1
        if ours.shape != theirs.shape:
            shapes = f"has the shape {list(ours.shape)}, not {list(theirs.shape)}"
            return self.note(check, site, float("inf"), wrong=shapes, count=count)
        if same(ours, theirs):
            return self.note(check, site, 0.0, count=count)
        errors = row_errors(ours, theirs, scale)
        if skip is not None:
            errors[skip & (errors > self.tolerance)] = 0
        at = int(errors.argmax())
        error = float(errors[at])
        if error <= self.tolerance:
            return self.note(check, site, error, exact=False, count=count)
        where = f" on prompt {prompts[at]}" if prompts else ""
        return self.note(check, site, error, wrong=f"is off by {error:.2g}{where}", count=count)

    def note(
        self, check: str, site: str, error: float, *, exact: bool = True, wrong: str | None = None, count: int = 1
    ) -> bool:
        """Note the result of comparing the values of `count` prompts; `exact`: bit for bit. Whether it is right."""
        record = self._runs[check].sites.setdefault(site, _Record())
        record.compared += count
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
    if torch.equal(ours, theirs):
        return True
    none = theirs.isnan()
    return bool(none.any()) and bool(((ours == theirs) | (ours.isnan() & none)).all())


def row_scale(values: Tensor) -> Tensor:
    """What errors in the rows of one prompt ``[T, D]`` are measured by, float64 ``[T]``.

    A row is measured by its own largest value, since the first token of many models is a thousand times larger than
    the others and would hide them; but by no less than that of the prompt's median row: a branch that gives almost
    nothing still rounds as its input does.
    """
    largest = values.abs().amax(-1).double()
    return torch.maximum(largest, largest.median())


def row_errors(ours: Tensor, theirs: Tensor, scale: Tensor) -> Tensor:
    """For each row max |difference| / scale, float64 ``[N]``; infinite where one has no number."""
    difference = (ours.double() - theirs.double()).abs().amax(-1)
    errors = torch.where(difference > 0, difference / scale, 0.0)
    return torch.where(difference.isnan() | scale.isnan(), torch.inf, errors)


def tolerance_of(dtype: torch.dtype, depth: int) -> float:
    """The largest error between two correct passes of a model in `dtype` over `depth` blocks.

    Another batch means other shapes and other orders of the same sums inside matrix products, so values differ by
    their rounding. float32 and wider: 1e-5, above what is measured (at most 6e-6, over all architectures and 48
    blocks), and a hundredth of what a prompt's neighbours do to it when they are not masked. Half precision rounds the
    stream twice in each block, by up to half an eps of its size in either pass: as a random walk that is
    eps * sqrt(2 * depth), and random weights, which no training has kept from amplifying what comes in, made four times
    that of it (bfloat16, all architectures, two seeds: at most 5.2e-2 in four blocks, where this allows 8.8e-2). So a
    test in half precision is a coarse one, and what a pass without padding gives bit for bit says more.
    """
    eps = torch.finfo(dtype).eps
    return 1e-5 if eps < 1e-6 else 4 * eps * (2 * depth) ** 0.5

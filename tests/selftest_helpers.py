"""What the reports of selftests say."""

from __future__ import annotations

from typing import Any

import actcache as ac


def wrong_cells(report: ac.SelftestReport) -> set[str]:
    return {cell.site for cell in report.cells if cell.verdict == "wrong"}


def wrong_checks(report: ac.SelftestReport) -> set[str]:
    return {check.name for check in report.checks if check.verdict == "wrong"}


def check(report: ac.SelftestReport, name: str) -> Any:
    return next(check for check in report.checks if check.name == name)

"""What a model has, as a list that is shown as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actcache.model.sites import SiteInfo


class SiteList(list["SiteInfo"]):
    """A list of `SiteInfo`; printed, it has a line for each kind of site, named by the first block that has it."""

    def rows(self) -> list[tuple[str, str, str, str]]:
        """``(site, blocks, shape, read at)`` for each kind of site, in words."""
        families: dict[tuple[str | None, str], list[SiteInfo]] = {}
        for info in self:
            families.setdefault((info.site.stack, info.site.name), []).append(info)
        rows = []
        for members in families.values():
            first = members[0]
            blocks = ranges([info.site.layer for info in members if info.site.layer is not None])
            rows.append((str(first.site), blocks, first.shape, f"{first.side} of {first.path or 'the model'}"))
        return rows

    def __repr__(self) -> str:
        rows = [("site", "blocks", "shape", "read at"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for [0, 1, 2, 3, 5]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)

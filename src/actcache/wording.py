"""Numbers and texts as a person reads them."""

from __future__ import annotations

import math
import re


def size(nbytes: int | None) -> str:
    """``12.3 MB``; one MB is 2**20 bytes."""
    if nbytes is None:
        return "unknown"
    value = float(nbytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1024 or unit == "GB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """``0.8 s``, ``4 min 10 s``, ``3 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def age(seconds: float) -> str:
    """``less than a minute ago``, ``4 min ago``, ``3 h ago``, ``12 days ago``: never more than it is."""
    if seconds < 60:
        return "less than a minute ago"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    return f"{seconds // 3600:.0f} h ago" if seconds < 48 * 3600 else f"{seconds // 86400:,.0f} days ago"


def count(number: int, noun: str) -> str:
    """``1 prompt``, ``1,200 prompts``."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def one_line(text: str, width: int | None = None) -> str:
    """`text` with line ends and other control characters made visible, cut to `width` characters."""
    # What a stranger wrote may hold what moves the cursor or sets the title.
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text.replace("\\", "\\\\"))
    return line if width is None or len(line) <= width else line[: width - 1] + "…"

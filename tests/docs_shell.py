"""Commands of a page of the documentation, one block after the other: variables last, functions and `cd` do not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

_STATE = Path(tempfile.mkdtemp(prefix="actcache-docs-")) / "variables"


def run(commands: str) -> None:
    """Run one block in a shell that ends with its first error; the process ends with it."""
    sys.stdout.flush()
    before = f". '{_STATE}'\n" if _STATE.exists() else ""
    script = f"set -ea\n{before}{commands}\nexport -p > '{_STATE}'\n"
    done = subprocess.run(["sh", "-c", script], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)

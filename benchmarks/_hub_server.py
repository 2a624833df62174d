"""The loopback Hub in a process of its own: ``_hub_server.py FOLDER``.

Prints the environment of its clients as JSON, a token included, and ends when its standard input ends. What large files
it has lies in ``FOLDER/blobs``: emptied, it has none of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKEN = "hf_benchmark"


@contextmanager
def hub(folder: Path) -> Iterator[Path]:
    """A Hub that the client of this process talks to, which must not have been imported; the folder of its files."""
    assert "huggingface_hub" not in sys.modules, "its client reads the address once, at import"
    root = folder / "hub"
    server = subprocess.Popen(
        [sys.executable, __file__, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdin is not None and server.stdout is not None
        os.environ.update(json.loads(server.stdout.readline()))
        os.environ.pop("HF_HUB_OFFLINE", None)
        yield root
        server.stdin.close()
        server.wait(30)
    finally:
        server.kill()


def forget(root: Path) -> None:
    """Remove every large file that the Hub has."""
    for path in (root / "blobs").iterdir():
        path.unlink()


def main() -> None:
    from actcache.testing.hub import LoopbackHub

    root = Path(sys.argv[1])
    with LoopbackHub(root) as server:
        server.tokens.add(TOKEN)
        print(json.dumps({**server.environment(root / "home"), "HF_TOKEN": TOKEN}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

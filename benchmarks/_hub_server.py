"""The loopback Hub in a process of its own: ``_hub_server.py FOLDER``.

Prints the environment of its clients as JSON, a token included; for each line of its standard input, how many bytes it
has sent since it began; and ends when that ends. What large files it has lies in ``FOLDER/blobs``.
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


class Hub:
    """A Hub that runs; `root`: the folder of its files."""

    def __init__(self, root: Path, server: subprocess.Popen[str]) -> None:
        self.root = root
        self._server = server

    def sent(self) -> int:
        """Bytes of the bodies of all its answers until now."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write("\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def forget(self) -> None:
        """Remove every large file that it has."""
        for path in (self.root / "blobs").iterdir():
            path.unlink()


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """A Hub that the client of this process talks to, which must not have been imported."""
    assert "huggingface_hub" not in sys.modules, "its client reads the address once, at import"
    root = folder / "hub"
    server = subprocess.Popen(
        [sys.executable, __file__, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdin is not None and server.stdout is not None
        os.environ.update(json.loads(server.stdout.readline()))
        os.environ.pop("HF_HUB_OFFLINE", None)
        yield Hub(root, server)
        server.stdin.close()
        server.wait(30)
    finally:
        server.kill()


def main() -> None:
    from actcache.testing.hub import LoopbackHub

    root = Path(sys.argv[1])
    with LoopbackHub(root) as server:
        server.tokens.add(TOKEN)
        print(json.dumps({**server.environment(root / "home"), "HF_TOKEN": TOKEN}), flush=True)
        for _ in sys.stdin:
            print(server.sent(), flush=True)


if __name__ == "__main__":
    main()

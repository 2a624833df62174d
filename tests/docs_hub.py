"""What examples of the command line take for granted: a Hub, and the token of one who may write there.

Imported first of all: the Hub's client reads its environment once.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from pathlib import Path

from actcache.testing.hub import LoopbackHub

TOKEN = "hf_documentation"


def serve() -> LoopbackHub:
    """Start the Hub for this process and the commands it runs; it ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="actcache-docs-"))
    hub = LoopbackHub(folder / "hub").__enter__()
    atexit.register(hub.__exit__, None, None, None)
    hub.tokens.add(TOKEN)
    os.environ.update(hub.environment(folder / "home"), HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0")
    return hub

"""The environment in which slow tests compare with other libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import actcache as ac
from conftest import Peers

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.mark.slow
def test_the_peers_are_those_of_the_makefile_and_live_beside_this_package(peers: Peers) -> None:
    lines = re.findall(r"^PEERS(?:_ALONE)? \?= (.*)$", MAKEFILE.read_text(), re.MULTILINE)
    pinned = dict(requirement.split("==") for line in lines for requirement in line.split())
    assert len(pinned) == 4
    found = json.loads(peers.run("installed.py").splitlines()[-1])
    assert found["actcache"] == ac.__version__
    assert found["transformers"].startswith("5.")
    assert {name: found[name] for name in pinned} == pinned

"""Capture and edits inside models that TransformerLens and nnsight made theirs, beside their own hooks."""

from __future__ import annotations

import json

import pytest

from conftest import Peers


@pytest.mark.slow
@pytest.mark.parametrize(("script", "count"), [("inner_hooked.py", 20), ("inner_nnsight.py", 9)])
def test_inside_the_models_of_others(peers: Peers, script: str, count: int) -> None:
    claims = json.loads(peers.run(script).splitlines()[-1])
    assert len(claims) >= count
    assert [claim for claim, holds in claims.items() if not holds] == []

"""Trainers of other libraries take our streams as they are: the examples, run in their environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Peers


@pytest.mark.slow
@pytest.mark.parametrize("example", ["train_sae_lens", "train_dictionary_learning"])
def test_an_autoencoder_learns_single_facts_from_what_is_stored(peers: Peers, tmp_path: Path, example: str) -> None:
    found = json.loads(peers.run("trained.py", example, tmp_path).splitlines()[-1])
    assert found["before"] > 0.5, "before training hardly anything is explained"
    assert found["after"] < 0.05
    # Of the 74 facts, with several features for some of them; none of the vectors' own dimensions does that.
    assert found["single"] >= 30
    assert found["dimensions"] == 0
    assert found["encoded"] == found["found"] == 444
    assert found["again"] == 0
    assert found["apart"] < 1e-4


@pytest.mark.slow
def test_every_kind_of_autoencoder_has_features_of_its_own(peers: Peers, tmp_path: Path) -> None:
    found = json.loads(peers.run("encoded_kinds.py", tmp_path).splitlines()[-1])
    refused = {name: said for name, said in found.items() if isinstance(said, str)}
    assert list(refused) == ["training batchtopk"], refused
    assert "prompts beside it" in refused["training batchtopk"]
    stored = {name: said for name, said in found.items() if name not in refused}
    for name, said in stored.items():
        assert said["apart"] < 1e-4, name
        assert said["active"] > 0, name
        assert said["encoded"] == [50, 0], name
    assert len({said["space"] for said in stored.values()}) == len(stored)

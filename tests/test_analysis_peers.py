"""Sites and analysis are those of TransformerLens, on GPT-2-like and Llama-like models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Peers


@pytest.mark.slow
def test_sites_and_analysis_equal_those_of_transformer_lens(peers: Peers) -> None:
    found = json.loads(peers.run("analysis_numbers.py").splitlines()[-1])
    assert set(found) == {"gpt2", "llama"}
    for family, errors in found.items():
        assert len(errors) > 500
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-5, (family, worst)


@pytest.mark.slow
def test_features_are_those_that_saelens_makes_of_transformer_lens_values(peers: Peers, tmp_path: Path) -> None:
    found = json.loads(peers.run("encode_numbers.py", tmp_path).splitlines()[-1])
    assert set(found) == {"gpt2", "llama", "disk"}
    for errors in found.values():
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-5, worst
    assert len(found["gpt2"]) == len(found["llama"]) >= 28

"""`actcache demo`: the main job runs, says true things, and cleans up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import actcache as ac
from actcache.cli.app import run
from actcache.cli.results.schemas import schema
from actcache.demo import model_path


@pytest.fixture(autouse=True)
def _temporary_files_of_the_test(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Where nothing before has imported torch's compiler, that makes a folder of its own among them.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiler")))


def test_the_demo_runs_and_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["demo"]) == 0
    out = capsys.readouterr().out
    first = re.search(r"first run +0 +240 .* yes", out)
    second = re.search(r"second run +240 +0 .* no", out)
    assert first
    assert second
    difference = re.search(r"largest difference (\S+) in values up to (\S+)", out)
    assert difference
    assert float(difference[1]) <= 1e-5 * float(difference[2])
    # Both tables have a row for each layer; the answer comes out of the last one.
    rows = re.findall(r"^ +(\d+) +(\d+)%  [█·]{24}", out, re.MULTILINE)
    layers = len(rows) // 2
    assert [int(layer) for layer, _ in rows] == [*range(layers), *range(layers)]
    assert max(int(share) for _, share in rows[:layers]) > 70
    assert int(rows[-1][1]) > 50
    assert "most likely" in out
    folder = re.search(r"cache folder (\S+) \(removed at the end\)", out)
    assert folder
    assert Path(folder[1]).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    # The user's own cache is not touched.
    assert ac.cache_info().models == []


def test_a_kept_folder_can_be_looked_into(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--keep"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"Look around: +actcache info --store (\S+)", out)
    assert found
    (model,) = ac.Store(found[1]).info().models
    assert model.model_name == str(model_path())
    assert model.num_prompts > 240
    assert model.has_pooled


def test_without_scikit_learn_it_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actcache.demo.run.find_spec", lambda _: None)
    assert run(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pip install 'actcache[demo]'" in captured.err


@pytest.mark.slow
def test_in_json_it_says_what_it_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(Draft202012Validator(schema("demo", strict=True)).iter_errors(found)) == []
    assert found["second"]["activations_cached"] == found["first"]["activations_extracted"] == 240
    assert found["second"]["weights_loaded"] is False and found["folder"] is None
    assert 0 <= found["difference"] <= 1e-5 * found["largest"]
    assert max(found["accuracy"]) > 0.7 and len(found["accuracy"]) == len(found["chance"]) == 6
    assert found["chance"][-1] > 0.5 and list(tmp_path.iterdir()) == []

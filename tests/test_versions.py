"""transformers 4.57 and 5.x give the same sites and the same numbers, family by family.

The other generation runs in an environment of its own (`make test-all` makes it), saves its models and what it
computes; this one loads the same folders by path.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import actcache as ac
import versions_numbers as numbers
import zoo
import zoo_families

HERE = Path(__file__).parent
OTHER = Path(os.environ.get("ACTCACHE_TF4_PYTHON") or HERE.parent / ".venv-tf4" / "bin" / "python")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not OTHER.exists(), reason=f"no environment with transformers 4.57 at {OTHER}: `make venv-tf4` makes it"
    ),
    pytest.mark.skipif(zoo_families.GENERATION < 5, reason="this is the older generation itself"),
]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the other generation made."""
    folder = tmp_path_factory.mktemp("other")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")])}
    version = subprocess.run(
        [OTHER, "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert version.startswith("4."), f"{OTHER} has transformers {version.strip()}, expected 4.57"
    ran = subprocess.run(
        [OTHER, HERE / "versions_numbers.py", folder], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


def largest_error(folder: Path, case: str) -> tuple[float, str]:
    theirs = load_file(folder / f"{case}.safetensors")
    sites = (folder / f"{case}.sites.txt").read_text().split("\n")
    ours = numbers.values_of(str(folder / case), sites)
    assert set(ours) == set(theirs)
    return max((zoo.relative_error(ours[key], theirs[key]), key) for key in theirs)


@pytest.mark.parametrize("case", [case for case in numbers.CASES if case not in numbers.CHANGED])
def test_same_sites_and_same_numbers(case: str, other: Path) -> None:
    family, _ = numbers.CASES[case]
    extractor = ac.ActivationExtractor(str(other / case), sites="logits")
    model = extractor.source.model()
    sites = [str(info.site) for info in ac.sites(model)]
    assert sites == (other / f"{case}.sites.txt").read_text().split("\n")
    assert sorted(numbers.with_rows(sites)) == sorted(zoo.expected_sites(family, model))
    error, where = largest_error(other, case)
    assert error < 1e-5, where


@pytest.mark.parametrize("case", numbers.CHANGED)
def test_what_transformers_itself_changed(case: str, other: Path) -> None:
    """Each generation is held against its own code elsewhere; here it is only that this still differs, and that our
    numbers are those of the model that runs."""
    family, _ = numbers.CASES[case]
    error, _ = largest_error(other, case)
    assert error > 1e-3
    model = ac.ActivationExtractor(str(other / case), sites="logits").source.model()
    ids = numbers.prompts()[3]
    ours = ac.ActivationExtractor(str(other / case), sites="logits").extract([ids])["logits"][0]
    assert zoo.relative_error(ours, zoo.alone(family, model, ids)["logits"]) < 1e-5


def test_the_other_generation_is_another(other: Path) -> None:
    """The comparison is not of one generation with itself."""
    assert '"transformers_version": "4.' in (other / "gpt2" / "config.json").read_text()
    assert torch.isfinite(load_file(other / "gpt2.safetensors")["logits/0"]).all()

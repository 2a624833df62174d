"""lmprobe 0.10.3 reads no format before 2.0, and reads what was migrated or upgraded as older releases wrote it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from lmprobe_datasets import FIXTURES
from made_datasets import make

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CHANGES = [
    *(("migrate_dataset", f"dataset_v{version}_fullseq") for version in ("1.0", "1.1", "1.2")),
    *(("upgrade_dataset_format", f"dataset_v{version}_fullseq") for version in ("1.0", "1.1", "1.2")),
    *(("upgrade_dataset_format", f"dataset_v{name}") for name in ("1.0_pooled", "1.1_pooled", "1.2_fullseq_split")),
]


def run(python, hub, folder, repo):
    """lmprobe on a dataset, in a process of its own."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
    variables |= {**hub.environment(folder / "hf"), "LMPROBE_CACHE_DIR": str(folder / "lmprobe")}
    return subprocess.run(
        [python, HERE / "peers" / "lmprobe_tokens.py", repo, folder / "out.npz"],
        env=variables, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def agrees(python, hub, client, change, folder, tmp_path, options):
    """Change the dataset in `folder` on the Hub; whether both libraries then read what was there before."""
    about = ac.fetch_dataset_metadata(folder)
    whole = about.tensor_descriptors["hidden_layers"].get("storage") == "full_sequence"
    tokens = ac.load_activations(folder, pooling=None, as_dict=False) if whole else None
    last = ac.load_activations(folder, as_dict=False)
    logits = ac.load_activation_dataset(folder, tensors=["logits_topk"])[0]
    repo = f"org/set{time.monotonic_ns()}"
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.create(repo, kind="dataset").commit(files)
    code = (
        "import actcache as ac\ngetattr(ac, f)(repo, **options)\nfound = ac.fetch_dataset_metadata(repo)\nfound.labels"
    )
    labels = client.run(code, f=change, repo=repo, options=options)
    assert labels == about.labels
    ran = run(python, hub, tmp_path, repo)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = np.load(tmp_path / "out.npz")
    assert np.array_equal(found["pooled"], last)
    values, indices = (logits[f"logits_topk.{key}"].numpy() for key in ("values", "indices"))
    for i in range(len(about.prompts)):
        assert np.array_equal(found[f"logits.{i}"], np.concatenate([values[i], indices[i]]))
    # On demand it counts tokens through all shards, and unpacking inside each: 1.0 has one column for both.
    demand = whole and "demand.0" in found and about.format_version != "1.0"
    for i, rows in enumerate(tokens if whole else ()):
        wanted = rows.reshape(len(rows), -1)
        assert np.array_equal(found[f"unpacked.{i}"], wanted), i
        assert not demand or np.array_equal(found[f"demand.{i}"], wanted), i
    for layer in about.available_layers:
        assert len(found[f"hidden.layer_{layer}"]) == (sum(map(len, tokens)) if whole else len(last))
    assert np.array_equal(found["logits_topk.values"], values)
    return True


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_as_older_releases_wrote_it(lmprobe, hub, client, tmp_path, name, change):
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip("the captured datasets of lmprobe are not on this machine")
    options = {"shard_max_bytes": 700} if change == "migrate_dataset" else {}
    assert agrees(lmprobe, hub, client, change, folder, tmp_path, options)


def test_why(lmprobe, hub, tmp_path):
    made = make(tmp_path / "set", "1.1 full")
    files = {p.relative_to(made.folder).as_posix(): p.read_bytes() for p in made.folder.rglob("*") if p.is_file()}
    hub.create("org/old", kind="dataset").commit(files)
    refused = run(lmprobe, hub, tmp_path, "org/old")
    assert refused.returncode and "upgrade_dataset_format" in refused.stderr


@pytest.mark.parametrize("version", ["1.0 full", "1.1 full", "1.2 full"])
@pytest.mark.parametrize("change", ["migrate_dataset", "upgrade_dataset_format"])
def test_of_every_version(lmprobe, hub, client, tmp_path, version, change):
    made = make(tmp_path / "set", version, labels=list(range(11)), dtype=np.float16)
    assert agrees(lmprobe, hub, client, change, made.folder, tmp_path, {})

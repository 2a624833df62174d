"""What somebody who has just installed the package does first: run by the interpreter that has it, in any folder.

    python -I installed_smoke.py FOLDER

FOLDER is where the store and the files go. It uses nothing of the tests; its last line is `all of it works`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path


def command(*arguments: str, **environment: str) -> str:
    """What the installed command prints, which has to succeed."""
    program = Path(sys.executable).parent / "actcache"
    done = subprocess.run(
        [program, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def the_package_is_the_installed_one() -> None:
    import actcache as ac

    assert Path(ac.__file__).is_relative_to(sys.prefix), ac.__file__
    assert distribution("actcache").version == ac.__version__
    assert command("--version").split() == ["actcache", ac.__version__]
    for name in ac.__all__:
        getattr(ac, name)


def a_model_is_captured_stored_and_read() -> None:
    import torch

    import actcache as ac
    from actcache.demo import model_path

    model, prompts = str(model_path()), ["The Eiffel Tower is in", "The sky is blue."]
    vectors = torch.from_numpy(ac.activations(model, prompts, layers=[0, -1]))
    again = torch.from_numpy(ac.activations(model, prompts, layers=[0, -1]))
    assert torch.equal(vectors, again)

    extractor = ac.ActivationExtractor(model, layers=[0, -1], pooling="last_token")
    values, _ = extractor.extract(prompts).padded()
    assert torch.allclose(values.reshape(vectors.shape), vectors, atol=1e-5)
    assert ac.verify_cache().ok
    assert ac.discover_cached(model, prompts[0]) is not None


def every_verb_that_needs_no_network_answers(folder: Path) -> None:
    from actcache.cli.app import VERBS
    from actcache.demo import model_path

    model = str(model_path())
    for verb in VERBS:
        assert verb in command(verb, "--help")
    file = folder / "prompts.txt"
    file.write_text("The Eiffel Tower is in\nParis is the capital of\n", encoding="utf-8")
    command("warmup", model, str(file), "--layers", "0,-1")
    assert json.loads(command("plan", model, str(file), "--layers", "0,-1", "--json"))["missing"] == 0
    assert "Eiffel" in command("list", model)
    for line in (["info"], ["sites", model], ["show", model, "Paris is the capital of"], ["verify"], ["config"]):
        assert json.loads(command(*line, "--json"))
    page = folder / "report.html"
    command("report", "--out", str(page))
    assert "<html" in page.read_text(encoding="utf-8")


def shells_complete_verbs() -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_ACTCACHE_COMPLETE" in command(_ACTCACHE_COMPLETE=f"{shell}_source")
    answer = command(_ACTCACHE_COMPLETE="zsh_complete", COMP_WORDS="actcache war", COMP_CWORD="1")
    assert "warmup" in answer


if __name__ == "__main__":
    where = Path(sys.argv[1])
    os.environ |= {"ACTCACHE_DIR": str(where / "store"), "XDG_CACHE_HOME": str(where / "cache"), "HF_HUB_OFFLINE": "1"}
    the_package_is_the_installed_one()
    a_model_is_captured_stored_and_read()
    every_verb_that_needs_no_network_answers(where)
    shells_complete_verbs()
    print("all of it works")

"""Writes what the transformers of this interpreter computes: `python versions_numbers.py FOLDER [CASE ...]`.

For each case: the model as `save_pretrained` leaves it (old-style configs, which later versions read),
`<case>.sites.txt`, and `<case>.safetensors` with the values of each prompt as `<site>/<number of the prompt>`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import logging

import actcache as ac
import zoo
from actcache.testing.tiny import tiny_model

# transformers 5 normalises Mamba 2's gated output per group of heads, 4.57 over all of them: with one group both are
# the same. Family -> config values with which the two generations compute the same.
SAME_WITH = {"mamba2": {"n_groups": 1}}
# Name -> family and config values. What changed is among the cases too, as it is by default.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, SAME_WITH.get(family, {})) for family in zoo.FAMILIES},
    **{f"{family}-changed": (family, {}) for family in SAME_WITH},
}
CHANGED = [case for case in CASES if case.endswith("-changed")]


def prompts() -> list[list[int]]:
    return zoo.prompts_of(7, [1, 2, 9, 17, 40])


def with_rows(sites: Sequence[str]) -> list[str]:
    """All of `sites` but `pattern`, which has no row for each token."""
    return [site for site in sites if ac.Site.parse(site).name != "pattern"]


def values_of(model: Any, sites: Sequence[str]) -> dict[str, torch.Tensor]:
    got = ac.ActivationExtractor(model, sites=with_rows(sites)).extract(prompts())
    return {f"{site}/{i}": got[site][i].contiguous() for site in got for i in range(len(prompts()))}


def write(folder: Path, cases: Sequence[str]) -> None:
    for case in cases:
        family, overrides = CASES[case]
        model = tiny_model(family, seed=5, **overrides)
        model.save_pretrained(folder / case)
        sites = [str(info.site) for info in ac.sites(model)]
        (folder / f"{case}.sites.txt").write_text("\n".join(sites))
        save_file(values_of(model, sites), folder / f"{case}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write(given.folder, given.cases)

"""bfloat16 on every architecture: a batch adds no more rounding than the arithmetic has anyway.

What a batch may change is the order of sums inside matrix products, which in bfloat16 shows as a last place here and
there. The measure is therefore the rounding itself: the same weights in float32 say how far a prompt that is run alone
in bfloat16 is from the truth, and the difference between a batch and alone has to stay below that.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import actcache as ac
import zoo
import zoo_inside
from actcache.testing.tiny import FAMILIES as MADE

SPARSE = [family for family, made in zoo.FAMILIES.items() if made.experts is not None]
# In these a rounded router now and then sends a token to other experts: that has tests of its own.
ROUTED = {*SPARSE, "deepseek_v3", "qwen3_next"}
# One unit in the last place of a bfloat16, relative.
ULP = 2.0**-7


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models in bfloat16 as `from_pretrained` makes them: buffers that stay float32 do."""

    @functools.cache
    def load(family: str) -> Any:
        folder = tmp_path_factory.mktemp(family)
        zoo.model_of(family).save_pretrained(folder)
        model = getattr(transformers, MADE[family].auto_class).from_pretrained(folder, dtype=torch.bfloat16)
        assert next(model.parameters()).dtype == torch.bfloat16
        return model.eval()

    return load


def extract(model: Any, sites: list[str], prompts: list[list[int]], batch_size: int) -> list[dict[str, Tensor]]:
    got = ac.ActivationExtractor(model, sites=sites, batch_size=batch_size).extract(prompts)
    return [{site: got[site][i] for site in sites} for i in range(len(prompts))]


def joined(rows: list[dict[str, Tensor]], site: str) -> Tensor:
    return torch.cat([row[site].double() for row in rows])


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f not in ROUTED])
def test_a_batch_adds_no_more_rounding_than_there_is(family: str, loaded: Any) -> None:
    model, sites = loaded(family), zoo.expected_sites(family, zoo.model_of(family))
    prompts = zoo.prompts_of()
    alone = [zoo.alone(family, model, ids) for ids in prompts]
    exact = copy.deepcopy(model).float()
    truth = [zoo.alone(family, exact, ids) for ids in prompts]
    batched = extract(model, sites, prompts, 8)
    for site in sites:
        ours, theirs, true = (joined(rows, site) for rows in (batched, alone, truth))
        rounding = (theirs - true).norm()
        assert rounding < 3 * ULP * true.norm(), site
        assert (ours - theirs).norm() <= rounding, site
        assert (ours - true).norm() <= 1.25 * rounding, site


@pytest.mark.parametrize("family", list(zoo.FAMILIES))
def test_a_batch_of_one_and_one_length_are_the_prompt_alone(family: str, loaded: Any) -> None:
    """Alone in its batch a prompt has the very bits. With others of its length there is no padding, and at most a
    matrix product of another height rounds a number differently."""
    model, sites = loaded(family), zoo.expected_sites(family, zoo.model_of(family))
    prompts = [zoo.prompts_of(k, [13])[0] for k in range(6)]
    alone = [zoo.alone(family, model, ids) for ids in prompts]
    for rows in zip(extract(model, sites, prompts[:2], 1), alone, strict=False):
        read = [site for site in sites if zoo.name_of(site) not in zoo_inside.COMPUTED]
        assert all(torch.equal(rows[0][site], rows[1][site]) for site in read)
    if family in ROUTED:
        return
    together = extract(model, sites, prompts, 8)
    for site in sites:
        ours, theirs = joined(together, site), joined(alone, site)
        assert (ours - theirs).norm() < 0.25 * ULP * theirs.norm(), site
        assert zoo.relative_error(ours, theirs) < ULP, site


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_experts_stay_the_same(family: str, dtype: torch.dtype, loaded: Any) -> None:
    """Which experts a token is sent to is read from the routers, batched and alone. No choice changes in float32 and
    hardly any in bfloat16; rows that no change can have reached are the same up to rounding.

    A token reads those before it, so a change in a block reaches that token there, and in deeper blocks that token and
    all behind it.
    """
    model = loaded(family) if dtype == torch.bfloat16 else zoo.model_of(family)
    sites = zoo.expected_sites(family, model)
    changed = total = clean_rows = 0
    for seed in range(3):
        prompts = zoo.prompts_of(seed, [5, 9, 14, 20, 27, 33, 40, 64])[:-1]
        longest = max(map(len, prompts))
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
        with zoo.routing(family, model, len(prompts)) as together:
            _, cache = ac.run_with_cache(model, {"input_ids": ids, "attention_mask": mask}, sites=sites)
        rows = {site: cache.rows(site) for site in sites}
        for i, prompt in enumerate(prompts):
            with zoo.routing(family, model, 1) as by_itself:
                theirs = zoo.alone(family, model, prompt)
            n = len(prompt)
            # Real tokens that something other than rounding may have reached, so far.
            reached = torch.zeros(n, dtype=torch.bool)
            for layer in sorted(by_itself):
                flips = (by_itself[layer][0] != together[layer][i, :n]).any(-1)
                changed, total = changed + int(flips.sum()), total + n
                for name, clean in (("resid_mid", ~reached), ("resid_post", ~(reached | flips))):
                    site = f"{name}.{layer}"
                    largest = theirs[site].float().abs().max()
                    difference = (rows[site][i].float() - theirs[site].float()).abs()[clean]
                    assert bool((difference <= (4 * ULP if dtype == torch.bfloat16 else 1e-5) * largest).all()), site
                    clean_rows += int(clean.sum())
                reached |= flips.cumsum(0) > 0
    assert changed / total <= (0.005 if dtype == torch.bfloat16 else 0)
    assert clean_rows > 1.8 * total  # of two sites per block: hardly any row was left out

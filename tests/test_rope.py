"""RoPE types that depend on the longest sequence of a pass: every prompt still gives what it gives alone."""

from __future__ import annotations

import random

import pytest

import actcache as ac
from actcache.model.rope import depends_on_longest
from actcache.testing.tiny import tiny_model
from reference import alone, relative_error

KINDS = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 8.0],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"rope_type": "linear", "factor": 4.0},
}


def llama(kind: str):
    # transformers 4.57 reads the original length of longrope from the config itself.
    more = {"original_max_position_embeddings": 16} if kind == "longrope" else {}
    return tiny_model("llama", seed=6, rope_scaling={**KINDS[kind], "rope_theta": 10000.0}, **more)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = [3, 16, 17, 40, 64, 20, 40, 3, 15, 33, 64, 1]
    return [[rng.randrange(259) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_prompt_gives_alone_on_a_fresh_model(kind):
    model = llama(kind)
    extractor = ac.ActivationExtractor(model, layers=[0, -1])
    extractor.extract([[1] * 64])  # what a longer pass leaves behind must not count
    ours = extractor.extract(prompts())
    for i, prompt in enumerate(prompts()):
        fresh = llama(kind)
        for site in ours:
            assert relative_error(ours[site][i], alone(fresh, prompt, site)) < 5e-6, (len(prompt), site)


def test_the_guard_is_needed():
    """A short prompt beside a long one, in one padded pass of the bare model, is not what it is alone."""
    import torch

    model = llama("longrope")
    short, long = prompts()[0], prompts()[4]
    ids = torch.tensor([short + [0] * (len(long) - len(short)), long])
    mask = torch.tensor([[1] * len(short) + [0] * (len(long) - len(short)), [1] * len(long)])
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1][
            0, : len(short)
        ]
    assert relative_error(together, alone(llama("longrope"), short, "resid_post.0")) > 1e-3


def test_running_a_live_model_does_not_change_its_identity():
    model = llama("dynamic")
    cache = ac.UnifiedCache(model)
    cache.warmup(prompts())
    assert cache.plan(prompts()).missing == 0


def test_which_configs_are_meant():
    assert depends_on_longest({"rope_scaling": {"type": "dynamic", "factor": 2}})
    assert depends_on_longest({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}})
    assert depends_on_longest({"text_config": {"rope_parameters": {"rope_type": "longrope"}}})
    assert not depends_on_longest({"rope_scaling": None, "rope_parameters": {"rope_type": "llama3"}})

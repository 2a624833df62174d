"""Models whose blocks are compiled: what actcache runs by itself, to find and check sites, compiles nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import actcache as ac

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def _compiled_one_by_one(compile_block: Callable[[Any, int], None]) -> GPT2LMHeadModel:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2)
    ).eval()
    for number in range(2):
        compile_block(model.transformer.h, number)
    return model


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("ran_before", [True, False])
def test_the_first_capture_compiles_nothing(in_place: bool, ran_before: bool) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile_block(blocks: Any, number: int) -> None:
        if in_place:
            blocks[number].compile(backend=backend)
        else:
            blocks[number] = torch.compile(blocks[number], backend=backend)

    model = _compiled_one_by_one(compile_block)
    with torch.no_grad():
        if ran_before:
            model(input_ids=IDS)
            assert graphs
        before = len(graphs)
        sites = ["resid_post", "attn_out", "mlp_out", "z", "q", "pattern", "head_out", "logits"]
        with ac.capture(model, sites=sites) as cache:
            output = model(input_ids=IDS)
        with ac.edit(model, ac.ablate("z.1", heads=0)):
            model(input_ids=IDS)
        assert len(graphs) == before
        assert torch.equal(cache["logits"], output.logits)
        # Outside the blocks it runs compiled, as before.
        model(input_ids=IDS + 1)
        assert graphs
        once = len(graphs)
        assert torch.allclose(model(input_ids=IDS).logits, output.logits, atol=1e-6)
        assert len(graphs) == once
    torch._dynamo.reset()

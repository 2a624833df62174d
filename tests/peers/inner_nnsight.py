# ruff: noqa: SIM117
"""Capture inside a model that nnsight wraps, beside its tracing. Prints which of our claims hold, as JSON.

The blocks of a trace are read again from their source: each stands on lines of its own.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from nnsight import TransformersModel

import actcache as ac
from actcache.testing.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
H1 = "transformer.h.1"
claims: dict[str, bool] = {}


def taps(model: Any) -> int:
    return sum("_call_impl" in vars(module) for module in model.modules())


@torch.no_grad()
def main() -> None:
    inner = tiny_model("gpt2")
    expected = tiny_model("gpt2")(IDS, output_hidden_states=True).hidden_states
    model = TransformersModel(inner, tokenizer=tiny_tokenizer(), task="text-generation")
    torch_model = model._module
    claims["the module it wraps is the model"] = torch_model is inner
    with ac.capture(torch_model, H1, sites="resid_post", include_inputs=True) as outside:
        torch_model(IDS)
    claims["without a trace"] = torch.equal(outside[H1].hidden, expected[2])

    with ac.capture(torch_model, [H1, model.transformer.h[2]._module], sites="resid_post") as cache:
        with model.trace(IDS):
            read = model.transformer.h[1].output.save()
    claims["in a trace, by path and by module"] = (
        list(cache)[:2] == [H1, "transformer.h.2"]
        and len(cache[H1]) == 1
        and torch.equal(cache[H1].hidden, expected[2])
        and torch.equal(cache["transformer.h.2"].hidden, expected[3])
    )
    claims["what the trace reads"] = torch.equal(read, expected[2])

    with ac.capture(torch_model, H1, sites="resid_post") as cache:
        with model.trace(IDS):
            model.transformer.h[0].output[:] = 0
    claims["behind its interventions"] = not cache["resid_post.0"].any() and not torch.equal(
        cache["resid_post.1"], expected[2]
    )

    with ac.edit(torch_model, {"resid_post.1": lambda x: x * 0 + 1}):
        with model.trace(IDS):
            before = model.transformer.h[1].output.save()
            next_input = model.transformer.h[2].input.save()
    claims["edits reach the model"] = bool((next_input == 1).all())
    claims["its reads stand before our edits"] = torch.equal(before, expected[2])

    with ac.capture(torch_model, H1, sites="resid_post.1") as cache:
        with model.trace(IDS) as tracer:
            theirs = tracer.cache(modules=[model.transformer.h[1]])
    claims["beside its own cache"] = torch.equal(cache[H1].hidden, theirs["model.transformer.h.1"].output)

    with ac.capture(torch_model, H1) as cache:
        with model.generate(IDS, max_new_tokens=3, pad_token_id=0) as tracer:
            made = tracer.result.save()
    claims["in its generation, a visit for each step"] = len(cache[H1]) == made.shape[1] - IDS.shape[1] == 3

    claims["nothing of ours is left"] = taps(torch_model) == taps(inner) == 0
    with ac.capture(torch_model, H1) as cache:
        torch_model(IDS)
    claims["without a trace again"] = torch.equal(cache[H1].hidden, expected[2])
    print(json.dumps(claims))


if __name__ == "__main__":
    main()

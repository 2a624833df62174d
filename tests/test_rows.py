"""Which rows are whose, where an encoder-decoder returned several sequences for each prompt.

Reference: every returned sequence decoded alone, behind its own prompt, on the bare model with plain hooks.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import LayerRangeError, OptionError
from actcache.testing.tiny import PAD, tiny_model
from reference import relative_error

PROMPTS = [[5, 9, 100, 40], [8, 8, 31], [90, 91, 92, 93, 94]]
ENCODED, DECODED = "encoder.resid_post.1", "decoder.resid_post.1"
WAYS = {
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 4},
}


@pytest.fixture(scope="module", params=["t5", "bart"])
def model(request: pytest.FixtureRequest) -> Any:
    # No token ends a sequence: every returned one has the same length.
    made = tiny_model(request.param)
    made.generation_config.eos_token_id = None
    made.generation_config.forced_eos_token_id = None
    return made


def inputs(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([p + [PAD] * (width - len(p)) for p in prompts])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts])}


def generate(model: Any, prompts: list[list[int]] = PROMPTS, n: int = 1, **more: Any) -> Tensor:
    torch.manual_seed(n)
    found: Tensor = model.generate(**inputs(prompts), max_new_tokens=3, num_return_sequences=n, **more)
    return found


def made(model: Any, n: int, sites: Any = (ENCODED, DECODED), **more: Any) -> tuple[Any, Tensor]:
    with torch.no_grad(), ac.capture(model, sites=list(sites)) as cache:
        sequences = generate(model, n=n, **more)
    return cache, sequences


@torch.no_grad()
def alone(model: Any, prompt: list[int], sequence: Tensor) -> dict[str, Tensor]:
    """`[T, D]` of both blocks for one prompt and one sequence of it."""
    core = getattr(model, "model", model)
    found: dict[str, Tensor] = {}
    handles = []
    for key, stack in ((ENCODED, core.encoder), (DECODED, core.decoder)):
        block = (stack.block if hasattr(stack, "block") else stack.layers)[1]

        def note(_: Any, args: Any, output: Any, key: str = key) -> None:
            found[key] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        handles.append(block.register_forward_hook(note))
    model(input_ids=torch.tensor([prompt]), decoder_input_ids=sequence[None, :-1])
    for handle in handles:
        handle.remove()
    return found


def hold(part: Any, model: Any, sequences: Tensor, n: int, prompts: list[int]) -> None:
    """The rows of a part against `n` sequences of each of the prompts with these numbers."""
    encoded, decoded = part.rows(ENCODED), part.rows(DECODED)
    assert (len(encoded), len(decoded)) == (len(prompts), n * len(prompts))
    for place, prompt in enumerate(prompts):
        for i in range(n):
            reference = alone(model, PROMPTS[prompt], sequences[prompt * n + i])
            row = place * n + i
            assert relative_error(decoded[row], reference[DECODED]) < 1e-5
            assert relative_error(encoded[place], reference[ENCODED]) < 1e-5
            sequence = None if n == 1 else i
            vector = part.vector(DECODED, prompt=place, position=-1, sequence=sequence)
            assert torch.equal(vector.value(), decoded[row][-1])
            assert vector.info()["prompt"] == place
            assert vector.info().get("sequence") == sequence
            stream = part.residual_stream(place - len(prompts), "decoder.resid_post", sequence=sequence)
            assert torch.equal(stream.get_layer(1), decoded[row])
    assert part.get_position(1, -1, site="decoder.resid_post").shape == (n * len(prompts), 32)
    assert part.input_ids.shape[0] == len(prompts)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_takes_its_sequences_with_it(model: Any, way: str, n: int) -> None:
    cache, sequences = made(model, n, **WAYS[way])
    assert cache[DECODED].shape[0] == 3 * n
    hold(cache, model, sequences, n, [0, 1, 2])
    hold(cache.select(prompts=1), model, sequences, n, [1])
    hold(cache.select(prompts=slice(1, None)), model, sequences, n, [1, 2])
    turned = cache.select(prompts=[2, -3])
    hold(turned, model, sequences, n, [2, 0])
    hold(turned.select(prompts=[1]), model, sequences, n, [0])


def test_the_sequences_of_a_part_share_memory(model: Any) -> None:
    cache, _ = made(model, 2, do_sample=True)
    for prompts in (1, slice(1, 3)):
        part = cache.select(prompts=prompts)
        assert part[DECODED].untyped_storage().data_ptr() == cache[DECODED].untyped_storage().data_ptr()
    assert not cache.select(prompts=[])[DECODED].numel()


def test_a_file_a_copy_and_named_positions_keep_whose_the_rows_are(model: Any, tmp_path: Path) -> None:
    cache, sequences = made(model, 2, do_sample=True)
    for again in (ac.ActivationCache.load(cache.save(tmp_path / "c.safetensors")), copy.deepcopy(cache)):
        hold(again.select(prompts=[2]), model, sequences, 2, [2])
    with torch.no_grad(), ac.capture(model, sites=[ENCODED, DECODED], positions={"end": -1}) as named:
        generate(model, n=2, do_sample=True)
    assert torch.equal(named.at("end").select(prompts=[1])[DECODED], named[DECODED][2:4])


@pytest.mark.parametrize("counts", [(2, 2), (1, 3), (3, 1), (2, 1)])
def test_calls_with_other_numbers_of_sequences(model: Any, counts: tuple[int, int]) -> None:
    first, second = counts
    caches = [made(model, n, do_sample=True)[0] for n in counts]
    joined = ac.ActivationCache.concatenate(caches)
    with torch.no_grad(), ac.capture(model, sites=[ENCODED, DECODED]) as together:
        for n in counts:
            generate(model, n=n, do_sample=True)
    for cache in (joined, together):
        assert cache[DECODED].shape[0] == 3 * (first + second)
        for prompt, n, one in ((1, first, caches[0]), (4, second, caches[1])):
            assert torch.equal(cache.select(prompts=[prompt])[DECODED], one[DECODED][n : 2 * n])


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_takes_its_sequences_with_it_where_nothing_was_encoded_for_the_cache(model: Any, way: str) -> None:
    cache, sequences = made(model, 2, sites=[DECODED], **WAYS[way])
    # Labels are given for what there are rows of.
    cache.columns["sequence"] = ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert cache.input_ids.shape[0] == 6
    for prompts, rows in ((1, [2, 3]), ([2, -3], [4, 5, 0, 1]), (slice(1, None), [2, 3, 4, 5]), ([], [])):
        part = cache.select(prompts=prompts)
        assert torch.equal(part[DECODED], cache[DECODED][rows])
        assert torch.equal(part.input_ids, sequences[rows, :-1])
        assert part.columns["sequence"] == [cache.columns["sequence"][row] for row in rows]
        assert torch.equal(part._tables()["encoder"].ids, inputs(PROMPTS)["input_ids"][[row // 2 for row in rows[::2]]])
    turned = cache.select(prompts=[2, 0])
    for place, prompt in enumerate((2, 0)):
        for i in range(2):
            reference = alone(model, PROMPTS[prompt], sequences[prompt * 2 + i])[DECODED]
            assert relative_error(turned.vector(DECODED, prompt=place, sequence=i).value(), reference[-1]) < 1e-5
            assert relative_error(turned.select(prompts=place)[DECODED][i], reference) < 1e-5
    assert torch.equal(turned.select(prompts=1)[DECODED], cache[DECODED][:2])
    with pytest.raises(LayerRangeError, match="prompt 3 is out of range: the cache holds 3 prompts"):
        cache.select(prompts=3)
    with pytest.raises(OptionError, match=r"has 2 rows for prompt 1, one for each .*: choose one with sequence=0"):
        cache.vector(DECODED, prompt=1)
    both = ac.ActivationCache.concatenate([cache, made(model, 3, sites=[DECODED], do_sample=True)[0]], missing="pad")
    assert torch.equal(both.select(prompts=[4])[DECODED], both[DECODED][9:12])
    assert both.select(prompts=[4]).columns["sequence"] == [None] * 3


def test_modules_are_cut_where_they_have_a_row_for_each_prompt_or_sequence() -> None:
    model = tiny_model("t5")
    paths = ["encoder.block.1", "decoder.block.1"]
    for n, way, whole in ((2, "sampled", False), (2, "beams", True)):
        with torch.no_grad(), ac.capture(model, paths, sites=[ENCODED, DECODED]) as cache:
            generate(model, n=n, **WAYS[way])
        part = cache.select(prompts=[1])
        assert torch.equal(part["encoder.block.1"].hidden, cache["encoder.block.1"].hidden[[1]])
        for visit, cut in zip(cache["decoder.block.1"], part["decoder.block.1"], strict=True):
            # Twelve rows of a search are neither three prompts nor six sequences.
            assert torch.equal(cut.hidden, visit.hidden if whole else visit.hidden[2:4])


def test_prompts_and_sequences_that_there_are_not(model: Any) -> None:
    cache, _ = made(model, 2, do_sample=True)
    for prompts in (3, -4, [0, 3], [-4], np.array([5])):
        with pytest.raises(LayerRangeError, match=r"prompt (3|-4|5) is out of range: the cache holds 3 prompts"):
            cache.select(prompts=prompts)
    for number in (3, -4):
        with pytest.raises(LayerRangeError, match=rf"prompt {number} is out of range: the cache holds 3 prompts"):
            cache.vector(DECODED, prompt=number, sequence=0)
        with pytest.raises(LayerRangeError, match=rf"prompt {number} is out of range: the cache holds 3 prompts"):
            cache.residual_stream(number, "encoder.resid_post")
    with pytest.raises(LayerRangeError, match=r"sequence 2 is out of range: .* has 2 for prompt 1, counted from 0"):
        cache.vector(DECODED, prompt=1, sequence=2)
    with pytest.raises(OptionError, match=r"has 2 rows for prompt 1, one for each .*: choose one with sequence=0"):
        cache.vector(DECODED, prompt=1)
    with pytest.raises(OptionError, match="prompts are numbers, and these are truth values"):
        cache.select(prompts=np.array([True, False, True]))
    assert cache.select(prompts=slice(5, 9))[DECODED].shape[0] == 0


def test_rows_that_cannot_be_told_are_refused_naming_both_counts() -> None:
    model = tiny_model("t5")
    encoded = model.encoder(**inputs(PROMPTS))
    with torch.no_grad(), ac.capture(model, sites=[ENCODED, DECODED]) as cache:
        encoded = model.encoder(**inputs(PROMPTS))
        for token in (3, 4):
            model(encoder_outputs=encoded, decoder_input_ids=torch.full((3, 2), token))
    message = r"'decoder.resid_post.1' has 6 rows and the cache 3 prompts.*cache\['decoder.resid_post.1'\]\[rows\]"
    for call in (
        lambda: cache.select(prompts=[1]),
        lambda: cache.vector(DECODED, 1),
        lambda: ac.ActivationCache.concatenate([cache, cache]).select(prompts=[1]),
    ):
        with pytest.raises(OptionError, match=message.replace("6 rows", "(6|12) rows").replace("3 p", "(3|6) p")):
            call()
    assert cache.select(prompts=[1], sites=ENCODED)[ENCODED].shape[0] == 1


def test_values_of_ones_own_are_no_sites_rows() -> None:
    cache = ac.ActivationCache({"scale": torch.ones(7), "resid_post.0": torch.arange(12.0).view(3, 2, 2)})
    assert cache.select(prompts=2)["scale"].shape == (7,)
    assert torch.equal(cache.select(prompts=-1)["resid_post.0"], cache["resid_post.0"][2:])
    cache["resid_post.1"] = torch.zeros(6, 2, 2)
    with pytest.raises(OptionError, match=r"'resid_post.1' has 6 rows and the cache 3 prompts"):
        cache.select(prompts=1)


def test_batches_that_were_joined_without_padding_are_cut() -> None:
    one = ac.ActivationCache({"resid_post.0": torch.arange(12.0).view(2, 3, 2)})
    other = ac.ActivationCache({"resid_post.0": torch.arange(20.0).view(2, 5, 2)})
    joined = ac.ActivationCache.concatenate([one, other], pad=False)
    part = joined.select(prompts=[3, 0])
    assert [row.shape for row in part.rows("resid_post.0")] == [(5, 2), (3, 2)]
    assert torch.equal(part.rows("resid_post.0")[0], other["resid_post.0"][1])
    assert torch.equal(part.rows("resid_post.0")[1], one["resid_post.0"][0])


def test_the_display_counts_prompts_and_sequences(model: Any) -> None:
    cache, _ = made(model, 2, do_sample=True)
    assert "3 prompts of up to 5 positions; 6 sequences of up to 3 positions" in repr(cache)
    assert "sequence" not in repr(made(model, 1, do_sample=True)[0])


def test_a_prompt_of_the_logit_lens_that_there_is_not() -> None:
    model = tiny_model("gpt2")
    _, cache = ac.run_with_cache(model, torch.tensor([[5, 9, 3]]), sites="resid_post")
    with pytest.raises(LayerRangeError, match=r"prompt 1 is out of range: the cache holds 1 prompt$"):
        cache.logit_lens().table(prompt=1)

"""Positions that tell images from text, captured and generated."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import OptionError
from actcache.model.media import media_tokens
from actcache.testing.tiny import tiny_model
from vision import BOTH, IMAGE, KINDS, LAYERS, MIXED, close, image_places, inputs_of, model_of, prompt_of


class TestPositions:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3"])
    def test_images_and_text(self, name: str, side: str) -> None:
        """However a pass is made, and for other numbers of images in each prompt."""
        model, inputs = model_of(name), inputs_of(name, MIXED, side=side)
        whole = ac.run_with_cache(model, inputs, sites="resid_post")[1]
        with ac.capture(model, sites="resid_post", positions=BOTH) as captured, torch.no_grad():
            model(**inputs)
        run = ac.run_with_cache(model, inputs, sites="resid_post", positions=BOTH)[1]
        batches = ac.extract_batches(model, [inputs], sites="resid_post", positions=BOTH)
        prompts = [prompt_of(name, *pair) for pair in MIXED]
        for cache in (captured, run, batches):
            for row, prompt in enumerate(prompts):
                images = image_places(prompt)
                text = [at for at in range(len(prompt)) if at not in images]
                assert len(images) == MIXED[row][0] * KINDS[name].tokens
                for layer in range(LAYERS):
                    mine = whole.rows(f"resid_post.{layer}")[row]
                    close(cache.at("image").rows(f"resid_post.{layer}")[row], mine[images])
                    close(cache.at("text").rows(f"resid_post.{layer}")[row], mine[text])
                assert cache.at("image").input_ids[row][cache.at("image").attention_mask[row]].unique().tolist() == [
                    IMAGE
                ]
            image = cache.map_to_dict("resid_post.1")["image"]
            assert image.shape == (3, 2 * KINDS[name].tokens, 32)
            assert bool((image[1, KINDS[name].tokens :] == 0).all())
            close(
                cache.at("image").get_position(1, -1),
                torch.stack(
                    [
                        rows[image_places(prompt)[-1]]
                        for rows, prompt in zip(whole.rows("resid_post.1"), prompts, strict=True)
                    ]
                ),
            )

    @pytest.mark.parametrize(
        ("positions", "kept"),
        [
            (ac.tokens_of("image"), [1, 2, 3, 4, 6, 7, 8, 9]),
            (ac.tokens_of("image", "first"), [1, 2, 3, 4]),
            (ac.tokens_of("image", "last"), [6, 7, 8, 9]),
            (ac.tokens_of("image", 1), [6, 7, 8, 9]),
            (ac.tokens_of("image", -2), [1, 2, 3, 4]),
            (ac.tokens_of("text"), [0, 5, 10, 11, 12]),
            (ac.tokens_of("text", "last"), [10, 11, 12]),
            ([ac.tokens_of("image", 0), "last"], [1, 2, 3, 4, 12]),
            ([[ac.tokens_of("text", 1), 0]], [5, 0]),
        ],
    )
    def test_which(self, positions: Any, kept: list[int]) -> None:
        model, inputs = model_of("llava"), inputs_of("llava", [(2, 3)])
        whole = ac.run_with_cache(model, inputs, sites="resid_post.2")[1]["resid_post.2"][0]
        for cache in (
            ac.run_with_cache(model, inputs, sites="resid_post.2", positions=positions)[1],
            ac.extract_batches(model, [inputs], sites="resid_post.2", positions=positions),
        ):
            close(cache["resid_post.2"][0], whole[kept])
        with ac.capture(model, sites="resid_post.2", positions=positions) as cache, torch.no_grad():
            model(**inputs)
        close(cache["resid_post.2"][0], whole[kept])

    def test_over_many_batches(self) -> None:
        """Joined, and as means: each example's own image counts once, however many tokens it has."""
        model = model_of("llava")
        batches = [inputs_of("llava", MIXED[:2], side="left"), inputs_of("llava", MIXED[2:])]
        cache = ac.extract_batches(model, iter(batches), sites="resid_post.1", positions=BOTH)
        means = ac.extract_batches(model, batches, sites="resid_post.1", positions=BOTH, reduce="mean")
        expected: dict[str, list[Tensor]] = {"image": [], "text": []}
        for row, pair in enumerate(MIXED):
            whole = ac.run_with_cache(model, inputs_of("llava", [pair]), sites="resid_post.1")[1]["resid_post.1"][0]
            images = image_places(prompt_of("llava", *pair))
            text = [at for at in range(len(whole)) if at not in images]
            for name, at in (("image", images), ("text", text)):
                close(cache.at(name).rows("resid_post.1")[row], whole[at])
                expected[name].append(whole[at].mean(0))
        for name, rows in expected.items():
            close(means["resid_post.1"][name], torch.stack(rows).mean(0))

    def test_some_of_them_at_random(self) -> None:
        """Two tokens of the images and one of the text, others in every prompt: a function of the batch chooses."""
        model, chosen, generator = model_of("llava"), [], random.Random(0)

        def some(batch: dict[str, Tensor]) -> dict[str, list[list[int]]]:
            found: dict[str, list[list[int]]] = {"image": [], "text": []}
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                real = ids[mask.bool()].tolist()
                text = [at for at, token in enumerate(real) if token != IMAGE]
                found["image"].append(generator.sample(image_places(real), 2))
                found["text"].append([generator.choice(text)])
            chosen.append(found)
            return found

        batches = [inputs_of("llava", MIXED, side="left"), inputs_of("llava", MIXED[:1])]
        cache = ac.extract_batches(model, batches, sites="resid_post.1", positions=some)
        for row, pair in enumerate([*MIXED, MIXED[0]]):
            whole = ac.run_with_cache(model, inputs_of("llava", [pair]), sites="resid_post.1")[1]["resid_post.1"][0]
            picked = chosen[0 if row < 3 else 1]
            for name in ("image", "text"):
                close(cache.at(name).rows("resid_post.1")[row], whole[picked[name][row % 3]])
        image = cache.at("image")
        assert image.input_ids.tolist() == [[IMAGE, IMAGE]] * 4
        assert not bool((cache.at("text").input_ids == IMAGE).any())

    def test_modules_are_cut_too(self) -> None:
        model, inputs = model_of("llava"), inputs_of("llava", [(1, 3)])
        path = "model.language_model.layers.1.mlp"
        whole = ac.run_with_cache(model, inputs, path)[1][path].output
        with ac.capture(model, path, positions=ac.tokens_of("image")) as cache, torch.no_grad():
            model(**inputs)
        assert torch.equal(cache[path].output, whole[:, 1:5])

    def test_sound(self) -> None:
        """Whatever a config names: this one a token for sound."""
        model = copy.copy(tiny_model("llama"))
        model.config = copy.deepcopy(model.config)
        model.config.audio_token_id = 50
        assert media_tokens(model) == {"audio": frozenset({50})}
        inputs = {"input_ids": torch.tensor([[3, 50, 4, 50]])}
        cache = ac.run_with_cache(model, inputs, sites="embed", positions=ac.tokens_of("audio"))[1]
        assert cache.input_ids.tolist() == [[50, 50]]
        with pytest.raises(OptionError, match=r"tokens_of\('image'\) .* only tokens for audio"):
            ac.capture(model, sites="embed", positions=ac.tokens_of("image"))

    def test_text_on_a_model_of_text(self) -> None:
        cache = ac.run_with_cache(tiny_model("llama"), [5, 6, 7], sites="embed", positions=ac.tokens_of("text"))[1]
        assert cache.input_ids.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_generation(name: str) -> None:
    """Images are in the prompt only, and new tokens are text."""
    model, inputs = model_of(name), inputs_of(name, [(1, 3), (1, 3)], side="left")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with ac.capture(model, sites="resid_post.1", positions=BOTH) as cache:
        made = model.generate(**inputs, **options)
    with ac.capture(model, sites="resid_post.1") as whole:
        model.generate(**inputs, **options)
    images = image_places(prompt_of(name, 1, 3))
    text = [at for at in range(made.shape[1] - 1) if at not in images]
    assert len(text) == inputs["input_ids"].shape[1] - len(images) + 2
    close(cache.at("image")["resid_post.1"], whole["resid_post.1"][:, images])
    close(cache.at("text")["resid_post.1"], whole["resid_post.1"][:, text])
    assert torch.equal(whole.input_ids, made[:, :-1])
    assert torch.equal(cache.at("text").input_ids, made[:, text])


def test_attention_between_images_and_text() -> None:
    model, inputs = model_of("llava"), inputs_of("llava", MIXED, side="left")
    cache = ac.run_with_cache(model, inputs, sites="pattern.1")[1]
    blocks = ac.AttentionBlocks(keys=BOTH, queries={"text": BOTH["text"]}, reduce="sum")
    after = blocks.of(cache)["attention_blocks.1"].value()
    during = ac.extract_batches(model, [inputs], sites="pattern.1", attention=blocks)["attention_blocks.1"].value()
    for row, pair in enumerate(MIXED):
        pattern, images = cache.rows("pattern.1")[row], image_places(prompt_of("llava", *pair))
        text = [at for at in range(pattern.shape[-1]) if at not in images]
        expected = torch.stack([pattern[:, text][..., keys].sum((1, 2)) for keys in (images, text)], -1)
        for found in (after, during):
            close(found[row, :, 0], expected)

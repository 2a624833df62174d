"""Edits of a model that reads images, at images and at text."""

from __future__ import annotations

import pytest
import torch

import actcache as ac
from vision import IMAGE, MIXED, close, image_places, inputs_of, model_of, prompt_of


class TestEdits:
    def test_of_images_only(self) -> None:
        """With padding on the left, and in every step of generation as in one pass over its tokens."""
        model, inputs = model_of("llava"), inputs_of("llava", MIXED, side="left")
        image = inputs["input_ids"] == IMAGE
        vector = torch.linspace(-1, 1, 32)
        plain = ac.run_with_cache(model, inputs, sites="resid_post.0")[1]["resid_post.0"]
        with ac.edit(model, ac.steer("resid_post.0", vector, positions=ac.tokens_of("image"))):
            steered = ac.run_with_cache(model, inputs, sites="resid_post.0")[1]["resid_post.0"]
        with ac.edit(model, ac.ablate("resid_post.0", positions=ac.tokens_of("text", "first"))):
            ablated = ac.run_with_cache(model, inputs, sites="resid_post.0")[1]["resid_post.0"]
        real = inputs["attention_mask"].bool()
        close(steered[image], plain[image] + vector)
        assert torch.equal(steered[real & ~image], plain[real & ~image])
        first = real & (inputs["input_ids"] == 3)
        assert bool((ablated[first] == 0).all())
        assert torch.equal(ablated[real & ~first], plain[real & ~first])

    def test_in_generation(self) -> None:
        model, inputs = model_of("llava"), inputs_of("llava", [(1, 3)])
        edit = ac.ablate("mlp_out.1", positions=ac.tokens_of("image"))
        with ac.edit(model, edit), ac.capture(model, sites=["mlp_out.1", "resid_post.2"]) as steps:
            made = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        longer = {**inputs, "input_ids": made[:, :-1], "attention_mask": torch.ones_like(made[:, :-1])}
        with ac.edit(model, edit):
            once = ac.run_with_cache(model, longer, sites=["mlp_out.1", "resid_post.2"])[1]
        assert bool((steps["mlp_out.1"][:, 1:5] == 0).all())
        assert bool((steps["mlp_out.1"][:, 5:] != 0).any(-1).all())
        for key in once:
            close(steps[key], once[key])

    def test_patches_one_image_by_another(self) -> None:
        """Positions are told in both prompts: the image is elsewhere in the source."""
        model = model_of("llava")
        source = ac.run_with_cache(model, inputs_of("llava", [(2, 3)]), sites="resid_post.0")[1]
        target = inputs_of("llava", [(1, 6)])
        plain = ac.run_with_cache(model, target, sites="resid_post.0")[1]["resid_post.0"]
        with ac.edit(model, ac.patch("resid_post.0", source, positions=ac.tokens_of("image", "last"))):
            patched = ac.run_with_cache(model, target, sites="resid_post.0")[1]["resid_post.0"]
        close(patched[:, 1:5], source["resid_post.0"][:, 6:10])
        assert torch.equal(patched[:, 5:], plain[:, 5:])

    @pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
    def test_text_that_does_not_see_the_image(self, name: str) -> None:
        """The experiment that these are for: a knockout leaves attention from text to the image at 0, and the rest
        of it adds up to 1. Where every way is cut, other pixels change nothing behind the image."""
        model, inputs = model_of(name), inputs_of(name, [(1, 4)])
        images = image_places(prompt_of(name, 1, 4))
        behind = list(range(images[-1] + 1, inputs["input_ids"].shape[1]))
        cut = ac.knockout("all", from_positions=ac.tokens_of("text", "last"), to_positions=ac.tokens_of("image"))
        with ac.edit(model, cut):
            cache = ac.run_with_cache(model, inputs, sites=["pattern.1", "logits"])[1]
            inputs["pixel_values"] = inputs["pixel_values"] * -2
            other = ac.run_with_cache(model, inputs, sites="logits")[1]
        pattern = cache["pattern.1"][0][:, behind]
        assert bool((pattern[..., images] == 0).all())
        close(pattern.sum(-1), torch.ones(4, len(behind)))
        assert torch.equal(cache["logits"][:, behind], other["logits"][:, behind])
        assert not torch.allclose(cache["logits"][:, images], other["logits"][:, images])

    def test_are_told_from_others(self) -> None:
        kinds = [ac.ablate("mlp_out.1", positions=ac.tokens_of(*one)) for one in (["image"], ["text"], ["image", 1])]
        identities = [str(one.identity()) for one in kinds]
        assert len(set(identities)) == 3
        assert kinds[0].identity()["positions"] == {"tokens_of": "image", "which": "all"}

"""Tiny multimodal models, and inputs for them that are made by hand: no processor, no download."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

import actcache as ac

FIVE = int(transformers.__version__.split(".")[0]) >= 5
IMAGE, VIDEO, BEGIN, END, PAD = 100, 101, 102, 103, 0
LAYERS = 3
TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_ROWS: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


@dataclass(frozen=True)
class Kind:
    """How a tiny model is made, and what stands for one image in its prompts: `tokens` placeholders, between tokens
    that begin and end it where `framed`; `blocks` is the path of the language model's blocks, `grid` whether images are
    told by their patches."""

    make: Callable[[], Any]
    tokens: int
    blocks: str = "model.language_model.layers"
    framed: bool = False
    grid: bool = False


def _rope(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], **more}
    return {"rope_parameters": {**rope, "rope_theta": 10000.0}} if FIVE else {"rope_scaling": rope}


_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}


def _llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_TOWER),
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_TOWER, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8, layer_types=layers, sliding_window=6),
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _idefics3() -> Any:
    config = transformers.Idefics3Config(
        vision_config=dict(_TOWER), text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    vision = {**_ROWS, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, **_rope()}, vision_config=vision, **_IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    vision = {
        **_ROWS,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 24,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {**TEXT, "head_dim": 8, **_rope(mrope_interleaved=True)}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_IDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _blip2() -> Any:
    text = transformers.OPTConfig(
        vocab_size=120,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    former = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "encoder_hidden_size": 16,
    }
    config = transformers.Blip2Config(
        vision_config=dict(_TOWER),
        qformer_config=former,
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return transformers.Blip2ForConditionalGeneration(config)


KINDS = {
    "llava": Kind(_llava, 4),
    "paligemma": Kind(_paligemma, 4),
    "gemma3": Kind(_gemma3, 4, framed=True),
    "idefics3": Kind(_idefics3, 1, blocks="model.text_model.layers", framed=True),
    "qwen2_vl": Kind(_qwen2_vl, 4, framed=True, grid=True),
    "qwen3_vl": Kind(_qwen3_vl, 4, framed=True, grid=True),
    "blip2": Kind(_blip2, 4, blocks="language_model.model.decoder.layers"),
}


@cache
def model_of(name: str) -> Any:
    """A tiny model whose branches, towers and images are all large enough to be seen in its values."""
    model = KINDS[name].make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model


def tower_of(model: Any) -> str:
    """The path of the blocks of the vision tower, which versions of transformers keep in different places."""
    lists = (path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    return next(path for path in lists if re.search("vision|visual", path))


def prompt_of(name: str, images: int, words: int) -> list[int]:
    """Ids of one prompt: a word, then images with a word behind each, then the other words."""
    kind = KINDS[name]
    one = [IMAGE] * kind.tokens
    framed = [BEGIN, *one, END] if kind.framed else one
    return [3, *(token for number in range(images) for token in (*framed, 50 + number)), *range(10, 9 + words)]


def inputs_of(name: str, prompts: Sequence[tuple[int, int]], *, side: str = "right") -> dict[str, Tensor]:
    """Arguments of a pass over prompts, told as pairs (images, words); images are the same wherever they stand."""
    rows = [prompt_of(name, images, words) for images, words in prompts]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        at = slice(len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, at], mask[number, at] = torch.tensor(row), 1
    kwargs = {"input_ids": ids, "attention_mask": mask}
    count = sum(images for images, _ in prompts)
    if name in ("gemma3", "paligemma"):
        kwargs["token_type_ids"] = (ids == IMAGE).long() if name == "gemma3" else torch.zeros_like(ids)
    if KINDS[name].grid and FIVE:
        kwargs["mm_token_type_ids"] = (ids == IMAGE).long()
    if not count:
        return kwargs
    each = [images for images, _ in prompts]
    if KINDS[name].grid:
        kwargs["pixel_values"] = _pixels(each, 16, 96).flatten(0, 1)
        kwargs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
    elif name == "idefics3":
        kwargs["pixel_values"] = torch.zeros(len(rows), max(each), 3, 8, 8)
        for row, images in enumerate(each):
            kwargs["pixel_values"][row, :images] = _pixels([images], 3, 8, 8)
    else:
        kwargs["pixel_values"] = _pixels(each, 3, 8, 8)
    return kwargs


def _pixels(counts: Sequence[int], *shape: int) -> Tensor:
    """Images ``[N, *shape]``: the first of every prompt is one, the second another."""
    known = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    return torch.cat([known[:count] for count in counts])


@cache
def mllama() -> Any:
    """A tiny model whose block 1 attends to images, and does not run where there are none."""
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1]],
    }
    rope = "rope_parameters" if FIVE else "rope_scaling"
    text = {**TEXT, "cross_attention_layers": [1], rope: {"rope_type": "default", "rope_theta": 10000.0}}
    config = transformers.MllamaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(0.7)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model


def mllama_inputs() -> dict[str, Tensor]:
    """One prompt with an image, which its tokens see from the second on."""
    ids = torch.tensor([[3, IMAGE, 10, 11, 12]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": (torch.arange(5) > 0).long()[None, :, None, None],
    }


@cache
def florence2() -> Any:
    """A tiny encoder-decoder model whose encoder reads images."""
    four = {"depths": [1] * 4, "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1]}
    tower = {
        **four,
        "embed_dim": [8, 8, 8, 16],
        "num_heads": [1, 1, 1, 2],
        "num_groups": [1, 1, 1, 2],
        "window_size": 2,
        "projection_dim": 32,
    }
    text = transformers.BartConfig(
        vocab_size=120,
        d_model=32,
        encoder_layers=LAYERS,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    config = transformers.Florence2Config(vision_config=tower, text_config=text.to_dict(), image_token_id=IMAGE)
    torch.manual_seed(0)
    return transformers.Florence2ForConditionalGeneration(config).eval()


def florence2_inputs() -> dict[str, Tensor]:
    """Two prompts with an image of two tokens each, and one token of the decoder."""
    ids = torch.tensor([[3, IMAGE, IMAGE, 10, 11], [3, 12, IMAGE, IMAGE, 13]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        "decoder_input_ids": torch.tensor([[2], [2]]),
    }


@cache
def git() -> Any:
    """A tiny model that puts the positions of its image in front of the text."""
    text = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    torch.manual_seed(0)
    return transformers.GitForCausalLM(transformers.GitConfig(vision_config=dict(_TOWER), **text)).eval()


# Pairs (images, words) of each prompt.
MIXED = [(2, 3), (1, 6), (1, 2)]
BOTH = {"image": ac.tokens_of("image"), "text": ac.tokens_of("text")}


def image_places(prompt: list[int]) -> list[int]:
    return [at for at, token in enumerate(prompt) if token == IMAGE]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

"""The final norm and head read from a model's files, without the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from actcache.errors import ModelLoadError, SiteUnavailableError
from actcache.model import head_files
from actcache.model.head import Head, find_head
from actcache.model.loading import PathSource, open_source
from actcache.model.options import LoadOptions
from actcache.testing.tiny import FAMILIES, tiny_model

IDS = (5, 200, 31, 7, 90, 11, 254, 3, 17)
ONE_STACK = [name for name, zoo_ in zoo.FAMILIES.items() if not zoo_.encoder_decoder]


def stored(folder: Path, family: str, **saving: Any) -> Path:
    zoo.model_of(family).save_pretrained(folder, **saving)
    return folder


def head_of(folder: Path, **options: Any) -> Head:
    source = open_source(folder, LoadOptions(**options))
    head = source.head()
    assert not source.loaded
    assert source.head() is head
    return head


def last_stream(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = zoo.reference(family, 0, IDS)
    depth = len(zoo.model_of(family).get_submodule(zoo.FAMILIES[family].stacks[""].blocks))
    return found[f"resid_post.{depth - 1}"], found["logits"]


@pytest.mark.parametrize("family", ONE_STACK)
@torch.no_grad()
def test_a_head_without_its_model_gives_the_models_logits(family: str, tmp_path: Path) -> None:
    """In the files as they are saved; of some also split into shards, or with names as without a head."""
    stream, logits = last_stream(family)
    model: Any = zoo.model_of(family)
    head = head_of(stored(tmp_path / "whole", family))
    own = find_head(model)
    assert zoo.relative_error(head(stream), logits) < 1e-6
    assert (head.norm is None) == (own.norm is None)
    assert (head.vocab_size, head.way) == (own.vocab_size, own.way)
    if family in ("gpt2", "llama", "gemma2", "phi", "opt-350m", "bloom"):
        shards = stored(tmp_path / "shards", family, max_shard_size="20KB")
        assert len(list(shards.glob("*.safetensors"))) > 1
        assert zoo.relative_error(head_of(shards)(stream), logits) < 1e-6
    if family in ("gpt2", "opt", "bloom"):
        # As the first checkpoints of these are published.
        bare = tmp_path / "bare"
        model.base_model.save_pretrained(bare)
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        (bare / "config.json").write_text(json.dumps(config))
        assert zoo.relative_error(head_of(bare)(stream), logits) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "mamba", "phi"])
@torch.no_grad()
def test_in_half_precision_the_head_is_that_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    stream, _ = last_stream(family)
    folder = stored(tmp_path, family)
    head = head_of(folder, dtype="bfloat16")
    model = open_source(folder, LoadOptions(dtype="bfloat16")).model()
    own = find_head(model)
    given = stream if family == "mamba" else stream.bfloat16()
    assert torch.equal(head(given), own(given))
    assert head(given).dtype is torch.bfloat16


def test_weights_in_a_pickle_file_are_read(tmp_path: Path) -> None:
    folder = stored(tmp_path, "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    stream, logits = last_stream("llama")
    with torch.no_grad():
        assert zoo.relative_error(head_of(folder)(stream), logits) < 1e-6


def test_only_the_bytes_of_the_head_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of blocks are not opened, and of the others only the pages of the head are touched."""
    tiny_model("llama", vocab_size=40_000, tie_word_embeddings=False).save_pretrained(tmp_path, max_shard_size="8MB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    whole = index["model.embed_tokens.weight"], index["lm_head.weight"], index["model.norm.weight"]
    for name in set(index.values()) - set(whole):
        (tmp_path / name).write_bytes(b"no weights")
    source = open_source(tmp_path, LoadOptions())
    source.identity()
    held: list[Any] = []
    mapped = head_files.mapped

    def keep(path: Path) -> dict[str, torch.Tensor]:
        held.append(mapped(path))
        return held[-1]

    monkeypatch.setattr(head_files, "mapped", keep)
    head = source.head()
    weight = head.model.get_submodule("lm_head").weight
    assert isinstance(weight, torch.Tensor)
    touched = _touched(tmp_path)
    assert weight.nbytes <= touched < weight.nbytes + (1 << 20)


def _touched(folder: Path) -> int:
    """Bytes of the files in a folder that this process has read through mappings."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_a_loaded_model_is_asked_itself(tmp_path: Path) -> None:
    source = open_source(stored(tmp_path, "gpt2"), LoadOptions())
    model = source.model()
    assert source.head() is find_head(model)
    live = open_source(zoo.model_of("gpt2"), LoadOptions())
    assert live.head() is find_head(zoo.model_of("gpt2"))


def test_other_weights_have_another_head(tmp_path: Path) -> None:
    folder = stored(tmp_path, "llama")
    source = open_source(folder, LoadOptions())
    first = source.head()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 2
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    stream = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(source.head()(stream), 2 * first(stream))


def _without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


@pytest.mark.parametrize("missing", ["model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_there_are_named(missing: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, "llama")
    _without(missing)(folder)
    with pytest.raises(ModelLoadError, match=missing):
        head_of(folder)


def test_what_is_not_read_by_itself_is_refused_by_name(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = stored(tmp_path / "llama", "llama")
    with pytest.raises(SiteUnavailableError, match=r"model_kwargs=\{'use_safetensors': True\}: load the model first"):
        head_of(folder, model_kwargs={"use_safetensors": True})
    with pytest.raises(SiteUnavailableError, match="since its weights are quantised: load the model"):
        head_of(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(SiteUnavailableError, match="T5ForConditionalGeneration has two stacks of blocks"):
        head_of(stored(tmp_path / "t5", "t5"))
    headless = tmp_path / "headless"
    base: Any = zoo.model_of("qwen3")
    base.base_model.save_pretrained(headless)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight"):
        head_of(headless)
    for target, fine in (("lm_head", False), ("q_proj", True)):
        adapted = get_peft_model(
            open_source(folder, LoadOptions()).model(), LoraConfig(target_modules=[target], init_lora_weights=False)
        )
        place = tmp_path / target
        adapted.save_pretrained(place, save_embedding_layers=False)
        config = json.loads((place / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(folder)
        (place / "adapter_config.json").write_text(json.dumps(config))
        if fine:
            stream, logits = last_stream("llama")
            with torch.no_grad():
                assert zoo.relative_error(head_of(place)(stream), logits) < 1e-6
        else:
            with pytest.raises(SiteUnavailableError, match=r"its adapter changes 'base_model.model.lm_head.lora_A"):
                head_of(place)
            source = open_source(place, LoadOptions())
            source.model()
            assert isinstance(source, PathSource)
            assert source.head() is find_head(source.model())


def test_every_family_with_one_stack_is_tried() -> None:
    assert len(ONE_STACK) == len(FAMILIES) - 3

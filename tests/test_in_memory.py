"""The identity of a model in memory: everything that changes its values changes it, and nothing else does."""

import copy

import pytest
import torch
import xxhash

from actcache.errors import ModelChangedError
from actcache.model import in_memory
from actcache.model.checksum import local_checksum
from actcache.model.identity import digest_json
from actcache.model.loading import open_source
from actcache.model.options import LoadOptions
from actcache.testing.tiny import tiny_model

IDS = (torch.arange(60) % 250 + 3)[None]


def identity(model):
    return open_source(model, LoadOptions(device="cpu")).identity().values


def last_state(model):
    with torch.no_grad():
        return model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]


class Steered(torch.nn.Module):
    """Somebody's own module, with whatever its values depend on kept as a plain attribute."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner = inner
        self._how = how

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        how = self._how
        if callable(how):
            return how(out)
        return out * how if isinstance(how, int) else out + (how[0] if isinstance(how, list) else how)


def each(model, name, value):
    for module in model.modules():
        if name in vars(module):
            setattr(module, name, value)


def in_layer(model, name, value):
    setattr(model.model.layers[1].mlp, name, value)


CHANGES = {
    "an activation": ("llama", lambda m: in_layer(m, "act_fn", torch.nn.ReLU())),
    "a causal mask": ("llama", lambda m: each(m, "is_causal", False)),
    "a number of experts": ("mixtral", lambda m: each(m, "top_k", 1)),
    "a switch": ("gpt_neox", lambda m: each(m, "use_parallel_residual", False)),
    "an epsilon": ("gpt2", lambda m: each(m, "eps", 0.5)),
    "rotary frequencies": ("llama", lambda m: m.model.rotary_emb.inv_freq.mul_(0.5)),
    "a class": ("llama", lambda m: setattr(m.model, "norm", torch.nn.RMSNorm(32, 0.5))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_modules_hold_beside_weights_is_part_of_the_identity(change):
    family, apply = CHANGES[change]
    model = tiny_model(family)
    before, values = identity(model), last_state(model)
    apply(model)
    assert not torch.equal(last_state(model), values)
    assert identity(model) != before


HOW = {
    "tensors": lambda n: torch.full((32,), float(n)),
    "tensors in a list": lambda n: [torch.full((32,), float(n))],
    "integers": lambda n: n,
    "functions": lambda n: (torch.sin, torch.cos)[n - 1],
}


@pytest.mark.parametrize("how", HOW)
def test_modules_of_somebody_else_count_with_what_they_hold(how):
    def steered(number):
        model = tiny_model("llama")
        model.model.layers[1].mlp = Steered(model.model.layers[1].mlp, HOW[how](number))
        return model

    one, same, other = steered(1), steered(1), steered(2)
    assert not torch.equal(last_state(one), last_state(other))
    assert identity(one) == identity(same)
    assert identity(one) != identity(other)


def test_a_tensor_of_somebody_elses_module_changed_in_place_is_noticed():
    model = tiny_model("llama")
    model.model.layers[1].mlp = Steered(model.model.layers[1].mlp, torch.ones(32))
    before = identity(model)
    model.model.layers[1].mlp._how[3] = 5
    assert identity(model) != before


def test_casting_frequencies_with_the_whole_model_makes_it_another_one(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not torch.equal(last_state(loaded), last_state(cast))
    assert identity(loaded) == identity(again)
    assert identity(loaded) != identity(cast)


def test_attention_of_a_part_counts():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 259, **sizes},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
        image_token_index=258,
    )
    model = LlavaForConditionalGeneration(config).eval()
    before = identity(model)
    model.set_attn_implementation({"text_config": "eager"})
    assert identity(model)["attn_implementation"] != before["attn_implementation"]


@pytest.mark.parametrize("family", ["llama", "llama-dynamic", "phi3-longrope", "gpt2", "t5", "mamba2", "qwen3_next"])
def test_passes_modes_and_copies_change_nothing(family):
    model = tiny_model(family)
    before = identity(model)
    ids = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = IDS
    with torch.no_grad():
        model(**ids)
        model(**{name: value[:, :5] for name, value in ids.items()})
    model.train()
    assert identity(model) == before
    assert identity(copy.deepcopy(model)) == before


def test_a_config_changed_in_memory_is_no_longer_that_of_the_files(tmp_path):
    tiny_model("mistral").save_pretrained(tmp_path)
    source = open_source(str(tmp_path), LoadOptions(device="cpu"))
    source.model_to_run().config.sliding_window = 3
    with pytest.raises(ModelChangedError, match="changed in memory"):
        source.model_to_run()


@pytest.mark.parametrize("where", [(3, 4), (slice(None), 3), (slice(5, 9), slice(0, 7)), (-1, -1)])
def test_a_few_values_written_through_data_are_seen(where):
    """Ablating a neuron or a head in this way moves no version."""
    model = tiny_model("llama", intermediate_size=2048)
    before = identity(model)
    weight = model.model.layers[2].mlp.up_proj.weight
    kept = weight.data[where].clone()
    weight.data[where] += 0.5
    assert identity(model) != before
    weight.data[where] = kept
    assert identity(model) == before


def one_value(weight):
    weight.data.view(-1)[7] += 0.5


def swapped(weight):
    weight.data[[1, 3]] = weight.data[[3, 1]]


def through_numpy(weight):
    weight.detach().numpy()[2] = 1


def another_memory(weight):
    weight.data = weight.data + 0.5


def stepped(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5, foreach=True).step()
    weight.grad = None


def in_inference_mode(weight):
    with torch.inference_mode():
        weight.mul_(2)


@pytest.mark.parametrize("write", [one_value, swapped, through_numpy, another_memory, stepped, in_inference_mode])
def test_weights_written_in_any_way_are_others(write):
    """Also where two names share them, of which one is asked."""
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    for weight in (model.transformer.h[1].mlp.c_fc.weight, model.lm_head.weight):
        before, kept = identity(model), weight.detach().clone()
        write(weight)
        assert identity(model) != before
        weight.data = kept
        assert identity(model) == before


def test_each_weight_is_read_once_in_a_look(monkeypatch):
    model = tiny_model("gpt2")
    first = identity(model)
    read = []

    def counted(tensor):
        read.append(tensor.data_ptr())
        return local_checksum(tensor)

    monkeypatch.setattr(in_memory, "local_checksum", counted)
    assert identity(model) == first
    assert len(read) == len(set(read)) >= len(list(model.parameters()))
    # Nor once more to tell what a model is that was never looked at.
    read.clear()
    monkeypatch.setattr(in_memory, "_bytes_of", lambda tensor: pytest.fail("read again"))
    assert identity(copy.deepcopy(model)) == first
    assert read


def test_the_digest_of_weights_is_that_of_their_bytes():
    """What earlier versions have stored is found under it."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    told = {
        name: [
            ["", str(t.dtype), list(t.shape), xxhash.xxh3_128_hexdigest(bytes(t.detach().view(-1).view(torch.uint8)))]
        ]
        for name, t in tensors.items()
    }
    assert in_memory.live_weights_digest(model) == digest_json(told)


def test_a_few_values_written_through_data_of_a_model_of_files_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    source = open_source(str(tmp_path), LoadOptions(device="cpu"))
    source.model_to_run().model.layers[1].mlp.down_proj.weight.data[3, 5] = 0
    with pytest.raises(ModelChangedError, match="changed in memory"):
        source.model_to_run()

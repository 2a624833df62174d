"""Where the values inside attention and MLP are read on every architecture: tables written from transformers' source.

Values with heads are rows of all heads side by side, ``[B, S, H * hd]``, as they are extracted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# From a value `[B, S, W]`, the module it is read at, and the model, to the part that is meant, `[B, S, W']`.
Part = Callable[[Tensor, nn.Module, Any], Tensor]
SITES = ("attn_in", "q", "k", "v", "z", "head_out", "mlp_in", "router_logits", "mlp_act")
# Computed here and there, each in its own way: no two matrix products round alike.
COMPUTED = ("head_out", "router_logits")


@dataclass(frozen=True)
class Hook:
    """One value: module `path` (relative to the block; alternatives are spellings of other versions of transformers),
    its output or input, the config number it is multiplied by before it joins the stream, and the part that is
    meant."""

    path: str | tuple[str, ...]
    side: str = "output"
    times: str | None = None
    part: Part | None = None


def out(*path: str, times: str | None = None, part: Part | None = None) -> Hook:
    return Hook(path, "output", times, part)


def into(*path: str, part: Part | None = None) -> Hook:
    return Hook(path, "input", None, part)


def n_heads(model: Any) -> int:
    return int(model.config.num_attention_heads)


def matrix(module: Any) -> Tensor:
    """The weight of a projection, ``[out, in]``."""
    # Quantised layers give theirs when they are asked.
    weight = module.weight().dequantize() if callable(module.weight) else module.weight
    return weight.T if type(module).__name__ == "Conv1D" else weight


def by_head(value: Tensor, module: nn.Module, model: Any) -> Tensor:
    """What each head adds, out of the input of the output projection."""
    weight = matrix(module).unflatten(1, (n_heads(model), -1))
    return torch.einsum("bshk,dhk->bshd", value.unflatten(-1, weight.shape[1:]), weight).flatten(2)


def logits_of(value: Tensor, module: Any, model: Any) -> Tensor:
    """A router's logits, out of what it is given; DeepSeek's is computed in float32."""
    dtype = torch.float32 if "Deepseek" in type(module).__name__ else value.dtype
    bias = getattr(module, "bias", None)
    return nn.functional.linear(value.to(dtype), module.weight.to(dtype), None if bias is None else bias.to(dtype))


def thirds(which: int) -> Part:
    """All queries, all keys, all values."""
    return lambda value, module, model: value.chunk(3, -1)[which]


def thirds_of_heads(which: int) -> Part:
    """For each head its query, key and value."""
    return lambda value, module, model: value.unflatten(-1, (n_heads(model), 3, -1))[..., which, :].flatten(2)


def grouped(which: int) -> Part:
    """Keys and values of fewer heads behind all queries."""

    def part(value: Tensor, module: nn.Module, model: Any) -> Tensor:
        size = model.config.hidden_size // n_heads(model)
        other = model.config.num_key_value_heads * size
        return value.split([n_heads(model) * size, other, other], -1)[which]

    return part


def falcon(which: int) -> Part:
    """For each group of heads its queries, one key and one value; in the oldest form there is one group."""

    def part(value: Tensor, module: nn.Module, model: Any) -> Tensor:
        config = model.config
        if not config.new_decoder_architecture and not config.multi_query:
            return thirds_of_heads(which)(value, module, model)
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        each = value.unflatten(-1, (groups, n_heads(model) // groups + 2, -1))
        return (each[..., :-2, :], each[..., -2:-1, :], each[..., -1:, :])[which].flatten(2)

    return part


def gated_queries(value: Tensor, module: nn.Module, model: Any) -> Tensor:
    """Of each head the query, without the gate behind it."""
    return value.unflatten(-1, (n_heads(model), 2, -1))[..., 0, :].flatten(2)


def latent(which: int) -> Part:
    """Of each head the part of the key without a rotation, and the value."""

    def part(value: Tensor, module: nn.Module, model: Any) -> Tensor:
        sizes = [model.config.qk_nope_head_dim, model.config.v_head_dim]
        return value.unflatten(-1, (n_heads(model), -1)).split(sizes, -1)[which].flatten(2)

    return part


def separate(q: str, k: str, v: str, o: str) -> dict[str, Hook]:
    return {"attn_in": into(q), "q": out(q), "k": out(k), "v": out(v), "z": into(o), "head_out": into(o, part=by_head)}


def fused(qkv: str, o: str, split: Callable[[int], Part]) -> dict[str, Hook]:
    parts = {name: out(qkv, part=split(which)) for which, name in enumerate("qkv")}
    return {"attn_in": into(qkv), **parts, "z": into(o), "head_out": into(o, part=by_head)}


def llama(attention: str = "self_attn", o: str = "o_proj") -> dict[str, Hook]:
    return separate(*(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj", o)))


def mlp(first: str, last: str) -> dict[str, Hook]:
    return {"mlp_in": into(first), "mlp_act": into(last)}


def experts(*router: str) -> dict[str, Hook]:
    return {"mlp_in": into(*router), "router_logits": into(*router, part=logits_of)}


GATED = mlp("mlp.gate_proj", "mlp.down_proj")
FC = mlp("mlp.c_fc", "mlp.c_proj")
FC12 = mlp("fc1", "fc2")
DENSE_4H = mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
LLAMA = llama() | GATED
BERT = separate(*(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense")


def t5(inner: int, first: str) -> dict[str, Hook]:
    layer = f"layer.{inner}.DenseReluDense"
    return separate(*(f"layer.0.SelfAttention.{name}" for name in "qkvo")) | mlp(f"{layer}.{first}", f"{layer}.wo")


# By family, and the prefix of the stack where there are two.
INSIDE: dict[str, dict[str, Hook]] = {
    "gpt2": fused("attn.c_attn", "attn.c_proj", thirds) | FC,
    "gpt_neo": llama("attn.attention", "out_proj") | FC,
    **dict.fromkeys(
        ("gpt_neox", "gpt_neox-sequential"),
        fused("attention.query_key_value", "attention.dense", thirds_of_heads) | DENSE_4H,
    ),
    "gptj": llama("attn", "out_proj") | mlp("mlp.fc_in", "mlp.fc_out"),
    **dict.fromkeys(("llama", "llama-tied", "llama-dynamic", "llama-longrope", "mistral", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "olmo2", "stablelm", "stablelm-parallel", "cohere", "granite"), LLAMA
    ),
    "phi": llama(o="dense") | mlp("mlp.fc1", "mlp.fc2"),
    **dict.fromkeys(
        ("phi3", "phi3-longrope"),
        fused("self_attn.qkv_proj", "self_attn.o_proj", grouped) | mlp("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    **dict.fromkeys(("opt", "opt-350m"), llama(o="out_proj") | FC12),
    "bloom": fused("self_attention.query_key_value", "self_attention.dense", thirds_of_heads) | DENSE_4H,
    **dict.fromkeys(
        ("falcon", "falcon-40b", "falcon-rw"),
        fused("self_attention.query_key_value", "self_attention.dense", falcon) | DENSE_4H,
    ),
    "mixtral": llama() | experts("mlp.gate", "block_sparse_moe.gate"),
    "qwen3_moe": llama() | experts("mlp.gate"),
    "gpt_oss": llama() | experts("mlp.router"),
    "mamba": {},
    "mamba2": {},
    "t5, encoder": t5(1, "wi"),
    "t5, decoder": t5(2, "wi"),
    "t5-v1.1, encoder": t5(1, "wi_0"),
    "t5-v1.1, decoder": t5(2, "wi_0"),
    **dict.fromkeys(("bart, encoder", "bart, decoder"), llama(o="out_proj") | FC12),
    **dict.fromkeys(("bert", "roberta"), BERT | mlp("intermediate.dense", "output.dense")),
    "distilbert": separate(*(f"attention.{name}_lin" for name in ("q", "k", "v", "out"))) | mlp("ffn.lin1", "ffn.lin2"),
    "modernbert": fused("attn.Wqkv", "attn.Wo", thirds) | mlp("mlp.Wi", "mlp.Wo"),
    # Its first block has an ordinary MLP in place of experts.
    "deepseek_v3": {
        "attn_in": into("self_attn.q_a_proj"),
        "q": out("self_attn.q_b_proj"),
        "v": out("self_attn.kv_b_proj", part=latent(1)),
        "z": into("self_attn.o_proj"),
        "head_out": into("self_attn.o_proj", part=by_head),
        "mlp_in": into("mlp.gate", "mlp.gate_proj"),
        "mlp_act": into("mlp.down_proj"),
        "router_logits": into("mlp.gate", part=logits_of),
    },
    "glm4": llama() | mlp("mlp.gate_up_proj", "mlp.down_proj"),
    "mpt": fused("attn.Wqkv", "attn.out_proj", thirds) | mlp("ffn.up_proj", "ffn.down_proj"),
    # Every other block has linear attention, which has no heads of this kind.
    "qwen3_next": llama()
    | {
        "attn_in": into("self_attn.q_proj", "linear_attn.in_proj_qkvz"),
        "q": out("self_attn.q_proj", part=gated_queries),
    }
    | experts("mlp.gate"),
}
NO_EXPERTS = "its blocks have no mixture of experts"
EACH_EXPERT = "each of its experts has hidden activations of its own"


def inside_of(family: str, prefix: str) -> dict[str, Hook]:
    return INSIDE[f"{family}, {prefix}" if prefix else family]

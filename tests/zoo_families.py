"""Where each architecture's values are read, and what it does not have: tables written from transformers' source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from zoo_inside import Hook, into, out

# transformers' major version.
GENERATION = int(transformers.__version__.partition(".")[0])
BLOCK_SITES = ("resid_pre", "attn_out", "cross_attn_out", "mixer_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Stack:
    """One stack of blocks.

    `form` says which identities hold: "pre" (norms before the branches), "parallel", "post" (norms on the stream) or
    "mixer". `norms` are the modules, relative to the block, that a post-norm block puts after attention, after
    cross-attention (when there is some) and after the MLP.
    """

    blocks: str
    final_norm: str | None
    form: str
    hooks: dict[str, Hook]
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Zoo:
    """What is known of one family.

    Attributes:
        stacks: by prefix of the site names; `""` where there is one stack.
        absent: sites the architecture does not have, with the reason.
        hidden: what transformers' `hidden_states` hold: "stream" (the inputs of all blocks, then the final norm's
            output), "outputs" (the same one later: every block's output is under its own number, the last one
            after the norm), "stream, no end" (the last entry is none of the sites), "post" (ends with the last block's
            output).
        head: final state to logits, from the model's own parts.
        left: why a left-padded batch with positions does not give what prompts give alone; None where it does.
        lengths: whether values depend on the longest prompt of a pass.
        experts: the router of a block, for mixtures of experts with top-2 routing.
        plain: whether what attention gives is its pattern times its values (no gate, nothing that is not a key).
    """

    stacks: dict[str, Stack]
    absent: dict[str, str]
    hidden: str
    head: Callable[[Any, Tensor], Tensor]
    left: str | None = None
    lengths: bool = False
    experts: Hook | None = None
    known: bool = True
    plain: bool = True

    @property
    def encoder_decoder(self) -> bool:
        return "" not in self.stacks


NO_CROSS = "it has no encoder to attend to"
NO_MIXER = "its blocks have attention and an MLP, not one mixer"
PARALLEL = "attention and MLP read the same stream, there is nothing in between"
POST_NORM = "its blocks end with a norm of their own, and nothing follows the last one"
MIXER = "its blocks are one mixer"


def lm_head(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden)


def scaled_head(name: str, *, divide: bool = False) -> Callable[[Any, Tensor], Tensor]:
    def head(model: Any, hidden: Tensor) -> Tensor:
        factor = getattr(model.config, name)
        return model.lm_head(hidden) / factor if divide else model.lm_head(hidden) * factor

    return head


def capped_head(model: Any, hidden: Tensor) -> Tensor:
    cap = model.config.final_logit_softcapping
    logits = model.lm_head(hidden)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def one_stack(
    blocks: str,
    final_norm: str | None,
    form: str,
    hooks: dict[str, Hook],
    *,
    norms: tuple[str, ...] = (),
    hidden: str = "stream",
    head: Callable[[Any, Tensor], Tensor] = lm_head,
    **more: Any,
) -> Zoo:
    absent = {"cross_attn_out": NO_CROSS}
    if form == "mixer":
        absent |= dict.fromkeys(("attn_out", "resid_mid", "mlp_out"), MIXER)
    else:
        absent["mixer_out"] = NO_MIXER
    if form == "parallel":
        absent["resid_mid"] = PARALLEL
    if final_norm is None:
        absent["final_norm"] = POST_NORM
    return Zoo({"": Stack(blocks, final_norm, form, hooks, norms)}, absent, hidden, head, **more)


def llama_like(**more: Any) -> Zoo:
    hooks = {"attn_out": out("self_attn"), "resid_mid": into("post_attention_layernorm"), "mlp_out": out("mlp")}
    hooks |= more.pop("hooks", {})
    return one_stack("model.layers", "model.norm", "pre", hooks, **more)


def gpt_like(form: str, attention: str = "attn", **more: Any) -> Zoo:
    hooks = {"attn_out": out(attention), "mlp_out": out("mlp")}
    if form == "pre":
        hooks["resid_mid"] = into("ln_2")
    hooks |= more.pop("hooks", {})
    return one_stack("transformer.h", "transformer.ln_f", form, hooks, **more)


def neox(form: str) -> Zoo:
    hooks = {"attn_out": out("attention"), "mlp_out": out("mlp")}
    if form == "pre":
        hooks["resid_mid"] = into("post_attention_layernorm")
    return one_stack(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        form,
        hooks,
        head=lambda model, hidden: model.embed_out(hidden) if hasattr(model, "embed_out") else model.lm_head(hidden),
    )


def parallel_llama(final_norm: str = "model.norm", **more: Any) -> Zoo:
    hooks = {"attn_out": out("self_attn"), "mlp_out": out("mlp")}
    return one_stack("model.layers", final_norm, "parallel", hooks, **more)


def norm_after(attention: str, mlp: str, middle: str, **more: Any) -> Zoo:
    """The branch passes a norm of its own before it joins the stream."""
    return llama_like(hooks={"attn_out": out(attention), "mlp_out": out(mlp), "resid_mid": into(middle)}, **more)


def mamba() -> Zoo:
    return one_stack("backbone.layers", "backbone.norm_f", "mixer", {"mixer_out": out("mixer")}, hidden="outputs")


def bert_like(
    blocks: str, attention: str, middle: str, mlp: str, norms: tuple[str, str], head: Any, **more: Any
) -> Zoo:
    hooks = {"attn_out": out(attention), "resid_mid": into(middle), "mlp_out": out(mlp)}
    return one_stack(blocks, None, "post", hooks, norms=norms, head=head, hidden="post", **more)


def encoder_decoder(encoder: Stack, decoder: Stack, head: Callable[[Any, Tensor], Tensor], **more: Any) -> Zoo:
    absent = {"encoder.cross_attn_out": "only the decoder attends to another stack"}
    for prefix, stack in (("encoder", encoder), ("decoder", decoder)):
        absent[f"{prefix}.mixer_out"] = NO_MIXER
        if stack.final_norm is None:
            absent[f"{prefix}.final_norm"] = POST_NORM
    hidden = "stream" if encoder.final_norm else "post"
    return Zoo({"encoder": encoder, "decoder": decoder}, absent, hidden, head, **more)


def t5() -> Zoo:
    def stack(prefix: str, mlp: int) -> Stack:
        hooks = {
            "attn_out": out("layer.0.SelfAttention"),
            "resid_mid": into(f"layer.{mlp}"),
            "mlp_out": out(f"layer.{mlp}.DenseReluDense"),
        }
        if prefix == "decoder":
            hooks["cross_attn_out"] = out("layer.1.EncDecAttention")
        return Stack(f"{prefix}.block", f"{prefix}.final_layer_norm", "pre", hooks)

    def head(model: Any, hidden: Tensor) -> Tensor:
        tied = model.lm_head.weight is model.shared.weight
        return model.lm_head(hidden * model.model_dim**-0.5 if tied else hidden)

    return encoder_decoder(stack("encoder", 1), stack("decoder", 2), head)


def bart() -> Zoo:
    hooks = {"attn_out": out("self_attn"), "resid_mid": into("fc1"), "mlp_out": out("fc2")}
    norms = ("self_attn_layer_norm", "final_layer_norm")
    encoder = Stack("model.encoder.layers", None, "post", hooks, norms)
    cross = {**hooks, "cross_attn_out": out("encoder_attn")}
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    decoder = Stack("model.decoder.layers", None, "post", cross, norms)

    def head(model: Any, hidden: Tensor) -> Tensor:
        return model.lm_head(hidden) + model.final_logits_bias

    return encoder_decoder(encoder, decoder, head, left="positions are learned, and cannot be given")


def distilbert_head(model: Any, hidden: Tensor) -> Tensor:
    return model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))))


_OPT = {"attn_out": out("self_attn"), "resid_mid": into("final_layer_norm"), "mlp_out": out("fc2")}
_BERT_LAYER = ("attention.output.dense", "intermediate", "output.dense")
_BERT_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
# The MLP's output already holds the stream in these, and attention's too in Bloom.
_BLOOM = {
    "attn_out": out("self_attention.dense"),
    "resid_mid": into("post_attention_layernorm"),
    "mlp_out": out("mlp.dense_4h_to_h"),
}
_MPT = {"attn_out": out("attn"), "resid_mid": into("norm_2"), "mlp_out": out("ffn.down_proj")}
_GRANITE = {
    "attn_out": out("self_attn", times="residual_multiplier"),
    "mlp_out": out("mlp", times="residual_multiplier"),
}
# transformers 4.57 calls Mixtral's mixture by another name.
_MIXTRAL = {"mlp_out": out("mlp", "block_sparse_moe")}
_GEMMA2 = ("post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm")
FAMILIES: dict[str, Zoo] = {
    "gpt2": gpt_like("pre"),
    "gpt_neo": gpt_like("pre"),
    "gpt_neox": neox("parallel"),
    "gpt_neox-sequential": neox("pre"),
    "gptj": gpt_like("parallel"),
    "llama": llama_like(),
    "llama-tied": llama_like(),
    "llama-dynamic": llama_like(lengths=True),
    "llama-longrope": llama_like(lengths=True),
    "mistral": llama_like(),
    "qwen2": llama_like(),
    "qwen3": llama_like(),
    "gemma": llama_like(),
    "gemma2": norm_after(*_GEMMA2, head=capped_head),
    "gemma3": norm_after(*_GEMMA2, head=capped_head),
    "phi": parallel_llama("model.final_layernorm"),
    "phi3": llama_like(),
    "phi3-longrope": llama_like(lengths=True),
    "olmo2": norm_after("post_attention_layernorm", "post_feedforward_layernorm", "mlp"),
    "opt": one_stack("model.decoder.layers", "model.decoder.final_layer_norm", "pre", _OPT),
    "opt-350m": one_stack(
        "model.decoder.layers",
        None,
        "post",
        {**_OPT, "resid_mid": into("fc1")},
        norms=("self_attn_layer_norm", "final_layer_norm"),
        hidden="stream, no end",
        head=lambda model, hidden: model.lm_head(model.model.decoder.project_out(hidden)),
    ),
    "bloom": gpt_like("pre", hooks=_BLOOM),
    "falcon": gpt_like("parallel", "self_attention"),
    "falcon-40b": gpt_like("parallel", "self_attention"),
    "falcon-rw": gpt_like("pre", "self_attention", hooks={"resid_mid": into("post_attention_layernorm")}),
    "stablelm": llama_like(),
    "stablelm-parallel": parallel_llama(),
    "cohere": parallel_llama(head=scaled_head("logit_scale")),
    "granite": llama_like(hooks=_GRANITE, head=scaled_head("logits_scaling", divide=True)),
    "mixtral": llama_like(hooks=_MIXTRAL, experts=out("mlp.gate", "block_sparse_moe.gate")),
    "qwen3_moe": llama_like(experts=out("mlp.gate")),
    "gpt_oss": llama_like(experts=out("mlp.router")),
    "mamba": mamba(),
    "mamba2": mamba(),
    "t5": t5(),
    "t5-v1.1": t5(),
    "bart": bart(),
    "bert": bert_like("bert.encoder.layer", *_BERT_LAYER, _BERT_NORMS, lambda model, hidden: model.cls(hidden)),
    "distilbert": bert_like(
        "distilbert.transformer.layer",
        "attention",
        "ffn",
        "ffn",
        ("sa_layer_norm", "output_layer_norm"),
        distilbert_head,
        left="positions are learned, and cannot be given",
    ),
    "roberta": bert_like(
        "roberta.encoder.layer", *_BERT_LAYER, _BERT_NORMS, lambda model, hidden: model.lm_head(hidden)
    ),
    "modernbert": one_stack(
        "model.layers",
        "model.final_norm",
        "pre",
        {"attn_out": out("attn"), "resid_mid": into("mlp_norm"), "mlp_out": out("mlp")},
        head=lambda model, hidden: model.decoder(model.head(hidden)),
        # Up to 4.57 its last entry was left before the norm, as in no other family.
        hidden="stream" if GENERATION >= 5 else "post",
    ),
    # Not among the families that are promised: found by structure alone.
    "deepseek_v3": llama_like(known=False),
    "glm4": norm_after("post_self_attn_layernorm", "post_mlp_layernorm", "post_attention_layernorm", known=False),
    "mpt": one_stack("transformer.blocks", "transformer.norm_f", "pre", _MPT, known=False),
    "qwen3_next": llama_like(hooks={"attn_out": out("self_attn", "linear_attn")}, known=False, plain=False),
}
# One of every kind of block, mask, position and head: what the fast tests try. All others are tried by `make test-all`.
COMMON = (
    *("gpt2", "gpt_neox", "llama", "llama-longrope", "gemma2", "opt-350m", "bloom", "falcon-40b", "granite", "gpt_oss"),
    *("mamba", "t5", "bart", "bert"),
)

"""What every architecture computes, read by plain torch hooks: tables written from transformers' modeling source.

Nothing here uses the package's own anatomy or capture. `alone(family, model, ids)` gives every value of one prompt
that is run by itself; `FAMILIES` says for each family where it is read, what the architecture does not have, and
which of transformers' hidden states are the same tensor.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import zoo_inside
from actcache.testing.tiny import BOS, EOS, PAD, ROPE_THRESHOLD, VOCABULARY, WINDOW, tiny_model
from zoo_inside import SITES as INNER_SITES
from zoo_inside import Hook, into, out

# transformers' major version.
GENERATION = int(transformers.__version__.partition(".")[0])
BLOCK_SITES = ("resid_pre", "attn_out", "cross_attn_out", "mixer_out", "resid_mid", "mlp_out", "resid_post")
SITES = (*BLOCK_SITES, *INNER_SITES)


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


@functools.cache
def model_of(family: str, seed: int = 0) -> Any:
    """The tiny model of a family, made once per test session: nothing may change it."""
    return tiny_model(family, seed=seed)


def prompts_of(seed: int = 0, lengths: Sequence[int] | None = None) -> list[list[int]]:
    """Prompts on both sides of every threshold up to the context, one of them made of the special ids."""
    rng = random.Random(seed)
    if lengths is None:
        lengths = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 13, ROPE_THRESHOLD, ROPE_THRESHOLD + 1, 29, 64, 2, 13]
    made = [[rng.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths]
    return [*made, [EOS, 7, PAD, PAD, 9, BOS, EOS, 11, EOS, 200, PAD]]


def hooks_in(family: str, prefix: str, block: nn.Module) -> dict[str, Hook]:
    """What is read in one block, beside its input and output: blocks of one model may differ."""
    hooks = FAMILIES[family].stacks[prefix].hooks | zoo_inside.inside_of(family, prefix)
    return {name: hook for name, hook in hooks.items() if find(block, hook.path) is not None}


def stack_depths(family: str, model: nn.Module) -> dict[str, int]:
    return {prefix: len(model.get_submodule(stack.blocks)) for prefix, stack in FAMILIES[family].stacks.items()}


def expected_sites(family: str, model: nn.Module) -> list[str]:
    """Every site this family has, complete."""
    zoo = FAMILIES[family]
    found = []
    for prefix, stack in zoo.stacks.items():
        dot = prefix and f"{prefix}."
        missing = {name.removeprefix(dot) for name in zoo.absent if name.startswith(dot)}
        found.append(f"{dot}embed")
        for i, block in enumerate(model.get_submodule(stack.blocks)):
            inside = hooks_in(family, prefix, block)
            there = [name for name in BLOCK_SITES if name not in missing]
            found += [f"{dot}{name}.{i}" for name in (*there, *(name for name in INNER_SITES if name in inside))]
        found += [f"{dot}final_norm"] * ("final_norm" not in missing)
    return [*found, "logits"]


def absent_sites(family: str, model: nn.Module) -> list[str]:
    """Sites that are in the vocabulary and that this family, or one block of it, does not have; complete."""
    found = [site if site.endswith("final_norm") else f"{site}.0" for site in FAMILIES[family].absent]
    for prefix, stack in FAMILIES[family].stacks.items():
        for i, block in enumerate(model.get_submodule(stack.blocks)):
            inside = hooks_in(family, prefix, block)
            missing = [name for name in INNER_SITES if name not in inside]
            found += [f"{prefix and f'{prefix}.'}{name}.{i}" for name in missing]
    return found


def site_names(family: str, model: nn.Module) -> dict[str, list[str]]:
    """Site names without a layer -> the complete ones, by layer."""
    found: dict[str, list[str]] = {}
    for site in expected_sites(family, model):
        name, _, layer = site.rpartition(".")
        found.setdefault(name if layer.isdigit() else site, []).append(site)
    return found


def name_of(site: str) -> str:
    """A site's name without its stack and layer."""
    return site.removeprefix("encoder.").removeprefix("decoder.").partition(".")[0]


def shifted_right(model: Any, ids: Sequence[int]) -> list[int]:
    return [model.config.decoder_start_token_id, *ids[:-1]]


def inputs_of(family: str, model: Any, ids: Sequence[int]) -> dict[str, Tensor]:
    """What one prompt is to this model."""
    inputs = {"input_ids": torch.tensor([list(ids)])}
    if FAMILIES[family].encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([shifted_right(model, ids)])
    return inputs


def present(block: nn.Module, paths: str | tuple[str, ...]) -> nn.Module:
    """The module under the first of these names."""
    found = find(block, paths)
    assert found is not None, f"{type(block).__name__} has none of {paths}"
    return found


def find(block: nn.Module, paths: str | tuple[str, ...]) -> nn.Module | None:
    for path in (paths,) if isinstance(paths, str) else paths:
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    return None


def bare(value: Any) -> Tensor:
    """The tensor, or the first of a tuple."""
    return value[0] if isinstance(value, tuple) else value


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def hooks_of(family: str, model: Any) -> Iterator[tuple[str, nn.Module, Hook]]:
    """Site, module and what to read there."""
    for prefix, stack in FAMILIES[family].stacks.items():
        dot = prefix and f"{prefix}."
        blocks = model.get_submodule(stack.blocks)
        yield f"{dot}embed", blocks[0], into()
        for i, block in enumerate(blocks):
            yield f"{dot}resid_pre.{i}", block, into()
            for name, hook in hooks_in(family, prefix, block).items():
                yield f"{dot}{name}.{i}", present(block, hook.path), hook
            yield f"{dot}resid_post.{i}", block, out()
        if stack.final_norm is not None:
            yield f"{dot}final_norm", model.get_submodule(stack.final_norm), out()


@contextmanager
def listening(family: str, model: Any, batch: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Fills a dictionary with what the next pass computes, site by site, as `[B, S, D]`; every value is a copy."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(site: str, module: nn.Module, hook: Hook, value: Tensor) -> None:
        assert site not in found, f"{site} was computed twice"
        # OPT runs its MLP on rows that are flattened over the batch.
        value = value.reshape(batch, length, -1)
        value = value if hook.part is None else hook.part(value, module, model)
        # Falcon adds attention's output into the MLP's in place: later it is another value.
        found[site] = value.clone() if hook.times is None else value * getattr(model.config, hook.times)

    for site, module, hook in hooks_of(family, model):
        if hook.side == "output":

            def on_output(module: Any, _a: Any, value: Any, site: str = site, hook: Hook = hook) -> None:
                keep(site, module, hook, bare(value))

            handles.append(module.register_forward_hook(on_output))
        else:

            def on_input(module: Any, args: Any, kwargs: Any, site: str = site, hook: Hook = hook) -> None:
                keep(site, module, hook, given(args, kwargs))

            handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def unused(family: str, model: Any) -> Any:
    """`model` as it was before its first pass: dynamic RoPE remembers the longest one."""
    if not FAMILIES[family].lengths:
        return model
    rotary = model.model.rotary_emb
    fresh = copy.deepcopy(model)
    fresh.model.rotary_emb = type(rotary)(config=model.config)
    return fresh


@torch.no_grad()
def alone(family: str, model: Any, ids: Sequence[int]) -> dict[str, Tensor]:
    """Site -> `[T, D]` (logits: `[T, V]`; heads side by side), for one prompt that is run by itself."""
    model = unused(family, model)
    with listening(family, model, 1, len(ids)) as found:
        found["logits"] = model(**inputs_of(family, model, ids)).logits.clone()
    return {site: value[0] for site, value in found.items()}


@functools.cache
def reference(family: str, seed: int, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """`alone`, once per prompt of a session."""
    return alone(family, model_of(family, seed), ids)


@functools.cache
def eager_model_of(family: str, seed: int = 0) -> Any:
    """The same model with attention in plain operations, which gives its probabilities."""
    model = model_of(family, seed)
    eager = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    return eager.eval()


@torch.no_grad()
def eager(family: str, model: Any, ids: Sequence[int]) -> dict[str, Tensor]:
    """`alone` for a model of `eager_model_of`, with the patterns of self-attention as transformers returns them:
    ``"pattern.0"`` is `[H, T, T]`. What it rounds otherwise than other attention does is in all of its values."""
    model = unused(family, model)
    with listening(family, model, 1, len(ids)) as found:
        output = model(**inputs_of(family, model, ids), output_attentions=True)
        found["logits"] = output.logits.clone()
    values = {site: value[0] for site, value in found.items()}
    for prefix, stack in FAMILIES[family].stacks.items():
        dot = prefix and f"{prefix}."
        told = getattr(output, f"{prefix}_attentions" if prefix else "attentions", None) or ()
        told = [each for each in told if each is not None]
        with_heads = [i for i in range(len(model.get_submodule(stack.blocks))) if f"{dot}z.{i}" in values]
        values |= {f"{dot}pattern.{i}": each[0] for i, each in zip(with_heads, told, strict=True)}
    return values


def same_hidden_states(family: str, model: nn.Module) -> dict[str, list[str | None]]:
    """For each stack, the site that each entry of transformers' `hidden_states` is; None where it is no site."""
    zoo = FAMILIES[family]
    found = {}
    for prefix, depth in stack_depths(family, model).items():
        dot = prefix and f"{prefix}."
        stream: list[str | None] = [f"{dot}resid_pre.{i}" for i in range(depth)]
        ends = {"stream": f"{dot}final_norm", "stream, no end": None, "post": f"{dot}resid_post.{depth - 1}"}
        if zoo.hidden == "outputs":
            found[prefix] = [*[f"{dot}resid_post.{i}" for i in range(depth)], f"{dot}final_norm"]
        else:
            found[prefix] = [*stream, ends[zoo.hidden]]
    return found


@torch.no_grad()
def hidden_states(family: str, model: Any, ids: Sequence[int]) -> dict[str, tuple[Tensor, ...]]:
    """transformers' own hidden states of one prompt, by stack."""
    output = unused(family, model)(**inputs_of(family, model, ids), output_hidden_states=True)
    if FAMILIES[family].encoder_decoder:
        return {"encoder": output.encoder_hidden_states, "decoder": output.decoder_hidden_states}
    return {"": output.hidden_states}


def chosen_experts(value: Any, k: int) -> Tensor:
    """`[N, k]`, sorted: the experts of each row, from what a router returned."""
    if isinstance(value, tuple):
        return value[-1].sort(dim=-1).values
    return value.topk(k, dim=-1).indices.sort(dim=-1).values


@contextmanager
def routing(family: str, model: Any, batch: int) -> Iterator[dict[int, Tensor]]:
    """Fills a dictionary with the experts that the next pass chooses, by layer, as `[B, S, k]`."""
    zoo, found = FAMILIES[family], {}
    assert zoo.experts is not None
    k = model.config.num_experts_per_tok
    handles = []
    for i, block in enumerate(model.get_submodule(zoo.stacks[""].blocks)):

        def on_output(_m: Any, _a: Any, value: Any, i: int = i) -> None:
            found[i] = chosen_experts(value, k).reshape(batch, -1, k)

        handles.append(present(block, zoo.experts.path).register_forward_hook(on_output))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |difference| over max |reference|."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))

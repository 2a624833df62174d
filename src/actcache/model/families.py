"""Where the parts of a block are called what: data, for what transformers offers no accessor for.

A row is a claim, never a fact: `verify` runs one short forward pass and holds every claim against the
identities of the residual stream. Rows whose modules a block lacks are skipped, the first row whose identities hold
wins, and when none holds the branch sites are refused. A new family is a new row, or a new name in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BlockForm:
    """How the residual stream runs through one kind of block.

    Each part lists alternative module paths relative to the block, most specific first. `attn_out` and `mlp_out`
    name the modules whose output is added to the stream, times `scale` (a config value) where there is one.
    `resid_mid` names a module whose *input* is the stream after attention; a "parallel" block has none.
    """

    name: str
    kind: Literal["sequential", "parallel"]
    attn_out: tuple[str, ...]
    mlp_out: tuple[str, ...]
    resid_mid: tuple[str, ...] = ()
    scale: str | None = None

    @property
    def identity(self) -> str:
        """The identity that this form claims, in words."""
        if self.kind == "parallel":
            return "resid_pre + attn_out + mlp_out = resid_post"
        return "resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post"


ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
NORM_BEFORE_MLP = ("post_attention_layernorm", "ln_2", "post_attention_norm", "ffn_norm", "norm_2")

BLOCK_FORMS = (
    # A second norm on each branch, before it joins the stream (gemma2, gemma3).
    BlockForm(
        "sandwich",
        "sequential",
        attn_out=("post_attention_layernorm",),
        mlp_out=("post_feedforward_layernorm",),
        resid_mid=("pre_feedforward_layernorm",),
    ),
    # gpt2, gpt_neo, llama, mistral, qwen2, qwen3, phi3, gemma, and most of what followed them.
    BlockForm("pre-norm", "sequential", attn_out=ATTENTION, mlp_out=MLP, resid_mid=NORM_BEFORE_MLP),
    # Both branches read the same stream (gptj, phi, cohere, gpt_neox with its default).
    BlockForm("parallel", "parallel", attn_out=ATTENTION, mlp_out=MLP),
)

# Direct children of the module that holds the block list, most common first.
FINAL_NORM = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_norm", "ln_out")

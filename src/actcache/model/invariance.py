"""What may share a forward pass, so that each prompt gives what it gives alone.

Most architectures allow any prompts together: padding goes to the right and is masked. What does not is recognised by
values of the configuration, so that architectures nobody has named here are recognised too, and by name only where
neither the configuration nor the modules tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from actcache.model.forward_inputs import accepts
from actcache.model.quantized import activation_scale
from actcache.model.rope import depends_on_longest, switches_attention

if TYPE_CHECKING:
    import torch

Lengths = Literal["any", "equal", "alone"]
_STRICTNESS: tuple[Lengths, ...] = ("alone", "equal", "any")


@dataclass(frozen=True)
class BatchPolicy:
    """How prompts of one model may be batched.

    Attributes:
        lengths: ``"any"`` prompts may share a batch, padded on the right; only those of ``"equal"`` length; or each
            runs ``"alone"``.
        why: the reason, as a sentence for people.
        coupled: whether a padded batch is known to give other values; otherwise unequal lengths are kept apart as a
            precaution.
        position_ids: whether to pass ``0, 1, 2, ...`` where the model takes position ids; False where the model makes
            others of its own.
        mask_always: whether the model needs a mask also without padding: it would make one from the ids otherwise, and
            lose real tokens that have the padding id.
        forget_lengths: whether the model remembers the longest or the shortest pass so far, and must be reset before
            each.
    """

    lengths: Lengths = "any"
    why: str = "Padding on the right under a mask changes no other position in this architecture."
    coupled: bool = False
    position_ids: bool = True
    mask_always: bool = False
    forget_lengths: bool = False


# Position ids are counted from the token ids (`padding_idx` + 1 for the first), padding inside a prompt included.
POSITIONS_FROM_IDS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
# Positions start at 2 without looking at the ids.
_POSITIONS_OFFSET = frozenset({"mra", "nystromformer", "yoso"})
# Without a mask, tokens that have the padding id are taken for padding.
_MASK_FROM_IDS = frozenset({"flaubert", "fsmt", "xlm"})
# Convolutions, pooling, or blocks whose number follows the padded length: a mask does not keep padding out.
_MIXES_PADDING = frozenset(
    {
        "big_bird",
        "bigbird_pegasus",
        "canine",
        "convbert",
        "cpmant",
        "fnet",
        "funnel",
        "longt5",
        "mobilebert",
        "mra",
        "nystromformer",
        "reformer",
        "yoso",
    }
)
# A state that is carried from token to token, seen in names of config values and in kinds of layers.
_STATE_VALUES = ("mamba_", "ssm_", "lru_", "linear_conv_", "linear_attn_", "conv_L_cache", "state_size")
_STATE_LAYERS = ("linear_attention", "mamba", "recurrent", "conv", "ssm", "rwkv", "deltanet")
_LAYER_LISTS = ("layer_types", "block_types", "layers_block_type")
_STATE_TYPES = ("mamba", "rwkv", "xlstm", "retnet", "recurrent")


def batch_policy(
    config: Mapping[str, Any], *, model: torch.nn.Module | None = None, quantization_config: object = None
) -> BatchPolicy:
    """How prompts may be batched on the model of this configuration.

    Args:
        config: ``config.json``, or ``model.config.to_dict()``, of any version of transformers; nested configurations
            (``text_config``) count.
        model: the model itself when it is in memory: its modules tell more.
        quantization_config: what the model is quantised with when it is loaded.
    """
    kinds = {str(part.get("model_type")) for part in nested(config)}
    found = list(_limits(config, kinds, model, quantization_config))
    asked: list[Lengths] = ["any", *(lengths for lengths, _, _ in found)]
    strictest = min(asked, key=_STRICTNESS.index)
    reasons = [why for lengths, _, why in found if lengths == strictest]
    made = kinds & (POSITIONS_FROM_IDS | _POSITIONS_OFFSET) or (model is not None and own_positions(model))
    return BatchPolicy(
        lengths=strictest,
        why=" ".join(reasons) or BatchPolicy.why,
        coupled=any(coupled for _, coupled, _ in found),
        position_ids=not made,
        mask_always=bool(kinds & _MASK_FROM_IDS),
        forget_lengths=depends_on_longest(config) or any(map(switches_attention, nested(config))),
    )


def _limits(
    config: Mapping[str, Any], kinds: set[str], model: torch.nn.Module | None, quantization_config: object
) -> Iterator[tuple[Lengths, bool, str]]:
    """What limits batches: which lengths may meet, whether padding is known to change values, and why."""
    if any(isinstance(part.get("expert_capacity"), int) for part in nested(config)):
        yield "alone", True, "Its experts take a limited number of tokens, so that prompts displace each other's."
    if activation_scale(config if model is None else model, quantization_config) == "per_batch":
        yield "alone", True, "Its activations are quantised with a scale over the whole batch."
    if depends_on_longest(config):
        yield "equal", True, "The frequencies of its rotary embedding depend on the longest prompt of the batch."
    if kinds & _MIXES_PADDING:
        yield "equal", True, "Its layers mix neighbouring positions, padding included, whatever the mask says."
    elif model is not None and not accepts(model, "attention_mask"):
        yield "equal", True, "It takes no attention mask, so that padding would count as text."
    if _carries_state(config, kinds):
        yield "equal", False, "It carries a state from token to token, so that prompts are not padded."


def _carries_state(config: Mapping[str, Any], kinds: Iterable[str]) -> bool:
    if any(name in kind for kind in kinds for name in _STATE_TYPES):
        return True
    for part in nested(config):
        if any(str(key).startswith(_STATE_VALUES) and value is not None for key, value in part.items()):
            return True
        layers = [kind for key in _LAYER_LISTS for kind in part.get(key) or ()]
        if any(state in str(kind) for kind in layers for state in _STATE_LAYERS):
            return True
    return False


def nested(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those inside it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from nested(value)


@dataclass(frozen=True)
class OwnPositions:
    """Positions that a model makes itself: the first token's, and the id that it does not count (None: it counts all
    that is there)."""

    first: int
    uncounted: int | None

    def of(self, real: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """Position ids ``[B, S]`` of what is `real`, bool ``[B, S]``: those that each row's prompt has alone."""
        counted = real if ids is None or self.uncounted is None else real & ids.ne(self.uncounted)
        elsewhere = self.first if self.uncounted is None else self.uncounted
        return (counted.long().cumsum(1) + (self.first - 1)).where(counted, elsewhere)


def own_positions(model: torch.nn.Module) -> OwnPositions | None:
    """The positions that this model makes, where its modules tell: its table of them has a row for padding, or its own
    ids do not start at 0."""
    for module in model.modules():
        padding = getattr(module._modules.get("position_embeddings"), "padding_idx", None)
        if padding is not None:
            return OwnPositions(padding + 1, padding)
        own = module._buffers.get("position_ids")
        if own is not None and own.numel() and not own.is_meta and (first := int(own.flatten()[0])) != 0:
            return OwnPositions(first, None)
    return None

"""From what a person passes (text, token ids, chats, tensors) to the arguments of one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from actcache.errors import OptionError, PromptError, PromptTypeError, TokenizerError
from actcache.model.chat import Messages, chat_ids, is_chat
from actcache.model.config_values import context_length, first_int, text_values
from actcache.model.decoder_inputs import require_decoder_start
from actcache.model.forward_inputs import ForwardInputs, accepts
from actcache.model.front_padding import effect_of_front_padding
from actcache.model.invariance import BatchPolicy, OwnPositions, batch_policy, own_positions
from actcache.model.media import media_tokens
from actcache.model.offload import input_device
from actcache.model.rope import forget_lengths
from actcache.model.structure import unwrapped

Inputs = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Messages
    | Sequence[Messages]
    | Tensor
    | Mapping[str, Any]
)

# Arguments of a model that have a number for each token.
_TENSORS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "decoder_input_ids"}


@dataclass
class Prompts:
    """Token ids of each prompt, the chats that they were made from, and the strings of the tokens where they are known.

    `chats` holds None for a prompt that was no chat.
    """

    ids: list[list[int]]
    chats: list[Messages | None]
    tokens: list[list[str]] | None = None
    tokenizer: Any = None


@dataclass
class Prepared:
    """Arguments of one forward pass, and the prompts in it where they are known."""

    kwargs: dict[str, Any]
    prompts: Prompts | None


class Preparer:
    """Makes arguments of passes of one model."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        if isinstance(tokenizer, (str, PathLike)):
            name = repr(str(tokenizer))
            raise OptionError(f"tokenizer is {name}: expected a tokenizer, AutoTokenizer.from_pretrained({name})")
        self._model = model
        self._tokenizer = tokenizer
        self.device = input_device(model)
        to_dict = getattr(getattr(unwrapped(model), "config", None), "to_dict", None)
        self._config: Mapping[str, Any] = to_dict() if callable(to_dict) else {}
        self.policy = batch_policy(self._config, model=model)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, found by the model's name where none was given; raises `TokenizerError`."""
        if self._tokenizer is None:
            self._tokenizer = find_tokenizer(self._model)
        return self._tokenizer

    @cached_property
    def counts_positions(self) -> bool:
        """Whether the model is told where its tokens stand."""
        return self.policy.position_ids and accepts(self._model, "position_ids")

    @cached_property
    def needs_decoder(self) -> bool:
        """Whether a decoder has to be given tokens; one that takes them may also be around a text model without."""
        return accepts(self._model, "decoder_input_ids") and bool(self._config.get("is_encoder_decoder", True))

    @cached_property
    def _forward(self) -> ForwardInputs:
        start = partial(require_decoder_start, self._config) if self.needs_decoder else None
        return ForwardInputs(self._model, self.policy, decoder_start=start, always_mask=True)

    def of_mapping(self, inputs: Mapping[str, Any]) -> Prepared:
        """A mapping as it is, on the model's device, with position ids that follow its mask where it has none, and has
        padding in front of tokens: everything else the model counts by itself. A model that makes others than
        ``0, 1, 2, ...`` is given those."""
        for key in _TENSORS & inputs.keys():
            if isinstance(inputs[key], (list, tuple)):
                raise PromptTypeError(
                    f"inputs[{key!r}] is a {type(inputs[key]).__name__}: a dict goes to the model as it is, and has to "
                    "hold tensors (return_tensors='pt' of a tokenizer); lists of token ids are passed without a dict"
                )
        kwargs = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids")
        unplaced = self._unplaced(kwargs)
        if unplaced is not None:
            if self.counts_positions:
                kwargs["position_ids"] = (unplaced.long().cumsum(1) - 1).clamp_min(0)
            elif self._own_positions is not None:
                kwargs["position_ids"] = self._own_positions.of(unplaced.ne(0), ids)
        prompts = None
        if isinstance(ids, Tensor) and ids.ndim == 2:
            real = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
            rows = [row[here.bool()].tolist() for row, here in zip(ids, real, strict=True)]
            prompts = self._with_strings(Prompts(rows, [None] * len(rows)))
        return Prepared(kwargs, prompts)

    def require_placed(self, inputs: Mapping[str, Any]) -> None:
        """Raise `PromptError` where padding stands in front of tokens and the model takes it for text."""
        mask, ids = self._unplaced(inputs), inputs.get("input_ids")
        if mask is None or self.counts_positions:
            return
        padding = first_int(text_values(self._config), "pad_token_id") or 0
        below = ids[~mask.bool()].tolist() if isinstance(ids, Tensor) and ids.shape == mask.shape else []
        # Where positions are counted from the ids, all but the padding id are alike.
        fill = next((token for token in below if token != padding), padding)
        effect = effect_of_front_padding(self._model, fill, self._own_positions, len(mask))
        if effect:
            raise PromptError(
                "padding stands in front of tokens, and this model takes it into account: there it changes the values "
                f"of a few tokens by {effect:.2g} of the largest one. Pad on the right (tokenizer.padding_side = "
                "'right'), or pass texts or lists of token ids, which are padded so. What the model makes of it as it "
                "is, ac.capture records around your own call."
            )

    @cached_property
    def _own_positions(self) -> OwnPositions | None:
        return own_positions(self._model) if accepts(self._model, "position_ids") else None

    def _unplaced(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The mask of a pass that has padding in front of tokens, where nothing else says where these stand."""
        mask = inputs.get("attention_mask")
        fresh = "position_ids" not in inputs and inputs.get("past_key_values") is None
        return mask if fresh and _pads_in_front(mask) and not self._counts_images(inputs) else None

    def _counts_images(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the model makes positions out of its images, by rows and columns, and looks at the mask itself."""
        grids = any("grid" in name and value is not None for name, value in kwargs.items())
        return grids and any(callable(getattr(part, "get_rope_index", None)) for part in self._model.modules())

    def read(self, inputs: Any) -> Prompts:
        """Texts, token ids or chats as token ids; raises `PromptError`, `PromptTypeError` or `TokenizerError`."""
        prompts = self._read(inputs)
        self.check(prompts.ids)
        return self._with_strings(prompts)

    def one_pass(self, ids: list[list[int]]) -> dict[str, Any]:
        """Arguments of a pass over these prompts: right padding, a mask from lengths, position ids where the model
        takes them, and the prompt shifted right for the decoder of an encoder-decoder model."""
        return self._forward.make(ids, self.device)

    def begin(self) -> None:
        """Make the model forget which lengths it has seen, where it remembers them."""
        if self.policy.forget_lengths:
            forget_lengths(self._model)

    def _read(self, inputs: Any) -> Prompts:
        if isinstance(inputs, str):
            inputs = [inputs]
        if isinstance(inputs, Tensor):
            if inputs.is_floating_point() or inputs.ndim not in (1, 2):
                raise PromptTypeError(
                    f"token ids must be an integer tensor [S] or [B, S], not {inputs.dtype} {list(inputs.shape)}"
                )
            rows = (inputs[None] if inputs.ndim == 1 else inputs).tolist()
            return Prompts(rows, [None] * len(rows))
        where = ""
        try:
            items = list(inputs)
        except TypeError:
            items, where = [], f" in {inputs!r:.80}"
        if not items:
            raise PromptError(
                f"there is no prompt{where}: pass a text, a list of texts, chats, token ids, or a dict of tensors"
            )
        if all(isinstance(item, str) for item in items):
            for i, text in enumerate(items):
                if not text:
                    raise PromptError(f"prompt {i} is empty: every prompt needs at least one token")
            encoded = self.tokenizer(items, padding=False, truncation=False)["input_ids"]
            return Prompts([list(ids) for ids in encoded], [None] * len(items))
        if all(_is_id(item) for item in items):
            return Prompts([[int(item) for item in items]], [None])
        if is_chat(items):
            items = [items]
        if any(map(is_chat, items)):
            return self._chats(items)
        rows = [_ids_of(item) for item in items]
        known = [isinstance(item, str) or row is not None for item, row in zip(items, rows, strict=True)]
        # What is no prompt at all before what is only another kind than the first.
        if not all(known):
            odd = known.index(False)
            raise PromptTypeError(_other_kind(odd, items[odd]))
        other = next((i for i, row in enumerate(rows) if (row is None) != (rows[0] is None)), None)
        if other is not None:
            raise PromptTypeError(_other_kind(other, items[other]))
        return Prompts([row for row in rows if row is not None], [None] * len(rows))

    def _chats(self, items: list[Any]) -> Prompts:
        for i, item in enumerate(items):
            if not is_chat(item):
                raise PromptTypeError(_other_kind(i, item))
            if any("role" not in message for message in item):
                raise PromptError(f"prompt {i} has a chat message without a 'role': {item!r:.80}")
        return Prompts([chat_ids(self.tokenizer, item, i) for i, item in enumerate(items)], items)

    def _with_strings(self, prompts: Prompts) -> Prompts:
        prompts.tokenizer = self._tokenizer
        if self._tokenizer is not None:
            convert = self._tokenizer.convert_ids_to_tokens
            prompts.tokens = [[str(token) for token in convert(ids)] for ids in prompts.ids]
        return prompts

    def check(self, prompts: list[list[int]]) -> None:
        """Raise `PromptError` for a prompt that the model cannot take."""
        values = text_values(self._config)
        limit, size = context_length(values), first_int(values, "vocab_size")
        # The embeddings that take the places of these need no row in the table.
        beyond = frozenset().union(*media_tokens(unwrapped(self._model)).values())
        for i, ids in enumerate(prompts):
            if not ids:
                raise PromptError(f"prompt {i} has no tokens: every prompt needs at least one")
            if limit is not None and len(ids) > limit:
                raise PromptError(f"prompt {i} has {len(ids)} tokens, the model's context is {limit}: shorten it")
            if size is not None and not 0 <= min(ids) <= max(ids) < size:
                bad = next((t for t in ids if not 0 <= t < size and t not in beyond), None)
                if bad is None:
                    continue
                raise PromptError(f"prompt {i} holds token id {bad}, the model's vocabulary is 0 to {size - 1}")


def prepare(model: nn.Module, inputs: Inputs, tokenizer: Any) -> Prepared:
    """Arguments for ``model(**kwargs)``, of which all prompts are in one pass.

    Raises `PromptError` (also for prompts that would change each other's values in one pass, and for padding in front
    of tokens that the model takes into account), `PromptTypeError`, `TokenizerError` or `OptionError`.
    """
    preparer = Preparer(model, tokenizer)
    if isinstance(inputs, Mapping):
        preparer.require_placed(inputs)
        return preparer.of_mapping(inputs)
    prompts = preparer.read(inputs)
    _check_together(preparer.policy, prompts.ids)
    preparer.begin()
    return Prepared(preparer.one_pass(prompts.ids), prompts)


def find_tokenizer(model: nn.Module) -> Any:
    """The tokenizer saved beside this model, by the name it was loaded from; raises `TokenizerError`."""
    name = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise TokenizerError(
            f"this {type(model).__name__} was not loaded by name, so its tokenizer is unknown: pass tokenizer="
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(f"no tokenizer was found at {name!r}: pass tokenizer= ({type(error).__name__})") from error


def single_token(text: str, tokenizer: Any) -> int:
    """The id of a text that is one token. Raises `OptionError` for one that is not."""
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        raise OptionError(f"{text!r} is {len(found)} tokens ({found}) and must be one: give a token id")
    return int(found[0])


def _pads_in_front(mask: Any) -> TypeGuard[Tensor]:
    """Whether a mask ``[B, S]``, which may number the documents of a row, has padding before some token."""
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask.ne(0).long().diff(dim=1) > 0).any())


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and getattr(value, "shape", ()) == ()


def _ids_of(item: Any) -> list[int] | None:
    """A list of token ids; None for what is none."""
    ids = None if isinstance(item, (str, bytes, Mapping)) or not hasattr(item, "__iter__") else list(item)
    return None if ids is None or not all(map(_is_id, ids)) else [int(token) for token in ids]


def _other_kind(i: int, item: Any) -> str:
    return (
        f"prompt {i} is {item!r:.80}: expected texts only, or lists of token ids only, or chats only (lists of "
        "messages like {'role': 'user', 'content': '...'})"
    )


def _check_together(policy: BatchPolicy, prompts: list[list[int]]) -> None:
    """Refuse prompts that one pass would not give what they are alone."""
    alone, unequal = policy.lengths == "alone", len(set(map(len, prompts))) > 1
    if policy.coupled and len(prompts) > 1 and (alone or unequal):
        what = "one prompt at a time" if alone else "prompts of one length at a time"
        raise PromptError(
            f"{len(prompts)} prompts in one pass of this model would change each other's values. {policy.why} "
            f"Pass {what}, or use ac.extract_batches, which runs them so."
        )

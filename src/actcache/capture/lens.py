"""The logit lens: what the model would predict if the stream at a layer were the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actcache.capture.inputs import find_tokenizer
from actcache.capture.rows import require_prompt
from actcache.capture.streams import Streams
from actcache.errors import LayerRangeError, OptionError, TokenizerError, require_choice
from actcache.model.head import Head
from actcache.model.sites import Site, resolve_layers

_SITES = ("resid_pre", "resid_mid", "resid_post")


@dataclass(eq=False, repr=False)
class LogitLens:
    """Predictions from `layers` of `site`, of every prompt and position.

    Attributes:
        site: what was read.
        layers: the layers read, as the first dimension of the tensors.
        tokens: ids ``[L, B, S, k]`` of the best `k` tokens, best first; -1 where a position is padding.
        probabilities: theirs, float32 ``[L, B, S, k]``; 0 where a position is padding.
        mask: which positions are real, bool ``[B, S]``.

    With ``pos_slice`` an int the dimension of the positions is of size 1.
    """

    site: str
    layers: list[int]
    tokens: Tensor
    probabilities: Tensor
    mask: Tensor
    _streams: list[Tensor]
    _normalised: bool
    _head: Head
    _tokenizer: Any

    @torch.no_grad()
    def logits(self, layer: int) -> Tensor:
        """All logits ``[B, S, V]`` from one of the layers, a number of the model (negative: from the last one read)."""
        stream = self._streams[self._number(layer)]
        return torch.cat(list(self._in_parts(stream.reshape(-1, stream.shape[-1])))).reshape(*stream.shape[:-1], -1)

    @torch.no_grad()
    def rank(self, token: int) -> Tensor:
        """How many tokens each layer finds likelier than `token`: ``[L, B, S]``, 0 for the best; -1 at padding."""
        size = self._head.vocab_size
        if not 0 <= token < size:
            raise OptionError(f"token {token} is outside the model's vocabulary of {size} (0 to {size - 1})")
        found = torch.full(self.tokens.shape[:-1], -1)
        for ranks, logits in zip(found, self._of_real_rows(), strict=True):
            ranks[self.mask] = torch.cat([(part > part[:, token, None]).sum(-1).cpu() for part in logits])
        return found

    def first_layer(self, token: int, k: int = 1) -> Tensor:
        """The first of the layers that has `token` among its best `k`: ``[B, S]``, -1 where none has."""
        ranks = self.rank(token)
        inside = torch.cat([(ranks >= 0) & (ranks < k), torch.ones(1, *self.mask.shape, dtype=torch.bool)])
        return torch.tensor([*self.layers, -1])[inside.int().argmax(0)]

    def table(self, prompt: int = 0, position: int = -1) -> str:
        """The best tokens of one position of a prompt (real tokens are counted), a layer a line.

        Raises `LayerRangeError` for a prompt or position that there is not."""
        real = self.mask[require_prompt(prompt, len(self.mask))].nonzero()[:, 0]
        if not -len(real) <= position < len(real):
            raise LayerRangeError(f"position {position} is out of range: prompt {prompt} has {len(real)} here")
        at = int(real[position])
        cells = [
            [f"{self._text(int(i))} {p:.3f}" for i, p in zip(ids, probabilities, strict=True)]
            for ids, probabilities in zip(
                self.tokens[:, prompt, at], self.probabilities[:, prompt, at].tolist(), strict=True
            )
        ]
        names = [f"{self.site}.{layer}" for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        first = max(map(len, names), default=0)
        return "\n".join(
            f"{name:<{first}}  "
            + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for name, row in zip(names, cells, strict=True)
        )

    def __repr__(self) -> str:
        prompts, positions = self.mask.shape
        said = f"LogitLens of {len(self.layers)} layers of {self.site}, {prompts} prompts, {positions} positions"
        if not self.layers or not bool(self.mask[:1].any()):
            return said
        return f"{said}; the last position of the first prompt:\n{self.table()}"

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            try:
                self._tokenizer = find_tokenizer(self._head.model)
            except (TokenizerError, ReferenceError):
                self._tokenizer = False
        return repr(self._tokenizer.decode([token])) if self._tokenizer else str(token)

    def _number(self, layer: int) -> int:
        if layer in self.layers:
            return self.layers.index(layer)
        if -len(self.layers) <= layer < 0:
            return layer
        has = ", ".join(map(str, self.layers)) or "none"
        raise LayerRangeError(f"layer {layer} was not read: the lens has layers {has}")

    def _in_parts(self, rows: Tensor) -> Iterator[Tensor]:
        return self._head.in_parts(rows, normalised=self._normalised)

    def _of_real_rows(self) -> Iterator[Iterator[Tensor]]:
        """Layer by layer the logits of the positions that are no padding, in parts."""
        for stream in self._streams:
            yield self._in_parts(stream[self.mask.to(stream.device)])


@torch.no_grad()
def make_lens(
    streams: Streams, name: str, layers: Any, top_k: int, pos_slice: Any, recompute_ln: bool, tokenizer: Any
) -> LogitLens:
    """See `ActivationCache.logit_lens`."""
    require_choice(name, _SITES, "site of the residual stream")
    head = streams.head
    if not 1 <= top_k <= head.vocab_size:
        raise OptionError(f"top_k is {top_k}: expected 1 to {head.vocab_size}, the size of the vocabulary")
    dot = f"{streams.stack}." if streams.stack else ""
    held = streams.cache.layer_numbers(f"{dot}{name}")
    if layers is None:
        numbers = held
    else:
        numbers = resolve_layers(layers, streams.depth) if layers != [] else []
    sites = [Site(name, number, stack=streams.stack) for number in numbers]
    if not held:
        streams.get(*(sites or [Site(name, 0, stack=streams.stack)]))
    shown = Site(name, held[0], stack=streams.stack)
    with streams.picking(pos_slice):
        values = [_with_positions(value) for value in streams.get(*sites)]
        (shape,) = (_with_positions(value).shape[:2] for value in streams.get(shown))
    mask = streams.mask(shown) if pos_slice is None else None
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    norm = streams.norm(streams.depth, mlp_input=False)
    normalised = norm is not None and not recompute_ln
    if norm is not None and not recompute_ln:
        with streams.picking(pos_slice):
            (whole,) = streams.get(streams.at_boundary(streams.depth))
        scale = norm.scale(_with_positions(whole))
        values = [norm.finish(norm.divide(value, scale)) for value in values]
    tokens = torch.full((len(numbers), *shape, top_k), -1)
    probabilities = torch.zeros(tokens.shape)
    lens = LogitLens(f"{dot}{name}", numbers, tokens, probabilities, mask, values, normalised, head, tokenizer)
    for number, parts in enumerate(lens._of_real_rows()):
        best = [part.float().softmax(-1).topk(top_k) for part in parts]
        tokens[number][mask] = torch.cat([top.indices.cpu() for top in best])
        probabilities[number][mask] = torch.cat([top.values.cpu() for top in best])
    return lens


def _with_positions(value: Tensor) -> Tensor:
    return value if value.ndim == 3 else value[:, None]

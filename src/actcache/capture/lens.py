"""The logit lens: what the model would predict if the stream at a layer were the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actcache.capture.inputs import single_token
from actcache.capture.rows import require_prompt
from actcache.errors import LayerRangeError, MissingFileError, OptionError, TokenizerError, UnknownKeyError
from actcache.model.head import Head
from actcache.model.layer_predictions import LayerPredictions, rank_of
from actcache.model.pieces import escaped, piece_of, quoted
from actcache.written import in_place_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

STREAM_SITES = ("resid_pre", "resid_mid", "resid_post")
# A token takes no more than so many columns of a table.
_LONGEST = 16

# The rows of one layer (by its place among those of the lens), part by part, as the head is to be given them.
RowsOf = Callable[[int], Iterable[Tensor]]


@dataclass(eq=False, repr=False)
class LogitLens:
    """Predictions from `layers` of `site`, of every prompt and position.

    The stream at a layer is put through the model's final norm and head (with its bias, scaling and soft cap) as if the
    blocks behind it were not there: the logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens"), or with
    translators the tuned lens (Belrose et al. 2023, arXiv:2303.08112).

    Attributes:
        site: what was read.
        layers: the layers read, as the first dimension of the tensors.
        tokens: ids int64 ``[L, B, S, k]`` of the best `k` tokens, best first; -1 where a position is padding.
        probabilities: theirs, float32 ``[L, B, S, k]``; 0 where a position is padding.
        entropy: of the prediction of each layer, in nats, float32 ``[L, B, S]``; nan where a position is padding.
        kl: how far it is from the model's own prediction, see there.
        chosen: ids of the tokens that were asked for by name.
        chosen_ranks: int64 ``[L, B, S, t]``, how many tokens each layer finds likelier than the chosen: 0 is the best;
            those that are equally likely share the better rank; -1 where a position is padding.
        chosen_probabilities: float32 ``[L, B, S, t]``; 0 where a position is padding.
        mask: which positions are real, bool ``[B, S]``.
        positions: which token of its prompt each position is, int64 ``[B, S]``, counted among the real tokens; -1 where
            it is padding. Of a cache that holds chosen positions only (`kept` is True) those are counted.
        input_ids: the token at each position, int64 ``[B, S]`` (the prediction is of what follows it); -1 where it is
            padding or not known.
    """

    site: str
    layers: list[int]
    tokens: Tensor
    probabilities: Tensor
    entropy: Tensor
    chosen: list[int]
    chosen_ranks: Tensor
    chosen_probabilities: Tensor
    mask: Tensor
    positions: Tensor
    input_ids: Tensor
    kept: bool
    _kl: Tensor | None
    _final: str
    _rows: RowsOf
    _normalised: bool
    _head: Head
    _load_tokenizer: Callable[[], Any]
    _pieces: dict[int, str] = field(default_factory=dict)

    @property
    def kl(self) -> Tensor:
        """``KL(final || layer)`` in nats, float32 ``[L, B, S]``: the expectation, under the model's own prediction, of
        how much likelier it finds a token than the layer does. nan where a position is padding.

        Raises `UnknownKeyError` where the stream behind the last block is not among what the lens was made of."""
        if self._kl is None:
            raise UnknownKeyError(
                f"the final prediction follows from {self._final}, which the cache does not hold: capture it too, as "
                f"in ac.run_with_cache(model, inputs, sites=[..., {self._final!r}])"
            )
        return self._kl

    @property
    def counted(self) -> str:
        """What `positions` are numbers of: "position" of the prompt, or "kept position" where some were chosen."""
        return "kept position" if self.kept else "position"

    @property
    def has_kl(self) -> bool:
        """Whether the final prediction is known, from which `kl` is measured."""
        return self._kl is not None

    @property
    def vocab_size(self) -> int:
        """How many tokens there are to predict."""
        return self._head.vocab_size

    @torch.no_grad()
    def logits(self, layer: int) -> Tensor:
        """All logits ``[B, S, V]`` from one of the layers, a number of the model (negative: from the last one read);
        0 where a position is padding."""
        parts = list(self._logits(self._number(layer)))
        dtype = parts[0].dtype if parts else torch.float32
        found = torch.zeros(*self.mask.shape, self._head.vocab_size, dtype=dtype)
        if parts:
            found[self.mask] = torch.cat([part.cpu() for part in parts])
        return found

    @torch.no_grad()
    def rank(self, token: int | str) -> Tensor:
        """How many tokens each layer finds likelier than `token`: int64 ``[L, B, S]``; 0 is the best, -1 padding."""
        (number,) = read_chosen(token, self._head.vocab_size, self._load_tokenizer)
        if number in self.chosen:
            return self.chosen_ranks[..., self.chosen.index(number)]
        found = torch.full(self.tokens.shape[:-1], -1)
        for place, ranks in enumerate(found):
            parts = [rank_of(part, number) for part in self._logits(place)]
            if parts:
                ranks[self.mask] = torch.cat(parts)
        return found

    def first_layer(self, token: int | str, k: int = 1) -> Tensor:
        """The first of the layers that has `token` among its best `k`: ``[B, S]``, -1 where none has."""
        ranks = self.rank(token)
        inside = torch.cat([(ranks >= 0) & (ranks < k), torch.ones(1, *self.mask.shape, dtype=torch.bool)])
        return torch.tensor([*self.layers, -1])[inside.int().argmax(0)]

    def text(self, token: int | Sequence[int]) -> str:
        r"""A token, or several one after the other, as text, leading spaces included; a token is its number where no
        tokenizer is known. A byte that is no UTF-8, as of one that is part of a character, is written ``\xab``."""
        return escaped("".join(map(self._piece, [token] if isinstance(token, int) else token)))

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = str(token) if self._tokenizer is None else piece_of(self._tokenizer, token)
        return self._pieces[token]

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            return self._load_tokenizer()
        except (TokenizerError, ReferenceError):
            return None

    def table(self, prompt: int = 0, position: int = -1, *, width: int = 80) -> str:
        """The predictions at one position of a prompt (real tokens are counted), a layer a line: entropy, KL (see
        `kl`), of each chosen token probability and rank, and as many of the best tokens as fit into `width` columns.

        Raises `LayerRangeError` for a prompt or position that there is not."""
        prompt = require_prompt(prompt, len(self.mask))
        real = self.mask[prompt].nonzero()[:, 0]
        require_position(position, prompt, len(real))
        at = int(real[position])
        if not self.layers:
            return ""
        token = int(self.input_ids[prompt, at])
        behind = "" if token < 0 else f", behind {_shown(self._piece(token))}"
        lines = [f"prompt {prompt}, {self.counted} {int(self.positions[prompt, at])}{behind}"]
        columns = [("layer", [f"{self.site}.{layer}" for layer in self.layers], "<")]
        columns.append(("entropy", [f"{x:.3f}" for x in self.entropy[:, prompt, at].tolist()], ">"))
        if self._kl is not None:
            columns.append(("KL", [f"{x:.3f}" for x in self._kl[:, prompt, at].tolist()], ">"))
        for i, number in enumerate(self.chosen):
            chances = self.chosen_probabilities[:, prompt, at, i].tolist()
            ranks = self.chosen_ranks[:, prompt, at, i].tolist()
            cells = [f"{p:.3f} #{rank}" for p, rank in zip(chances, ranks, strict=True)]
            columns.append((_shown(self._piece(number)), cells, "<"))
        for i in range(self.tokens.shape[-1]):
            best, chances = self.tokens[:, prompt, at, i].tolist(), self.probabilities[:, prompt, at, i].tolist()
            cells = [f"{_shown(self._piece(id_))} {p:.3f}" for id_, p in zip(best, chances, strict=True)]
            columns.append(("best" if i == 0 else "", cells, "<"))
        # The layers and one token at least, however narrow it is.
        least = len(columns) - self.tokens.shape[-1] + 1
        return "\n".join(lines + _set(columns, width, least))

    def to_html(self, path: str | PathLike[str], *, title: str | None = None) -> Path:
        """Write a page that needs nothing else, no network either: a map of tokens and layers, coloured by probability,
        entropy, KL, or rank or probability of a chosen token, with details of each cell under the pointer or by the
        arrow keys. Returns the path. A file that is there is replaced when the page is whole.

        Raises `MissingFileError` where there is no folder to write it in."""
        from actcache.capture.lens_html import page

        place = Path(path).expanduser()
        if not place.parent.is_dir():
            raise MissingFileError(f"there is no folder {str(place.parent)!r} to write a page in: make it first")
        made = page(self, title=title).encode()
        with in_place_of(place) as file:
            file.write_bytes(made)
        return place

    def _repr_html_(self) -> str:
        from actcache.capture.lens_html import notebook

        return notebook(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(self._said(options.max_width), no_wrap=True, overflow="ellipsis")

    def __repr__(self) -> str:
        return self._said(80)

    def _said(self, width: int) -> str:
        prompts, positions = self.mask.shape
        said = f"LogitLens of {len(self.layers)} layers of {self.site}, {prompts} prompts, {positions} positions"
        if not self.layers or not bool(self.mask[:1].any()):
            return said
        return f"{said}\n{self.table(width=width)}"

    def _number(self, layer: int) -> int:
        if layer in self.layers:
            return self.layers.index(layer)
        if -len(self.layers) <= layer < 0:
            return layer % len(self.layers)
        has = ", ".join(map(str, self.layers)) or "none"
        raise LayerRangeError(f"layer {layer} was not read: the lens has layers {has}")

    def _logits(self, place: int) -> Iterator[Tensor]:
        """The logits of the positions that are no padding, in parts."""
        for rows in self._rows(place):
            yield from self._head.in_parts(rows.to(self._head.device), normalised=self._normalised)


def lens_of(
    made: LayerPredictions,
    mask: Tensor,
    *,
    site: str,
    layers: list[int],
    chosen: list[int],
    positions: Tensor,
    input_ids: Tensor,
    final: str,
    rows: RowsOf,
    normalised: bool,
    head: Head,
    load_tokenizer: Callable[[], Any],
    kept: bool = False,
) -> LogitLens:
    """The lens whose predictions `made` has for the real positions, prompt by prompt; see `LogitLens`."""

    def spread(values: Tensor, padding: float) -> Tensor:
        found = torch.full((len(layers), *mask.shape, *values.shape[2:]), padding, dtype=values.dtype)
        if layers:
            found[:, mask] = values
        return found

    return LogitLens(
        site=site,
        layers=layers,
        tokens=spread(made.tokens, -1),
        probabilities=spread(made.probabilities, 0),
        entropy=spread(made.entropy, torch.nan),
        chosen=chosen,
        chosen_ranks=spread(made.ranks, -1),
        chosen_probabilities=spread(made.chosen, 0),
        mask=mask,
        positions=positions,
        input_ids=input_ids,
        kept=kept,
        _kl=None if made.kl is None else spread(made.kl, torch.nan),
        _final=final,
        _rows=rows,
        _normalised=normalised,
        _head=head,
        _load_tokenizer=load_tokenizer,
    )


def read_chosen(tokens: Any, vocab_size: int, load_tokenizer: Callable[[], Any]) -> list[int]:
    """Token ids, or texts that are one token each, as ids without repetition; None for none of them.

    Raises `OptionError`, and `TokenizerError` for a text where no tokenizer is known."""
    if tokens is None:
        return []
    if isinstance(tokens, Tensor) or hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
    given = tokens if isinstance(tokens, Sequence) and not isinstance(tokens, str) else [tokens]
    found: dict[int, None] = {}
    for token in given:
        number = single_token(token, load_tokenizer()) if isinstance(token, str) else token
        if not isinstance(number, int) or isinstance(number, bool):
            raise OptionError(f"tokens holds {number!r:.80}: expected token ids, or texts that are one token each")
        if not 0 <= number < vocab_size:
            raise OptionError(
                f"token {number} is outside the model's vocabulary of {vocab_size} (0 to {vocab_size - 1})"
            )
        found[number] = None
    return list(found)


def check_top_k(top_k: Any, vocab_size: int) -> None:
    """Raise `OptionError` for what is not a number of tokens."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= vocab_size:
        raise OptionError(f"top_k is {top_k!r}: expected 1 to {vocab_size}, the size of the vocabulary")


def require_position(position: int, prompt: int, tokens: int) -> None:
    """Raise `LayerRangeError` where a prompt of so many tokens has no such position."""
    if not -tokens <= position < tokens:
        raise LayerRangeError(f"position {position} is out of range: prompt {prompt} has {tokens} here")


def _shown(piece: str) -> str:
    """On one line, with what is not printable escaped, cut to `_LONGEST` columns."""
    from rich.cells import cell_len, set_cell_size

    shown = quoted(piece)
    return shown if cell_len(shown) <= _LONGEST else set_cell_size(shown, _LONGEST - 2).rstrip() + "…" + shown[-1]


def _set(columns: list[tuple[str, list[str], str]], width: int, least: int) -> list[str]:
    """The lines of a table of `columns` (head, cells, alignment): as many as fit into `width`, at least `least`."""
    from rich.cells import cell_len

    lines = [""] * (len(columns[0][1]) + 1)
    used = 0
    for number, (head, cells, align) in enumerate(columns):
        size = max(cell_len(cell) for cell in (head, *cells))
        gap = 2 if number else 0
        used += size + gap
        if number >= least and used > width:
            break
        for i, cell in enumerate((head, *cells)):
            blank = " " * (size - cell_len(cell))
            lines[i] += " " * gap + (blank + cell if align == ">" else cell + blank)
    return [line.rstrip() for line in lines]

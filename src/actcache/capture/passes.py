"""The forward passes inside one capture block: what each was given, and which tokens are kept."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from actcache.capture.caches import CachesSeen, Left, cache_of, first_state
from actcache.capture.generation import Generation
from actcache.capture.media import needs_ids, told_by_ids
from actcache.capture.positions import each_prompt, is_single, resolve_positions
from actcache.capture.shown import Shown
from actcache.capture.tokens import take_columns
from actcache.capture.values import kv_length
from actcache.errors import LayerRangeError, OptionError

_ID_NAMES = ("input_ids", "decoder_input_ids", "inputs_embeds")


@dataclass
class Pass:
    """One run of the backbone: token ids ``[B, S]`` (None when it was given embeddings), the mask over its positions,
    or over all so far, ``[B, past + S]`` (None: all real), and how many positions came before."""

    ids: Tensor | None
    mask: Tensor | None
    batch: int
    length: int
    past: int
    keep: Tensor | None = None
    """Kept positions ``[B, n]`` of this pass, -1 where a prompt keeps fewer than others; None keeps all."""
    names: dict[str, Tensor] = field(default_factory=dict)
    """Columns of `keep` that belong to each named position, as in `tokens.Tokens`."""
    computed: Tensor | None = None
    """The positions that logits are computed for, ``[n]``, where the model was given them one by one."""
    continues: int | None = None
    """Index of the pass that left the cache which this one was given; None where there is none, or it is not known."""
    reordered: bool | None = None
    """Whether the rows of the cache were exchanged since the pass before; None when that cannot be told."""

    @property
    def end(self) -> int:
        """Positions there are after this pass."""
        return self.past + self.length

    def cut(self, tensor: Tensor, axis: int = 1, *, logits: bool = False) -> Tensor:
        """The kept positions of a tensor that has them along `axis`; one that does not have a row for each prompt and a
        place for each position is left as it is. Of `logits` fewer may be computed: raises `OptionError` where a kept
        one is not among them."""
        if self.keep is None or tensor.ndim <= axis:
            return tensor
        if logits and tensor.shape[0] == self.batch and tensor.shape[axis] < self.length:
            return take_columns(tensor, self._among_computed(tensor.shape[axis]), axis)
        whole = (tensor.shape[0], tensor.shape[axis]) == (self.batch, self.length)
        return take_columns(tensor, self.keep, axis) if whole else tensor

    def columns(self, width: int, *, logits: bool = False) -> Tensor | None:
        """Which positions of this pass a value has that is `width` long, ``[B, width]``, -1 where a prompt has fewer;
        None where that cannot be told. Of `logits` the last may be computed only, or those that were asked for."""
        if self.keep is not None and width == self.keep.shape[1]:
            return self.keep.cpu()
        if width == self.length:
            return torch.arange(width).expand(self.batch, -1)
        if not logits or width > self.length:
            return None
        return self._computed(width).expand(self.batch, -1)

    def _computed(self, width: int) -> Tensor:
        """The positions of logits, of which fewer are computed than there are positions."""
        if self.computed is not None and self.computed.numel() == width:
            return self.computed.flatten() % self.length
        return torch.arange(self.length - width, self.length)

    def _among_computed(self, width: int) -> Tensor:
        """Where the kept positions are among those of logits, as `keep`."""
        assert self.keep is not None
        keep = self.keep.cpu()
        place = torch.full((self.length,), -1)
        place[self._computed(width)] = torch.arange(width)
        found = place[keep.clamp_min(0)].where(keep >= 0, -1)
        if bool(((found < 0) & (keep >= 0)).any()):
            raise OptionError(
                "positions choose logits that were not computed: with logits_to_keep, which generate sets to 1 for its "
                f"prompt, the model computed them for {width} of {self.length} tokens. Call the model without "
                "logits_to_keep, choose positions='last', or leave logits out of sites."
            )
        return found

    def real(self) -> Tensor:
        """Which of this pass's positions are real: bool ``[B, S]``."""
        if self.mask is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool)
        return self.mask[:, -self.length :].to(device="cpu", dtype=torch.bool)

    def real_ids(self) -> list[Tensor]:
        """The token ids of each prompt, without padding. Raises `OptionError` where they are not known."""
        if self.ids is None:
            raise OptionError(
                "tokens_of is told by token ids, and this pass shows none, since it was given embeddings: pass "
                "input_ids to the model, or choose positions by number"
            )
        return [row[real] for row, real in zip(self.ids.cpu(), self.real(), strict=True)]

    def real_before(self) -> Tensor:
        """Which of the positions before this pass are real: bool ``[B, past]``; all where the mask does not tell."""
        if self.mask is None or self.mask.shape[1] != self.end:
            return torch.ones(self.batch, self.past, dtype=torch.bool)
        return self.mask[:, : self.past].to(device="cpu", dtype=torch.bool)


class Passes:
    """Notes each pass, and cuts values down to the positions asked for. `shown`: where to look for the ids of a pass
    that is given embeddings."""

    def __init__(self, positions: Any, shown: Shown | None = None) -> None:
        self._shown = shown
        self.passes: list[Pass] = []
        self.generations: list[Generation] = []
        self._positions = None if isinstance(positions, str) and positions == "all" else positions
        self._open = False
        self._latest = -1
        # Passes that were given nothing which shows their tokens.
        self._unknown = 0
        self._failed: set[int] = set()
        #: Positions of which the call that is running computes logits, ``[n]``; None where it was not told them.
        self.computed: Tensor | None = None
        self._state: weakref.ref[Tensor] | None = None
        self._caches = CachesSeen()
        self._given: Any = None

    def copy(self) -> Passes:
        """The same passes, noted for itself from here on."""
        made = copy.copy(self)
        made.passes, made.generations = list(self.passes), list(self.generations)
        made._failed, made._caches = set(self._failed), self._caches.copy()
        return made

    def listeners(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, _PassListener]]:
        """What to put on the modules with which a pass may begin: a call inside a call is the same pass."""
        return [(module, _PassListener(self, module)) for module in {id(m): m for m in modules}.values()]

    @property
    def current(self) -> int:
        """Index of the pass that is running, -1 before the first; for one that shows no tokens another negative number,
        its own."""
        return self._latest

    def start(self, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
        """Note a pass; False when it is part of one already noted, or what it was given shows no tokens."""
        if self._open:
            return False
        tokens = None
        for value in (*map(given.get, _ID_NAMES), *args):
            if isinstance(value, Tensor):
                tokens = value
                break
        # Ids [B, S], or embeddings [B, S, D]; anything else has no tokens.
        if tokens is None or tokens.ndim != (3 if tokens.is_floating_point() else 2):
            self.shows_nothing()
            return False
        cache = given.get("past_key_values")
        source = given.get("cache_params") if cache is None else cache
        left = None if source is None else self._caches.of(source)
        past = _cached(cache, given) if cache is not None else self._carried(given, tokens.shape[0], left)
        state = first_state(source) if past else None
        ids, mask = None if tokens.is_floating_point() else tokens, given.get("attention_mask")
        if ids is None and self._shown is not None:
            ids, known = self._shown.of(tokens.shape[0], tokens.shape[1], past)
            mask = mask if known is None else known
        one = Pass(
            ids=None if ids is None else ids.clone(),
            mask=_mask_of_tokens(mask, past, tokens.shape[1]),
            batch=tokens.shape[0],
            length=tokens.shape[1],
            past=past,
            computed=None if self.computed is None else self.computed.detach().to("cpu", copy=True),
            reordered=self._exchanged(state, past, tokens.shape[0], left),
        )
        if self._positions is not None:
            kept, one.names = _kept_of_step(one, self._positions) if past else _kept(one, self._positions)
            one.keep = kept.to(tokens.device)
        if left is not None and left.batch == one.batch and 0 < past <= left.end:
            one.continues = left.index
        self._given = source
        self.passes.append(one)
        self._latest = len(self.passes) - 1
        self._open = True
        return True

    def shows_nothing(self) -> None:
        """Note a pass that shows no tokens."""
        if not self._open:
            self._unknown += 1
            self._latest = -1 - self._unknown

    def finish(self, output: Any = None) -> None:
        """The pass is over; `output` is None where it failed."""
        self._open = False
        given, self._given = self._given, None
        cache = cache_of(output)
        state = first_state(cache)
        self._state = weakref.ref(state) if state is not None else None
        if output is not None and self._latest >= 0:
            one = self.passes[-1]
            for left in (given, cache) if cache is not given else (given,):
                self._caches.note(left, self._latest, one.end, one.batch)

    @property
    def so_far(self) -> tuple[int, int]:
        """How many passes there were that show their tokens, and that do not."""
        return len(self.passes), self._unknown

    def failed_since(self, so_far: tuple[int, int]) -> None:
        """Note that the passes behind `so_far` were ended by an exception."""
        self._failed.update(range(so_far[0], len(self.passes)))
        self._failed.update(range(-1 - self._unknown, -1 - so_far[1]))

    @property
    def dropped(self) -> set[int]:
        """Indices of passes that failed, and count for nothing where any other did not; in a block in which none ended
        well there is nothing that they would be taken for."""
        return self._failed if len(self._failed) < len(self.passes) + self._unknown else set()

    def begins(self, prompt: int | None) -> None:
        return None

    def noted(self) -> int:
        return len(self.passes)

    def generated(self, generation: Generation) -> None:
        """Note what a call of `generate` returned. Where one does nothing but call others, these made the passes; where
        it calls others between its own (for drafts), it says what came of all."""
        first = next((i for i, one in enumerate(self.generations) if one.start >= generation.start), None)
        inner = self.generations[first:] if first is not None else []
        ends = [generation.start, *(one.stop for one in inner)]
        if generation.stop > generation.start and ([one.start for one in inner], generation.stop) != (
            ends[:-1],
            ends[-1],
        ):
            self.generations[len(self.generations) - len(inner) :] = [generation]

    def _exchanged(self, state: Tensor | None, past: int, batch: int, left: Left | None) -> bool | None:
        """Whether the cache holds another tensor of the same length than the pass that left it did, or, where that is
        not known, the last one."""
        known: Left | Pass | None = left if left is not None else self.passes[-1] if self.passes else None
        before = self._state if left is None else left.state
        if state is None or before is None or known is None or (known.end, known.batch) != (past, batch):
            return None
        return batch > 1 and before() is not state

    def _carried(self, given: dict[str, Any], batch: int, left: Left | None) -> int:
        """Positions behind a recurrent state, which does not count them: those of the passes that made it."""
        state = given.get("cache_params")
        before: Left | Pass | None = left if left is not None else self.passes[-1] if self.passes else None
        if state is None or before is None or before.batch != batch:
            return 0
        started = getattr(state, "has_previous_state", None)
        if callable(started):
            return before.end if started() else 0
        # transformers 4: a state that has been used is told where the one new token stands.
        at = given.get("cache_position")
        return before.end if isinstance(at, Tensor) and at.numel() == 1 else 0

    @property
    def latest(self) -> Pass | None:
        """The pass that is running, or was last; None where it shows no tokens."""
        return self.passes[self._latest] if self._latest >= 0 else None

    @property
    def running(self) -> bool:
        """Whether a noted pass has not ended yet."""
        return self._open

    @property
    def cuts(self) -> bool:
        return self._positions is not None

    def cut(self, tensor: Tensor, axis: int = 1, *, logits: bool = False) -> Tensor:
        """`Pass.cut` of the running pass, for the value of a site. Raises `OptionError` for one that has more positions
        than the pass has tokens."""
        one = self.require()
        if one.keep is not None and tensor.ndim > axis and tensor.shape[axis] > one.length:
            raise OptionError(
                f"positions cannot be told: for {one.length} tokens this model has {tensor.shape[axis]} positions, as "
                "where it puts those of an image in front of the text. Leave positions out, and cut what was captured."
            )
        return one.cut(tensor, axis, logits=logits)

    def require(self) -> Pass:
        """The running pass. Raises `OptionError` where nothing shows its tokens."""
        one = self.latest
        if one is None:
            raise OptionError(
                "positions choose among tokens, and this pass shows none: the model was given neither token ids [B, S] "
                "nor embeddings [B, S, D]. Leave positions out, and cut what was captured."
            )
        return one


class _PassListener:
    __slots__ = ("_names", "_passes", "_transposed")

    def __init__(self, passes: Passes, module: nn.Module) -> None:
        self._passes = passes
        # torch's own recurrent modules and transformers take [S, B, D] if nothing else is said.
        kind = type(module)
        # Not of the module: asking it for what it lacks costs more than all else here.
        self._transposed = module.__dict__.get("batch_first", getattr(kind, "batch_first", True)) is False
        self._names = argument_names(kind.forward)

    def begin(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        if self._transposed:
            self._passes.shows_nothing()
            return False
        args, kwargs = inputs
        return self._passes.start(args, {**dict(zip(self._names, args, strict=False)), **kwargs})

    def end(self, token: bool, output: Any) -> None:
        if token:
            self._passes.finish(output)

    def fail(self, token: bool) -> None:
        if token:
            self._passes.finish()


@cache
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _kept_of_step(one: Pass, positions: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """`_kept` of a pass that goes on from a cache."""
    try:
        return _kept(one, positions)
    except LayerRangeError as error:
        raise LayerRangeError(
            f"{error}. In a capture positions count the tokens of each pass, and this one goes on behind {one.past} "
            "in the KV cache, as the steps of generate do. Capture all positions (leave positions out) and cut then: "
            "cache.rows(key)[0][2:4], or run the prompt alone with run_with_cache."
        ) from error


def _kept(one: Pass, positions: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Kept positions, and where each name is among them: a name has the same columns in every prompt."""
    if not isinstance(positions, dict):
        return _chosen(one, positions), {}
    blocks: list[Tensor] = []
    names: dict[str, Tensor] = {}
    start = 0
    for name, choice in positions.items():
        block = _chosen(one, choice)
        columns = torch.arange(start, start + block.shape[1]).expand_as(block).where(block >= 0, -1)
        names[name] = columns[:, 0] if is_single(choice) else columns
        start += block.shape[1]
        blocks.append(block)
    return torch.cat(blocks, 1), names


def _chosen(one: Pass, positions: Any) -> Tensor:
    rows: list[Tensor] = []
    if needs_ids(positions):
        # What was in the prompt is not in the tokens behind it.
        positions = told_by_ids(positions, one.real_ids(), none_there=one.past > 0)
    for choice, real in zip(each_prompt(positions, one.batch), one.real(), strict=True):
        at = real.nonzero()[:, 0]
        rows.append(at[resolve_positions(choice, len(at)) if choice != [] else []])
    width = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-1) for row in rows])


def _cached(cache: Any, given: dict[str, Any]) -> int:
    """Positions in a cache. One of fixed size counts what is not zero, and may miss padding: transformers 4 says."""
    at = given.get("cache_position")
    if isinstance(at, Tensor) and at.numel() and getattr(cache, "is_compileable", False):
        return int(at[0])
    return kv_length(cache)


def _mask_of_tokens(mask: Any, past: int, length: int) -> Tensor | None:
    """The mask as one row per prompt, also where it was made into one of queries and keys, ``[B, 1, S, K]``, as is
    done for a cache of fixed size: a token that does not see itself is padding."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        return mask.detach().clone()
    if mask.shape[2] != length or mask.shape[3] < past + length:
        return None
    own = mask.detach()[:, 0, :, past : past + length].diagonal(dim1=1, dim2=2)
    return own.clone() if own.dtype == torch.bool else own == 0

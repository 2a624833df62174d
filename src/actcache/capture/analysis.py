"""The residual stream taken apart, in the vocabulary of TransformerLens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actcache.capture.inputs import find_tokenizer, single_token
from actcache.capture.lens import LogitLens
from actcache.capture.lens_of_cache import make_lens
from actcache.capture.notes import ValueWithInfo
from actcache.capture.parts import Parts
from actcache.capture.streams import ATTENTION, Streams, read_index, take
from actcache.capture.tokens import Tokens
from actcache.errors import OptionError, require_choice
from actcache.model.anatomy import describe
from actcache.model.embedding import token_embedding
from actcache.model.sites import Site

Labelled = Tensor | tuple[Tensor, list[str]]


class Analysis(Parts):
    """What can be computed from the values of a cache.

    Names, arguments and numbers are those of TransformerLens' cache. Components are the first dimension:
    ``[components, B, S, D]``. `layer` counts the places between blocks: 0 is what enters the first, the number of
    blocks (or None, or -1) what leaves the last. `pos_slice` is an int (the dimension goes), ``(start, stop)``, a slice
    or a list, and counts the real tokens of each prompt.

    What is not in the cache (norms, head, embedding of tokens) comes from the model: from `model`, or from the one that
    the cache was captured from as long as it exists. A cache that was loaded, or copied, needs it given where it is
    needed at all: for `apply_ln`, for logits, and to tell the embedding of tokens from that of positions. A model with
    two stacks needs `stack`.
    """

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
        *,
        stack: str | None = None,
        model: nn.Module | None = None,
    ) -> Labelled:
        """The residual stream as it enters each block up to `layer`, and behind the last one.

        With `incl_mid` also as it enters each MLP before `layer`, with `mlp_input` as it enters that of `layer`.
        `apply_ln` makes of each what the final norm makes of it (with weight and bias) when `layer` is behind the last
        block; otherwise it divides all by the scale that the norm of that layer found, as `apply_ln_to_stack` does.
        Labels: ``"0_pre"``, ``"0_mid"``, ..., ``"final_post"``.
        """
        streams = Streams(self, "accumulated_resid", stack=stack, model=model)
        last = streams.into(layer, mlp_input=mlp_input)
        wanted: list[Any] = []
        labels: list[str] = []
        for number in range(last + 1):
            wanted.append(streams.at_boundary(number))
            labels.append("final_post" if number == streams.depth else f"{number}_pre")
            if (incl_mid and number < last) or (mlp_input and number == last):
                wanted.append(Site("resid_mid", number, stack=stack))
                labels.append(f"{number}_mid")
        with streams.picking(pos_slice):
            components = torch.stack(streams.get(*wanted))
        if apply_ln:
            components = _normalised(streams, components, last, mlp_input, pos_slice, recompute=last == streams.depth)
        return (components, labels) if return_labels else components

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
        *,
        stack: str | None = None,
        model: nn.Module | None = None,
    ) -> Labelled:
        """What was added to the stream before `layer`: together they are the stream that enters it.

        First the embedding (where positions have embeddings that are added to it: ``"embed"`` and ``"pos_embed"``),
        then of each block what it adds: ``"0_attn_out"``, ``"0_mlp_out"``, of cross-attention ``"0_cross_attn_out"``,
        of a state-space or other mixer ``"0_mixer_out"``. Where the stream is another one when it enters the next block
        than it was when it left the last (features of images that some models add there) the difference comes at the
        end, ``"0_added"``. `mode` "attn" keeps what mixes positions, "mlp" the rest.
        `mlp_input`: up to the input of the MLP of `layer`. `apply_ln`: see `apply_ln_to_stack`.

        Raises `AdditivityError` on architectures with norms on the stream itself (BERT).
        """
        require_choice(mode, ("all", "attn", "mlp"), "mode")
        streams = Streams(self, "decompose_resid", stack=stack, model=model)
        last = streams.into(layer, mlp_input=mlp_input)
        streams.require_sums(range(last + mlp_input))
        sites: list[Site] = []
        for number in range(last + mlp_input):
            # Up to the input of an MLP: all but what the block adds last.
            names = streams.block(number).branches[: -1 if number == last else None]
            wanted = [name for name in names if mode == "all" or (name in ATTENTION) == (mode == "attn")]
            sites += [Site(name, number, stack=stack) for name in wanted]
        with streams.picking(pos_slice):
            parts, labels = self._embeddings(streams) if incl_embeds else ([], [])
            parts += streams.get(*sites)
            labels += [f"{site.layer}_{site.name}" for site in sites]
            added = streams.between(last) if mode == "all" else {}
            parts += added.values()
            labels += added
            components = torch.stack(parts) if parts else streams.get(streams.at_boundary(0))[0][None][:0]
        if apply_ln:
            components = _normalised(streams, components, last, mlp_input, pos_slice)
        return (components, labels) if return_labels else components

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
        *,
        stack: str | None = None,
        model: nn.Module | None = None,
    ) -> Labelled:
        """What each head of the blocks before `layer` added to the stream: labels ``"L0H0"``, ``"L0H1"``, ...

        Where attention's output is multiplied, or normalised, before it joins the stream, so is each head's part, by
        the scale of the sum (TransformerLens takes it as it was before). `incl_remainder` adds the rest of the stream
        that enters `layer`, as ``"remainder"``. Blocks without attention have no heads. `apply_ln`: see
        `apply_ln_to_stack`.
        """
        streams = Streams(self, "stack_head_results", stack=stack, model=model)
        last = streams.boundary(layer)
        streams.require_sums(range(last))
        numbers = [number for number in range(last) if streams.has("head_out", number)]
        if last and not numbers:
            # Says what is missing, in the cache or in the architecture.
            streams.get(*(Site("head_out", number, stack=stack) for number in range(last)))
        with streams.picking(pos_slice):
            heads = streams.get(*(Site("head_out", number, stack=stack) for number in numbers))
            labels = [f"L{n}H{h}" for n, value in zip(numbers, heads, strict=True) for h in range(value.shape[-2])]
            pairs = zip(numbers, heads, strict=True)
            parts = [streams.added_by_heads(number, value).movedim(-2, 0) for number, value in pairs]
            if incl_remainder or not parts:
                (whole,) = streams.get(streams.at_boundary(last))
                # Nothing but the number of components tells an empty stack from one that has some.
                parts.append((whole - sum(part.sum(0) for part in parts))[None][: int(incl_remainder)])
                labels += ["remainder"] * incl_remainder
        components = torch.cat(parts)
        if apply_ln:
            components = _normalised(streams, components, last, False, pos_slice)
        return (components, labels) if return_labels else components

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
        *,
        stack: str | None = None,
        model: nn.Module | None = None,
    ) -> Tensor:
        """Components ``[components, B, S, D]`` as the norm in front of `layer` scaled the whole stream in this pass:
        centred (where the norm is a layer norm) and divided by the scale of the stream that the cache holds there.
        Weight and bias of the norm are left out, so that components still add up.

        `mlp_input` takes the norm in front of the MLP. `pos_slice` says which positions the stack has; `batch_slice` is
        applied to the stack too. Without `has_batch_dim` the stack is of one prompt, ``[components, S, D]``.
        `recompute_ln`, behind the last block: each component is put through the final norm by itself, with weight and
        bias. Where a stream is used as it is, without a norm, the stack comes back unchanged.
        """
        streams = Streams(self, "apply_ln_to_stack", stack=stack, model=model)
        last = streams.into(layer, mlp_input=mlp_input)
        return _normalised(
            streams,
            residual_stack,
            last,
            mlp_input,
            pos_slice,
            batch_slice=batch_slice,
            has_batch_dim=has_batch_dim,
            recompute=recompute_ln and last == streams.depth,
        )

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        *,
        stack: str | None = None,
        model: nn.Module | None = None,
        tokenizer: Any = None,
    ) -> Tensor:
        """How much each component adds to the logit of `tokens`, less that of `incorrect_tokens`:
        ``[components, B, S]`` in float32.

        Components are normalised as `apply_ln_to_stack` does behind the last block, and multiplied by the directions of
        the tokens, which hold the weight of the final norm (as in TransformerLens with ``fold_ln``, its default): the
        sum over all components of `decompose_resid` is the logit, up to a constant of each token (biases) and before a
        soft cap. Tokens: an id, a string that is one token, ids ``[B]``, or ``[B, S]`` with one for each position.

        Raises `OptionError` for tokens that are none or are not as many as the incorrect ones,
        `SiteUnavailableError` where there is no head.
        """
        streams = Streams(self, "logit_attrs", stack=stack, model=model)
        head = streams.head
        ids = _token_ids(tokens, streams, tokenizer)
        directions = head.directions(ids)
        if incorrect_tokens is not None:
            others = _token_ids(incorrect_tokens, streams, tokenizer)
            if others.shape != ids.shape:
                raise OptionError(
                    f"tokens has the shape {list(ids.shape)} and incorrect_tokens {list(others.shape)}: give as many"
                )
            directions = directions - head.directions(others)
        scaled = _normalised(
            streams,
            residual_stack.to(torch.promote_types(residual_stack.dtype, torch.float32)),
            streams.depth,
            False,
            pos_slice,
            batch_slice=batch_slice,
            has_batch_dim=has_batch_dim,
        )
        return (scaled * _fitted(directions.to(scaled), ids, scaled)).sum(-1)

    def logit_lens(
        self,
        site: str = "resid_post",
        layers: Any = None,
        *,
        top_k: int = 5,
        pos_slice: Any = None,
        recompute_ln: bool = True,
        stack: str | None = None,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        tokens: Any = None,
        translators: Any = None,
    ) -> LogitLens:
        """What the model would predict if each layer of `site` ("resid_pre", "resid_mid", "resid_post") were the last:
        final norm and head on the stream at that layer.

        Args:
            layers: by default those of the site that the cache holds.
            top_k: how many of the best tokens of each position are kept; logits are computed anew when they are asked
                for: see `LogitLens`.
            recompute_ln: the final norm takes the scale of that layer's stream; without it that of the whole stream
                behind the last block in this pass.
            tokens: ids, or texts that are one token each, whose ranks and probabilities are wanted.
            translators: what the stream is put through first (a tuned lens): by layer ``(weight [D, D], bias [D])``, a
                linear layer or a function, applied as they are; or the folder of a lens of the package tuned-lens,
                whose maps are added to the stream.

        Where the cache holds `resid_post` of the last block, divergences from the final prediction are there too.
        """
        asked = Site.parse(site)
        streams = Streams(self, "logit_lens", stack=asked.stack or stack, model=model)
        return make_lens(streams, asked.name, layers, top_k, pos_slice, recompute_ln, tokenizer, tokens, translators)

    def vector(self, site: str, prompt: int = 0, position: int = -1, *, sequence: int | None = None) -> ValueWithInfo:
        """The value of `site` at one token of a prompt, ``[D]`` (``[H, hd]`` where there are heads), which knows where
        it is from: ``vector.info()`` has `site`, `prompt` and `position` (`kept_position` in a cache of chosen
        positions, which counts those), and `ac.encode` checks the site. Where an
        encoder-decoder returned several sequences for each prompt, `sequence` says which of the prompt's (and is in
        the info). On a model where features of images join the stream between blocks (qwen3_vl), the info has
        ``between_blocks=True``: what leaves a block and what enters the next are then two values.

        Positions count the real tokens that the cache holds. Raises `UnknownKeyError`, `LayerRangeError` for a prompt,
        sequence or position that it does not hold, or `OptionError` where a prompt has several sequences and none is
        chosen.
        """
        found = self._key(site, self._data)
        if not Site.looks_like(found) or Site.parse(found).name == "pattern":
            raise OptionError(f"{site!r} is not a site that has one vector for each token")
        rows = self.rows(found)
        prompts = self._prompt_rows()
        number = prompts.row(found, len(rows), prompt, sequence)
        tokens = rows[number].shape[0]
        row = take(rows[number], int(position), 0, "position")
        count = len(rows) if len(prompts.tables) < 2 else prompts.count
        # Of chosen positions the prompt's own are not known any more.
        counted = "kept_position" if self._cut else "position"
        info = {"site": str(Site.parse(found)), "prompt": prompt % count, counted: position % tokens}
        if sequence is not None:
            info["sequence"] = sequence
        model = self._model() if self._model is not None else None
        if model is not None and self._depths and describe(model).adds_between_blocks:
            info["between_blocks"] = True
        return ValueWithInfo(row, info)

    def _embeddings(self, streams: Streams) -> tuple[list[Tensor], list[str]]:
        (whole,) = streams.get(streams.at_boundary(0))
        token = token_embedding(streams.anatomy) if streams.stack is None else None
        if token is None:
            return [whole], ["embed"]
        ids = self._tables().get(None, Tokens()).ids
        if ids is None:
            raise OptionError(
                "decompose_resid: the token ids are not known, which tell the embedding of tokens from that of "
                "positions. Pass token ids to the model, or incl_embeds=False (together both are resid_pre.0)"
            )
        site = next(site for site in streams.at_boundary(0) if str(site) in self)
        held = self[str(site)]
        if ids.shape != held.shape[:2]:
            raise OptionError(
                f"decompose_resid: {site} is {list(held.shape)} and the token ids are {list(ids.shape)}, so the "
                "embedding of tokens cannot be told from that of positions: pass incl_embeds=False"
            )
        part = streams.picked(site, token(ids).to(held))
        return [part, whole - part], ["embed", "pos_embed"]


def _normalised(
    streams: Streams,
    components: Tensor,
    layer: int,
    mlp_input: bool,
    pos_slice: Any,
    *,
    batch_slice: Any = None,
    has_batch_dim: bool = True,
    recompute: bool = False,
) -> Tensor:
    rows = read_index(batch_slice, "batch_slice")
    if has_batch_dim:
        components = take(components, rows, 1, "prompt")
    norm = streams.norm(layer, mlp_input=mlp_input)
    if norm is None:
        return components
    if recompute:
        return norm.finish(norm.divide(components, norm.scale(components)))
    middle = Site("resid_mid", layer, stack=streams.stack)
    with streams.picking(pos_slice):
        (whole,) = streams.get(middle if mlp_input else streams.at_boundary(layer))
    whole = take(whole, rows, 0, "prompt")
    if not has_batch_dim and not isinstance(rows, int):
        if whole.shape[0] != 1:
            raise OptionError(
                f"{streams.what}: has_batch_dim=False is for one prompt, and the cache holds {whole.shape[0]}: choose "
                "one with batch_slice"
            )
        whole = whole[0]
    if components.shape[1:] != whole.shape:
        raise OptionError(
            f"{streams.what}: the stack is [components, {', '.join(map(str, components.shape[1:]))}], and the stream "
            f"it is part of {list(whole.shape)}: pos_slice and batch_slice say which part that is"
        )
    return norm.divide(components, norm.scale(whole).to(components.device))


def _fitted(directions: Tensor, ids: Tensor, scaled: Tensor) -> Tensor:
    """`directions` ``[..., D]`` so that they broadcast to the components ``[components, ..., D]``."""
    shape = scaled.shape[1:-1]
    if ids.ndim == 0 or ids.shape == shape:
        return directions
    if ids.ndim == 1 and len(shape) == 2 and ids.shape[0] == shape[0]:
        return directions[:, None]
    raise OptionError(
        f"tokens has the shape {list(ids.shape)}, and each component {list(shape)}: give one token, one for each "
        "prompt, or one for each position of each prompt"
    )


def _token_ids(tokens: Any, streams: Streams, tokenizer: Any) -> Tensor:
    if isinstance(tokens, str):
        known = find_tokenizer(streams.anatomy.model) if tokenizer is None else tokenizer
        return torch.tensor(single_token(tokens, known))
    ids = torch.as_tensor(tokens)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim > 2:
        raise OptionError(f"tokens is {tokens!r}: expected a token id, a string, or ids [B] or [B, S]")
    size = streams.anatomy.vocab_size
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise OptionError(f"tokens holds an id outside the model's vocabulary of {size} (0 to {size - 1})")
    return ids

"""Attention probabilities in the moment in which they are made, whichever way a model attends.

An architecture's own code takes the softmax of its scores over the keys; PyTorch's fused attention does so inside, and
never holds the probabilities. Both are seen here: the first with its scores and what comes of them; for the second the
same is computed beside it, and takes its place only where something is changed. All of it concerns the calls of one
thread, and none of what is computed `aside` in them.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

R = TypeVar("R")

_SOFTMAX = frozenset({torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax})


class _Thread(threading.local):
    entered: tuple[Probabilities, ...] = ()


_here = _Thread()


class Attending(Protocol):
    """Who follows the making of probabilities, and sees them as they are made, also where others change nothing."""

    def changing(self) -> bool:
        """Whether it may return something else than it is told. Where nobody does, what is computed beside the model
        leaves no trace in its graph: a checkpoint that repeats the call later, unfollowed, has to find the same."""

    def scores(self, scores: Tensor) -> Tensor:
        """Told the scores ``[..., queries, keys]`` before the softmax, masked; returns them or what takes their place.
        `probabilities` is told next what comes of them."""

    def probabilities(self, probabilities: Tensor) -> Tensor:
        """Told the probabilities; returns them or what takes their place, in their shape and dtype."""


class Telling:
    """Hands the probabilities to each of `listeners`, and changes nothing."""

    def __init__(self, listeners: Iterable[Callable[[Tensor], object]]) -> None:
        self._listeners = list(listeners)

    def changing(self) -> bool:
        return False

    def scores(self, scores: Tensor) -> Tensor:
        return scores

    def probabilities(self, probabilities: Tensor) -> Tensor:
        for listen in self._listeners:
            listen(probabilities)
        return probabilities


class Probabilities(TorchFunctionMode):
    """While it is entered, `attending` follows every softmax over the last dimension of scores of several heads."""

    def __init__(self, attending: Attending) -> None:
        super().__init__()
        self._attending = attending
        self._aside = 0

    def __enter__(self) -> Probabilities:
        _here.entered = (*_here.entered, self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _here.entered = _here.entered[:-1]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        return func(*args, **kwargs)

    def _softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs.get("input")
        over = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(given, Tensor) or given.ndim not in (3, 4) or over not in (-1, given.ndim - 1):
            return func(*args, **kwargs)
        scores = self._attending.scores(given)
        if args:
            args = (scores, *args[1:])
        else:
            kwargs = {**kwargs, "input": scores}
        return self._attending.probabilities(func(*args, **kwargs))

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        with contextlib.nullcontext() if self._attending.changing() else torch.no_grad():
            changed = self._beside(query, key, attn_mask, is_causal, scale, enable_gqa)
        if changed is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                **({"enable_gqa": True} if enable_gqa else {}),
            )
        values = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3) if enable_gqa else value
        return F.dropout(changed, dropout_p) @ values

    def _beside(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None, grouped: bool
    ) -> Tensor | None:
        """The probabilities that take the place of the fused kernel's; None where they are its own."""
        # In float32 at least, as the fused kernels do it.
        wide = torch.promote_types(query.dtype, torch.float32)
        keys = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3) if grouped else key
        made = query.to(wide) @ keys.to(wide).transpose(-2, -1)
        made = made * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            ahead = torch.ones(made.shape[-2:], dtype=torch.bool, device=made.device).triu(1)
            made = made.masked_fill(ahead, -math.inf)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            made = made.masked_fill(~attn_mask, -math.inf) if masked else made + attn_mask
        scores = self._attending.scores(made)
        # A query that may attend to nothing attends to nothing.
        found = torch.softmax(scores, -1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
        found = found.to(query.dtype)
        probabilities = self._attending.probabilities(found)
        return None if scores is made and probabilities is found else probabilities


def aside(function: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    """What `function` returns, with nobody following what it takes the softmax of: it is not the model's attention."""
    entered = _here.entered
    if not entered:
        return function(*args, **kwargs)
    for mode in entered:
        mode._aside += 1
    try:
        return function(*args, **kwargs)
    finally:
        for mode in entered:
            mode._aside -= 1

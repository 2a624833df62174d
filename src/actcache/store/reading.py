"""Vectors out of a store as tensors, in the dtype asked for or the tensor given, with nothing lost silently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import NotCachedError, OptionError, ValueOverflowError, did_you_mean
from actcache.store import memory, sparse_reading, tensors
from actcache.store.asking import is_complete, locate_any, why_absent
from actcache.store.copied import copied_rows
from actcache.store.dtypes import common_dtype, reaches
from actcache.store.index import SpaceIndex
from actcache.store.prompts import PromptTable
from actcache.store.records import TOKENS

if TYPE_CHECKING:
    import torch

    from actcache.store.placement import Placement

    _Located = Sequence[tuple[Placement, npt.NDArray[np.int64]]]

_READABLE = ("float16", "bfloat16", "float32", "float64")


def reading_dtype(dtype: Any) -> torch.dtype | None:
    """A dtype in which vectors can be read, given as a dtype of torch or numpy, as its name, or as None.

    Raises:
        OptionError: no such dtype, or not a floating one of two bytes and more.
    """
    if dtype is None:
        return None
    import torch

    name = dtype
    if isinstance(dtype, np.dtype) or (isinstance(dtype, type) and issubclass(dtype, np.generic)):
        name = np.dtype(dtype).name
    found = getattr(torch, name, None) if isinstance(name, str) else name
    expected = f"expected {', '.join(map(repr, _READABLE))}, or such a dtype of torch or numpy"
    if not isinstance(found, torch.dtype):
        hint = did_you_mean(name, _READABLE) if isinstance(name, str) else ""
        raise OptionError(f"unknown dtype {dtype!r}: {expected}.{hint}")
    if found not in [getattr(torch, known) for known in _READABLE]:
        raise OptionError(f"vectors cannot be read as {found}, in which they would be others: {expected}.")
    return found


def converted(
    tensor: torch.Tensor,
    dtype: torch.dtype,
    *,
    allow_inf: bool = False,
    name: Callable[[list[int]], str] | None = None,
) -> torch.Tensor:
    """`tensor` in a floating `dtype`.

    `name`: what to call the place of a value, given its index. With `allow_inf` values that are too large become inf.

    Raises:
        ValueOverflowError: a finite value would become inf.
    """
    import torch

    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if allow_inf or tensor.dtype == torch.bool:
        return result
    range_of = torch.finfo if tensor.is_floating_point() else torch.iinfo
    if torch.finfo(dtype).max < range_of(tensor.dtype).max:
        lost = tensor.isfinite() & ~result.isfinite()
        if lost.any():
            at = lost.nonzero()[0].tolist()
            where = f"{name(at)}: " if name is not None else ""
            raise ValueOverflowError(
                f"{where}the value {float(tensor[tuple(at)]):.6g} becomes {float(result[tuple(at)])} in {dtype}: read "
                "it as bfloat16 or float32, or allow that (allow_inf=True)."
            )
    return result


def read(
    index: SpaceIndex,
    prompts: Any,
    site: str,
    *,
    pooling: str | None,
    positions: Any,
    dtype: Any,
    out: Any,
    allow_inf: bool,
) -> Any:
    """What `Store.read` gives; what is asked is looked at before anything is read."""
    wanted = reading_dtype(dtype)
    if pooling and positions is not None:
        raise OptionError(f"positions={positions!r} chooses among the tokens of full sequences: {pooling!r} has none.")
    if prompts is not None and not isinstance(prompts, PromptTable):
        prompts = tensors.as_list(prompts)
    if out is not None:
        _check_out(out, pooling, wanted, None if prompts is None else len(prompts))
    layout = pooling or TOKENS
    sparse = sparse_reading.find_site(index, site, pooling)
    if sparse is not None:
        if wanted is not None or out is not None:
            raise OptionError(f"{site!r} is sparse, and read as it is stored: leave out dtype= and out=.")
        return sparse_reading.read(index, sparse, prompts, pooled=bool(pooling), positions=positions)
    # Into a tensor of the caller's nothing is copied before all of it is here.
    quick = index.copy is not None and out is None and positions is None
    located, found = locate_any(index, prompts, site, layout, check=not quick)
    if quick and is_complete(located, found):
        answer = _as_it_comes(index, located, len(found), site, pooling, wanted, allow_inf)
        if answer is not None:
            return answer
        located, found = locate_any(index, prompts, site, layout, check=True)
    if (not found.all() or not len(found)) and (why := why_absent(index, site, layout)):
        raise NotCachedError(why)
    if not len(found):
        raise NotCachedError(f"all prompts that had {site!r} ({layout}) in space {index.folder.name} are gone.")
    if not found.all():
        if prompts is None:
            # Not fewer rows than prompts were listed, which somebody may have done already to have both.
            raise NotCachedError(
                f"{int((~found).sum())} of {len(found)} prompts that have {site!r} ({layout}) turned out damaged, and "
                "count as absent from now on: list those that are left (Store.prompts) and read again; "
                "verify(repair=True) drops them for good."
            )
        raise NotCachedError(
            f"{int((~found).sum())} of {len(found)} prompts have no {site!r} ({layout}) in the store "
            f"(the first is prompt {int(np.flatnonzero(~found)[0])}): see Store.contains() and Store.discover()"
        )

    if pooling:
        return _stacked(located, len(found), site, out, wanted, allow_inf)
    rows: list[Any] = [None] * len(found)
    for placement, members in located:
        local = np.flatnonzero(placement.found)
        for i, (values,) in zip(members[local].tolist(), placement.all_rows(local), strict=True):
            tensor = tensors.to_tensor(tensors.cut(values, positions))
            rows[i] = _as_asked(tensor, i, site, wanted, allow_inf)
    return rows


def _as_it_comes(
    index: SpaceIndex, located: _Located, n: int, site: str, pooling: str | None, dtype: torch.dtype | None,
    allow_inf: bool,
) -> Any:  # fmt: skip
    """The answer for `n` prompts that were located elsewhere, unchecked: each is checked and copied as it comes.

    None where some have gone since, or turn out damaged: then look closer.
    """
    if any(segment.source is None for placement, _ in located for segment in placement.segments):
        return None
    try:
        if pooling:
            answer = _stacked(located, n, site, None, dtype, allow_inf)
        else:
            answer = [None] * n
            for placement, members in located:
                local = np.flatnonzero(placement.found)
                every = len(local) == len(placement)
                copied = copied_rows(placement, None if every else local, tensors.own_tensors)
                for i, tensor in zip(members[local].tolist(), copied, strict=True):
                    answer[i] = tensor
            if dtype is not None:
                answer = [_as_asked(tensor, i, site, dtype, allow_inf) for i, tensor in enumerate(answer)]
    except NotCachedError:
        return None
    with index.lock:
        for placement, _ in located:
            for segment, prompts in placement.held:
                index.note_read(segment.info.name, prompts)
    return answer


def _as_asked(tensor: torch.Tensor, prompt: int, site: str, dtype: torch.dtype | None, allow_inf: bool) -> torch.Tensor:
    if dtype is None:
        return tensor
    return converted(tensor, dtype, allow_inf=allow_inf, name=lambda _: f"prompt {prompt}, {site}")


def _check_out(out: Any, pooling: str | None, dtype: torch.dtype | None, n: int | None) -> None:
    """OptionError unless vectors of `n` prompts (None: of all that there are) can be written into `out`."""
    import torch

    if not pooling:
        raise OptionError(
            "out= takes pooled vectors, a row for each prompt: full sequences come as a tensor for each, without it."
        )
    rows = "B" if n is None else n
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or (n is not None and len(out) != n):
        raise OptionError(f"out is {_described(out)}, expected a tensor of shape [{rows}, D]")
    if out.dtype.is_complex or out.dtype == torch.bool or out.is_quantized:
        raise OptionError(f"out is of {out.dtype}: expected a tensor of floating numbers.")
    if dtype is not None and out.dtype != dtype:
        raise OptionError(f"out is of {out.dtype}, and dtype={dtype} is asked for: give one of them.")
    if out.requires_grad:
        raise OptionError("out requires gradients, which writing into it would spoil: give out.detach().")
    if any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
        raise OptionError("out is expanded: its rows share memory, so that each would be written over the other.")


def _stacked(located: _Located, n: int, site: str, out: Any, dtype: torch.dtype | None, allow_inf: bool) -> Any:
    """The vectors of all located prompts in one tensor ``[n, D]``; in `out` where it is given."""

    def name(at: list[int]) -> str:
        return f"prompt {at[0]}, {site}"

    if out is None and len(located) == 1 and len(located[0][0].widths) == 1 and len(located[0][0]) == n:
        # All that was asked for, in its order, of which the placement knows where runs of neighbours lie.
        whole: list[torch.Tensor] = []
        located[0][0].take(meanwhile=lambda target: whole.append(tensors.to_tensor(target[:, 0])))
        (tensor,) = whole
        return tensor if dtype is None else converted(tensor, dtype, allow_inf=allow_inf, name=name)
    parts = [(p, members[local], local) for p, members in located if len(local := np.flatnonzero(p.found))]
    widths = {width for p, _, _ in parts for width in p.widths}
    if len(widths) > 1:
        raise ValueError(f"vectors of different widths {sorted(widths)} cannot share one tensor: read them apart")
    stored = common_dtype(p.dtype for p, _, _ in parts)
    shape = (n, *widths)
    given = None
    if out is not None:
        if tuple(out.shape) != shape:
            raise OptionError(f"out is {_described(out)}, expected a tensor of shape {list(shape)}")
        given = _shared_array(out)
        if not _takes(out, stored):
            raise OptionError(f"out is of {out.dtype}, in which the stored {stored} would be other numbers.")
    direct = given is not None and (reaches(given.dtype, stored) or given.dtype.kind in "iu")
    array = given if given is not None and direct else memory.empty(shape, stored)
    for placement, members, local in parts:
        if len(local) == n and len(parts) == 1:
            # All that was asked for, in its order, of which the placement knows where runs of neighbours lie.
            placement.take(array[:, None])
        else:
            placement.take(array[:, None], index=local, at=members)
    if out is None:
        tensor = tensors.to_tensor(array)
        return tensor if dtype is None else converted(tensor, dtype, allow_inf=allow_inf, name=name)
    if not direct:
        tensor = tensors.to_tensor(array)
        floating = out.is_floating_point()
        out.copy_(converted(tensor, out.dtype, allow_inf=allow_inf, name=name) if floating else tensor)
    return out


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"a {type(value).__name__} of shape {list(shape)}"


def _takes(out: torch.Tensor, stored: np.dtype[Any]) -> bool:
    """Whether `out` has the numbers that are `stored`, but for rounding and for what is too large."""
    name = str(out.dtype).removeprefix("torch.")
    if name in _READABLE or name == stored.name:
        return True
    return not out.is_floating_point() and np.can_cast(stored, np.dtype(name), "safe")


def _shared_array(tensor: torch.Tensor) -> npt.NDArray[Any] | None:
    """An array over the memory of `tensor`; None where there is none, as on an accelerator."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return tensors.to_array(tensor)

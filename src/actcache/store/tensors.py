"""Between torch tensors and stored arrays, for `Store.write` and `Store.read`. torch is imported when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from actcache.errors import LayerRangeError, OptionError, PromptError, PromptTypeError, ValueOverflowError
from actcache.store.dtypes import common_dtype, reaches
from actcache.store.prompts import CHAT, IDS, TEXT, PromptTable, canonical_chat, text_keys
from actcache.store.records import Records

if TYPE_CHECKING:
    import torch

    from actcache.store.placement import Placement


_BY_BITS: dict[str, tuple[str, np.dtype[Any]]] = {
    "bfloat16": ("int16", np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("uint8", np.dtype(ml_dtypes.float8_e5m2)),
}
"""Dtypes of torch that numpy lacks: integers of their size, and what stands for them here."""


def to_array(value: Any) -> npt.NDArray[Any]:
    """A tensor or array as a numpy array; bfloat16 and float8 by their bits."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    import torch

    tensor = value.detach().cpu().contiguous()
    for name, (bits, dtype) in _BY_BITS.items():
        if tensor.dtype == getattr(torch, name):
            viewed: npt.NDArray[Any] = tensor.view(getattr(torch, bits)).numpy()
            return viewed.view(dtype)
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def to_tensor(array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A writable tensor that shares memory with `array` where `array` is writable."""
    import torch

    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array)
    for name, (bits, kind) in _BY_BITS.items():
        if array.dtype == kind:
            tensor = torch.from_numpy(array.view(bits)).view(getattr(torch, name))
            break
    else:
        tensor = torch.from_numpy(array)
    return tensor if dtype is None else converted(tensor, dtype)


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in another dtype.

    Raises:
        OptionError: floating numbers asked for as integers.
        ValueOverflowError: a finite value would become inf.
    """
    import torch

    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor.to(dtype)
    if not dtype.is_floating_point:
        raise OptionError(f"floating values cannot be read as {dtype}: ask for float32, float16 or bfloat16.")
    result = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        lost = tensor.isfinite() & ~result.to(tensor.dtype).isfinite()
        if lost.any():
            raise ValueOverflowError(
                f"the value {float(tensor[lost][0]):.6g} becomes inf in {dtype}: read it as bfloat16 or float32."
            )
    return result


def torch_dtype(dtype: Any) -> torch.dtype | None:
    """A dtype given as a torch dtype, a name or None."""
    if dtype is None:
        return None
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise OptionError(f"unknown dtype {dtype!r}: expected a torch dtype, 'float32', 'float16', 'bfloat16', ...")
    return found


def reading_dtype(dtype: Any) -> torch.dtype | None:
    """A dtype in which vectors can be read, given as `torch_dtype` takes it.

    Raises:
        OptionError: no such dtype, or not a floating one.
    """
    found = torch_dtype(dtype)
    if found is not None and not found.is_floating_point:
        raise OptionError(f"vectors cannot be read as {found}: ask for float32, float16 or bfloat16.")
    return found


def prompt_table(prompts: Any, context: str, lengths: Sequence[int]) -> PromptTable:
    """Prompts from outside: token ids, texts or chats; `lengths` are the rows of each.

    Without a tokenizer the ids of a text are unknown: negative numbers made from its digest stand for them.
    """
    if isinstance(prompts, PromptTable):
        return prompts
    ids: list[Any] = []
    texts, kinds = [], []
    for i, prompt in enumerate(prompts):
        kind, text = kind_of(prompt, i)
        kinds.append(kind)
        texts.append(text)
        ids.append(prompt if text is None else stand_in(kind, text, lengths[i]))
    return PromptTable.build(ids, texts, kinds, context)


def stand_in(kind: int, text: str, length: int) -> npt.NDArray[np.int32]:
    """`length` negative numbers in place of the unknown token ids of a text."""
    words = text_keys([text], kind, "").view(np.int32).reshape(-1)
    return np.resize(words | np.int32(-(2**31)), length)


def as_list(prompts: Any) -> list[Any]:
    """Prompts as a list: a single text counts as one; PromptError when there are none."""
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise PromptError("the list of prompts is empty: expected at least one prompt.")
    return given


def kind_of(prompt: Any, position: int = 0) -> tuple[int, str | None]:
    """Kind and text of a prompt; PromptTypeError or PromptError when it is none."""
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError(f"prompt {position} is empty: remove it from the list.")
        return TEXT, prompt
    if not hasattr(prompt, "__len__") or isinstance(prompt, (bytes, Mapping)):
        raise PromptTypeError(
            f"prompt {position} is a {type(prompt).__name__}: expected text, token ids or chat messages."
        )
    if not len(prompt):
        raise PromptError(f"prompt {position} is empty: remove it from the list.")
    if isinstance(prompt[0], Mapping):
        return CHAT, canonical_chat(prompt)
    return IDS, None


def records(prompts: Any, values: Mapping[str, Sequence[Any]], pooling: str | None, context: str) -> Records:
    """Records of ``{site: [tensor [T, D] or [D], ...]}`` as `Store.write` takes them."""
    if not isinstance(prompts, PromptTable):
        prompts = as_list(prompts)
    n = len(prompts)
    arrays: dict[str, list[npt.NDArray[Any]]] = {}
    for site, given in values.items():
        if len(given) != n:
            raise ValueError(f"{site}: {len(given)} values for {n} prompts")
        arrays[site] = [to_array(v) for v in given]
    if not arrays:
        raise ValueError("nothing to write: expected {site: [tensor, ...]}")
    first = next(iter(arrays.values()))
    lengths = [4 if pooling or a.ndim == 0 else len(a) for a in first]
    table = prompt_table(prompts, context, lengths)
    for site, parts in arrays.items():
        for i, array in enumerate(parts):
            tokens = int(table.token_offset[i + 1] - table.token_offset[i])
            if array.ndim != (1 if pooling else 2) or not (pooling or len(array) == tokens):
                expected = "[D]" if pooling else f"[{tokens}, D], a row for each token"
                raise ValueError(f"{site}, prompt {i}: shape {list(array.shape)}, expected {expected}")
    if pooling:
        return Records.pooled(table, pooling, {site: np.stack(parts) for site, parts in arrays.items()})
    return Records.tokens(table, {site: np.concatenate(parts) for site, parts in arrays.items()})


def cut(rows: npt.NDArray[Any], positions: Any) -> npt.NDArray[Any]:
    """Rows of one prompt at "all", "last", "first", an int, a ``(start, stop)`` pair, or a list of these."""
    if positions is None or positions == "all":
        return rows
    if isinstance(positions, tuple):
        return rows[slice(*positions)]
    if isinstance(positions, list):
        return np.concatenate([rows[:0], *(cut(rows, p) for p in positions)])
    named = {"last": -1, "first": 0}
    chosen = named.get(positions, positions) if isinstance(positions, str) else positions
    if not isinstance(chosen, (int, np.integer)):
        raise OptionError(
            f"unknown positions {positions!r}: expected 'all', 'last', 'first', int, (start, stop) or a list."
        )
    if not -len(rows) <= chosen < len(rows):
        raise LayerRangeError(f"position {chosen} is outside a prompt of {len(rows)} tokens")
    at = chosen % len(rows)
    return rows[at : at + 1]


def stack_pooled(located: Sequence[tuple[Placement, npt.NDArray[np.int64]]], n: int, out: Any, dtype: Any) -> Any:
    """The vectors of all located prompts in one tensor ``[n, D]``, in `dtype`; in `out` where it is given.

    Raises:
        ValueOverflowError: a finite value would become inf there.
    """
    parts = [(p, members[local], local) for p, members in located if len(local := np.flatnonzero(p.found))]
    stored = common_dtype(p.dtype for p, _, _ in parts)
    widths = {width for p, _, _ in parts for width in p.widths}
    if len(widths) > 1:
        raise ValueError(f"vectors of different widths {sorted(widths)} cannot share one tensor: read them apart")
    shape = (n, *widths)
    if out is not None and (not hasattr(out, "detach") or tuple(out.shape) != shape):
        raise ValueError(f"out is {_described(out)}, expected a tensor of shape {list(shape)}")
    given = None if out is None else _shared_array(out)
    if given is not None and reaches(given.dtype, stored):
        array = given
    else:
        array = np.empty(shape, stored)
    for placement, members, local in parts:
        if len(local) == n and len(parts) == 1:
            placement.take(array[:, None])
        else:
            placement.take(array[:, None], index=local, at=members)
    if out is None:
        return to_tensor(array, dtype)
    if array is not given:
        out.copy_(converted(to_tensor(array), out.dtype))
    return out


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"a {type(value).__name__} of shape {list(shape)}"


def _shared_array(tensor: torch.Tensor) -> npt.NDArray[Any] | None:
    """An array over the memory of `tensor`; None where there is none, as on an accelerator."""
    if tensor.device.type != "cpu" or tensor.requires_grad or not tensor.is_contiguous():
        return None
    return to_array(tensor)

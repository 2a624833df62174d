"""The readings of one block's attention, each held against the values of a run."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from actcache.model.attention_calls import AttentionCalls
from actcache.model.attention_probe import Roles, Subject
from actcache.model.attention_sites import Seen
from actcache.model.columns import Columns
from actcache.model.forms import Place
from actcache.model.head_outputs import HeadOutputs, all_heads, projected
from actcache.model.readings import Found, Given, HeadOutReading, HeadReading, PatternReading
from actcache.model.runs import Ran

SITES = ("attn_in", "q", "k", "v", "pattern", "z", "head_out")
_HEADED = SITES[1:]
# How far values may differ that are computed in another order, of the sizes that are summed. Large scores lose digits,
# which the exponential makes more of.
_PROBABILITIES, _HEADS = 1e-3, 3e-4
# The same in half precision, in units of its rounding: sums are made in float32.
_HALF_UNITS = 8


def subject_of(block: nn.Module, seen: Seen) -> Subject | str:
    """What there is to find out about the projections of an attention, or why nothing can be."""
    probabilities = seen.heads()
    if seen.attention.making is None or seen.probabilities is None:
        return "its attention has no probabilities: no softmax over all keys is seen in it"
    if probabilities is None:
        heads = seen.probabilities.shape[1]
        return f"its attention has {heads} rows of probabilities, which do not divide its {seen.width} values evenly"
    widths = []
    for path in seen.attention.projections:
        output = seen.ran[path].output
        assert output is not None
        widths.append((path, output.shape[-1]))
    return Subject(block, seen.attention, probabilities.shape[1], seen.width, tuple(widths))


def without_heads(seen: Seen, why: str) -> Found:
    """The readings where nothing is known of heads, for the reason `why`."""
    return Found({"attn_in": Given(seen.attention.given, beside=seen.attention.beside)}, dict.fromkeys(_HEADED, why))


def attention_readings(seen: Seen, roles: Roles) -> Found:
    """The readings of an attention whose projections' columns are known."""
    found = Found({"attn_in": Given(seen.attention.given, beside=seen.attention.beside)}, dict(roles.absent))
    for name, part in roles.parts.items():
        output = seen.ran[part.path].output
        assert output is not None
        found.readings[name] = HeadReading(Place(part.path, "output", flat=output.ndim != 3), columns=part.columns)
    made = _weighted(seen, roles)
    if made == "other" and not roles.gated:
        why = "what its attention makes is not its values weighted by its probabilities"
        found.readings.pop("v", None)
        found.absent |= dict.fromkeys(("v", "pattern"), why)
    if made == "shifted":
        why = "something is added to its values, and so may be to the rest, behind the projection"
        for name in roles.parts:
            del found.readings[name]
            found.absent[name] = why
    sure = roles.told or made in ("weighted", "shifted")
    probabilities, producer = seen.heads(), seen.producer
    assert probabilities is not None and producer.input is not None and producer.output is not None
    heads = probabilities.shape[1]
    making = seen.attention.making
    assert making is not None
    if "pattern" not in found.absent:
        if not sure:
            found.absent["pattern"] = "nothing shows that what is made of its probabilities is attention's output"
        elif not making.by_row:
            found.absent["pattern"] = f"{making.module} is not given a row for each token of each prompt"
        else:
            sinks = probabilities.shape[-1] - probabilities.shape[-2]
            place = Place(making.module, "output")
            found.readings["pattern"] = PatternReading(place, calls=AttentionCalls(heads, sinks, making))
    if not sure:
        why = f"which columns of what {producer.path} is given belong to which head cannot be told"
        found.absent |= {"z": why, "head_out": why}
        return found
    columns = Columns.in_turn(heads, seen.width)
    found.readings["z"] = HeadReading(Place(producer.path, "input", flat=producer.input.ndim != 3), columns=columns)
    if _adds_up(producer, columns):
        place = Place(producer.path, "output", flat=producer.output.ndim != 3)
        found.readings["head_out"] = HeadOutReading(place, outputs=HeadOutputs(columns))
    else:
        found.absent["head_out"] = f"what {producer.path} returns is not the sum of what it makes of each head"
    return found


def _weighted(seen: Seen, roles: Roles) -> Literal["weighted", "shifted", "other", "unknown"]:
    """What attention makes: its values weighted by its probabilities, as they are or times one number; the same and
    something that is added to each value; something else; or "unknown", where the values are not known."""
    part, mixed = roles.parts.get("v"), seen.ran[seen.attention.mixed].input
    pattern = seen.heads()
    if part is None or mixed is None or pattern is None:
        return "unknown"
    batch, heads, tokens = pattern.shape[:3]
    output = seen.ran[part.path].output
    assert output is not None
    values = part.columns.read(output.reshape(batch, tokens, -1)).double()
    values = values.repeat_interleave(heads // part.columns.heads, 2)
    weights = pattern[..., :tokens].double()
    made = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    size = torch.einsum("bhqk,bkhd->bqhd", weights, values.abs())
    found = mixed.reshape(made.shape)
    factor = float((found.double() * made).sum() / made.square().sum().clamp_min(1e-300))
    if _close(found, made, size, _PROBABILITIES) or _close(found, made * factor, size * abs(factor), _PROBABILITIES):
        return "weighted"
    added = found.double() - made
    rest = added.mean((0, 1), keepdim=True)
    return "shifted" if _close(found, made + rest, size + rest.abs(), _PROBABILITIES) else "other"


def _adds_up(producer: Ran, columns: Columns) -> bool:
    """Whether the outputs of the heads and what the projection makes of nothing give its output."""
    given, output, module = producer.input, producer.output, producer.module
    assert given is not None and output is not None
    here = given.to(next((p.device for p in module.parameters() if not p.is_meta), given.device))
    parts = all_heads(module, here, columns).cpu().double()
    nothing = projected(module, torch.zeros_like(here)).cpu().double()
    # Within a head terms cancel too.
    size = (parts.abs().sum(-2) + nothing.abs()).amax(-1, keepdim=True)
    return _close(output.reshape(nothing.shape), parts.sum(-2) + nothing, size, _HEADS)


def _close(value: Tensor, other: Tensor, size: Tensor, allowed: float) -> bool:
    allowed = max(allowed, _HALF_UNITS * torch.finfo(value.dtype).eps)
    return bool(((value.double() - other).abs() <= allowed * size).all())

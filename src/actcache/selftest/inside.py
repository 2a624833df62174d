"""What is inside attention: heads that add up to what it gives, and patterns that mix its values.

These are too large to be kept for every prompt (all heads' outputs) or have no row for each token (patterns), so they
are compared on a few prompts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actcache.capture.hooks import run_with_cache
from actcache.model.forms import first_tensor
from actcache.model.sites import Site
from actcache.selftest.alone import run_alone
from actcache.selftest.ledger import row_errors, row_scale
from actcache.selftest.subject import Subject

# Sites that are compared here.
NAMES = ("head_out", "pattern")
_MOST_TOKENS = 24
# All heads' outputs of all blocks are as large as the weights of attention for some tokens.
_FEW_TOKENS = 9
_NAME = "_attn_implementation_internal"
# Older architectures have a class of attention for each implementation, chosen when the model is made.
_MADE_FOR = ("SdpaAttention", "FlashAttention2")


@torch.no_grad()
def check_heads(subject: Subject) -> None:
    """Each head's output is what the output projection makes of that head alone; all heads and the bias are what it
    returns."""
    ledger, sites = subject.ledger, subject.inside("head_out")
    if not sites:
        ledger.not_applicable("heads", "the model has no attention whose heads could be told apart.")
        return
    i = _prompts(subject, _FEW_TOKENS)[-1]
    cache = run_with_cache(subject.model, subject.inputs([subject.prompts[i]]), sites=list(sites))[1]
    for name, site in sites.items():
        point = subject.points[str(Site("z", site.layer, stack=site.stack))]
        z = subject.alone[i].values[str(Site("z", site.layer, stack=site.stack))]
        ours = cache[name][0]
        whole, none, each = _by_head(point.module, z, ours.shape[1])
        total = each.sum(1) + none
        if float(row_errors(total, whole, row_scale(whole)).max()) > ledger.tolerance:
            ledger.not_applicable("heads", "its output projection is no linear map: what it makes of heads is no sum.")
            return
        theirs = each.flatten(1)
        ledger.compare("heads", name, ours.flatten(1).double(), theirs, row_scale(theirs), prompts=[i] * len(z))
        summed = ours.double().sum(1) + none
        ledger.compare("heads", name, summed, whole, row_scale(whole), prompts=[i] * len(z))


def _by_head(projection: nn.Module, z: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a projection returns for the rows `z` ``[T, H * hd]`` ``[T, D]``, for zeros, and for each head by itself
    (without what it returns for zeros) ``[T, H, D]``: float64."""
    parameter = next(projection.parameters(), None)
    device = z.device if parameter is None or parameter.is_meta else parameter.device
    alone = torch.zeros(heads + 2, *z.shape, dtype=z.dtype)
    span = z.shape[1] // heads
    for head in range(heads):
        alone[head, :, head * span : (head + 1) * span] = z[:, head * span : (head + 1) * span]
    alone[heads + 1] = z
    # One by one: another number of rows may round otherwise.
    made = torch.stack([first_tensor(projection(rows[None].to(device))).cpu()[0].double() for rows in alone])
    return made[heads + 1], made[heads], (made[:heads] - made[heads]).transpose(0, 1)


@torch.no_grad()
def check_patterns(subject: Subject) -> None:
    """Patterns are transformers' own attention probabilities, in a padded batch too; each row is a share of one; and
    pattern times values is what the heads hand on."""
    ledger, sites = subject.ledger, subject.inside("pattern")
    if not sites:
        for check in ("patterns", "mixing"):
            ledger.not_applicable(check, "the model has no attention whose probabilities could be read.")
        return
    _mixing(subject, sites)
    chosen = _prompts(subject, _MOST_TOKENS)
    # With others in their batch, tokens may be sent to other experts.
    alone = subject.policy.lengths != "any" or bool(subject.routers)
    chosen = chosen[-1:] if alone else chosen
    with _eager(subject.model):
        told = {i: _told(subject, sites, i) for i in chosen}
        if not all(told.values()):
            ledger.not_applicable("patterns", "transformers returns no attention probabilities for this architecture.")
            return
        rows = [subject.prompts[i] for i in chosen]
        cache = run_with_cache(subject.model, subject.inputs(rows), sites=list(sites))[1]
    for name in sites:
        for i, ours in zip(chosen, cache.rows(name), strict=True):
            theirs = told[i][name].flatten(0, 1)
            ones = torch.ones(len(theirs), dtype=torch.float64)
            ledger.compare("patterns", name, ours.flatten(0, 1), theirs, ones, prompts=[i] * len(theirs))


def _mixing(subject: Subject, sites: Mapping[str, Site]) -> None:
    ledger, i = subject.ledger, _prompts(subject, _MOST_TOKENS)[-1]
    others = {n: [str(Site(other, s.layer, stack=s.stack)) for other in ("v", "z")] for n, s in sites.items()}
    there = [other for pair in others.values() for other in pair if other in subject.sites]
    cache = run_with_cache(subject.model, subject.inputs([subject.prompts[i]]), sites=[*sites, *there])[1]
    errors: dict[str, float] = {}
    for name in sites:
        v, z = others[name]
        pattern = cache[name][0].double()
        total = float((pattern.sum(-1).max() - 1).clamp_min(0)) + float((-pattern.min()).clamp_min(0))
        wrong = None if total <= 4 * ledger.tolerance else f"has rows that are no shares of one (off by {total:.2g})"
        ledger.note("patterns", name, total if wrong else 0.0, exact=False, wrong=wrong)
        if v in cache and z in cache and cache[v].shape[-1] == cache[z].shape[-1]:
            values = cache[v][0].double()
            mixed = torch.einsum("hqk,khd->qhd", pattern, values.repeat_interleave(len(pattern) // values.shape[1], 1))
            theirs = cache[z][0].flatten(1)
            errors[name] = float(row_errors(mixed.flatten(1), theirs.double(), row_scale(theirs)).max())
    if not errors or all(error > 1e-2 for error in errors.values()):
        why = "the model has no values and heads of one size" if not errors else "its attention does more than to mix"
        ledger.not_applicable("mixing", f"{why} (a gate, another rotation).")
        return
    for name, error in errors.items():
        right = error <= 4 * ledger.tolerance
        wrong = None if right else f"times the values is off by {error:.2g} from what the heads hand on"
        ledger.note("mixing", name, error, exact=False, wrong=wrong)


def _told(subject: Subject, sites: Mapping[str, Site], i: int) -> dict[str, Tensor]:
    """transformers' own probabilities ``[H, T, T]`` of one prompt by itself, by site; empty where it tells none."""
    alone = run_alone(subject.model, subject.inputs([subject.prompts[i]]), {}, {}, attentions=True)
    found: dict[str, Tensor] = {}
    for stack in subject.anatomy.stacks:
        every = [s for s in subject.anatomy.sites() if s.name == "pattern" and s.stack == stack]
        told = alone.attentions.get(stack or "", [])
        if len(told) == len(every):
            found |= {str(site): one for site, one in zip(every, told, strict=True) if str(site) in sites}
    return found if len(found) == len(sites) else {}


def _prompts(subject: Subject, most: int) -> list[int]:
    """Up to three prompts of different lengths, of up to `most` tokens."""
    by_length = {len(prompt): i for i, prompt in enumerate(subject.prompts) if 1 < len(prompt) <= most}
    lengths = sorted(by_length) or [len(subject.prompts[0])]
    picked: Sequence[int] = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    return [by_length.get(n, 0) for n in picked]


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Attention in plain operations, which is the one that returns its probabilities."""
    if any(name in type(module).__name__ for module in model.modules() for name in _MADE_FOR):
        # These go to plain operations by themselves when they are asked for their probabilities. Their masks would
        # follow the config and their attention would not.
        yield
        return
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    before = [(config, getattr(config, _NAME)) for config in configs.values() if hasattr(config, _NAME)]
    try:
        for config, _ in before:
            setattr(config, _NAME, "eager")
        yield
    finally:
        for config, implementation in before:
            setattr(config, _NAME, implementation)

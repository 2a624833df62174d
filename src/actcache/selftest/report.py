"""What a selftest found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["exact", "within tolerance", "not applicable", "refused", "wrong"]
# From best to worst, of those that come of comparisons.
MEASURED: tuple[Verdict, ...] = ("exact", "within tolerance", "wrong")


@dataclass(frozen=True)
class Cell:
    """One site, at one layer where it has layers.

    Attributes:
        site: complete name, such as ``"encoder.resid_post.3"``; without its layer when no block of the model has it.
        verdict: ``"exact"``: bit for bit in every comparison. ``"within tolerance"``: every error is at most the
            tolerance. ``"not applicable"``: the architecture has no such value. ``"refused"``: it cannot be told from
            other values, so reading it is an error. ``"wrong"``: what was read, extracted or stored is something else.
        error: the largest error of all comparisons, None for none: max |difference| of one token's row over the largest
            value of that row, or of the prompt's median row where that is larger.
        check: the name of the check in which that error was found.
        why: the reason for "not applicable", "refused" and "wrong".
    """

    site: str
    verdict: Verdict
    error: float | None = None
    check: str | None = None
    why: str | None = None


@dataclass(frozen=True)
class Check:
    """One way in which values were obtained and compared with the prompt run alone.

    Attributes:
        name: ``"finite"``, ``"identities"``, ``"hidden states"``, ``"alone"``, ``"equal lengths"``, ``"padded"``,
            ``"right padding"``, ``"left padding"``, ``"store"``, ``"pooled"``, ``"heads"``, ``"patterns"``,
            ``"mixing"``, ``"experts"``.
        about: what was done.
        verdict: as in `Cell`.
        error: the largest error, None when nothing was compared.
        site: where that error was found.
        compared: how many values (one site of one prompt) were compared.
        why: the reason for "not applicable" and "wrong".
    """

    name: str
    about: str
    verdict: Verdict
    error: float | None = None
    site: str | None = None
    compared: int = 0
    why: str | None = None


@dataclass(frozen=True)
class SelftestReport:
    """Whether actcache is right on one model, on this machine.

    Attributes:
        ok: whether no cell and no check is wrong.
        verdict: the result as a sentence.
        cells: one for each site and layer.
        checks: one for each way of obtaining values.
        model, model_class, dtype, device, attn_implementation: what was tested.
        blocks: number of blocks by stack (``""`` for the only one).
        forms: the kinds of block of each stack: ``"sequential"``, ``"parallel"``, ``"post-norm"``, ``"mixer"``.
        batching: which prompts may share a batch (``"any"``, ``"equal"`` lengths, each ``"alone"``); `batching_why`.
        hidden_states: for each stack, what transformers' own ``hidden_states`` are.
        tolerance: largest error that is put down to rounding.
        prompt_lengths: tokens of each prompt.
        not_reached: thresholds of the configuration that no prompt was long enough for.
        flipped_experts: on mixtures of experts, the share of routings that another batch decided otherwise.
        seed, seconds, versions: how this run can be repeated.
    """

    ok: bool
    verdict: str
    model: str
    model_class: str
    dtype: str
    device: str
    attn_implementation: str
    blocks: dict[str, int]
    forms: dict[str, list[str]]
    batching: str
    batching_why: str
    hidden_states: dict[str, str]
    tolerance: float
    prompt_lengths: list[int]
    not_reached: list[str]
    flipped_experts: float | None
    seed: int
    seconds: float
    versions: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.model} ({self.model_class}), {self.dtype}, {self.attn_implementation} attention, {self.device}"
        ]
        for check in self.checks:
            size = "" if check.error is None else f", largest error {check.error:.1e}"
            lines.append(f"  {check.name}: {check.verdict}{size}")
        return "\n".join([*lines, self.verdict])

"""`actcache selftest`: is it right on this machine, for this model?"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import click

from actcache.cli.options import (
    attn_implementation_option,
    debug_option,
    device_option,
    json_option,
    layers_option,
    revision_option,
    trust_remote_code_option,
)

if TYPE_CHECKING:
    from rich.table import Table

    from actcache.selftest.report import Cell, SelftestReport

# More rows than these are gathered into spans of blocks.
_ROWS = 16


@click.command("selftest")
@click.argument("model", required=False)
@layers_option
@click.option("--dtype", metavar="NAME", help="float32, float16 or bfloat16. [default: float32]")
@device_option
@attn_implementation_option
@revision_option
@trust_remote_code_option
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=160,
    show_default=True,
    help="Longest prompt: how far sliding windows and the like are crossed.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random prompts.")
@json_option
@debug_option
def command(model: str | None, as_json: bool, **options: Any) -> int:
    """Prove on this machine that what is read, extracted and stored of MODEL is what it computes.

    MODEL is a folder or a Hugging Face id; without it, the small model that is part of the package. Random prompts are
    run alone and read by plain torch hooks. Extraction in batches of 1, 3 and 8, capture with padding, the store, the
    identities of the residual stream and transformers' own hidden states must all agree with them.

    The table shows for each site and block the largest difference, as a part of the largest value of its prompt;
    "exact" is bit for bit, "-" is not on this model. The exit status is 1 when anything is wrong.

    --json prints the fields of ac.SelftestReport: ok, verdict, what was tested, `checks` (name, about, verdict, error,
    site, compared, why) and `cells` (site, verdict, error, check, why).
    """
    from actcache.cli.output import print_json

    if model is None:
        from actcache.demo import model_path

        model = str(model_path())
        # transformers has a bar for loading weights, which takes no time here.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from actcache.selftest.run import selftest

    report = selftest(model, **options)
    if as_json:
        print_json(report)
    else:
        _show(report)
    return 0 if report.ok else 1


def _show(report: SelftestReport) -> None:
    from actcache.cli.output import console, count, duration

    out = console()

    def say(text: str) -> None:
        out.print(text, markup=False)

    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    blocks = " + ".join(count(number, f"{stack} block".strip()) for stack, number in report.blocks.items())
    lengths = report.prompt_lengths
    say(f"{report.model} ({report.model_class}), {blocks}")
    say(f"{report.dtype}, {report.attn_implementation} attention, {report.device}; {versions}")
    say(f"{count(len(lengths), 'prompt')} of {min(lengths)} to {max(lengths)} tokens, {duration(report.seconds)}")
    for stack in report.blocks:
        for group in _GROUPS:
            shown = _sites(report, stack, group)
            if shown is not None:
                say("")
                out.print(shown)
    whole = [cell for cell in report.cells if "." not in _bare(cell) and _measured(cell)]
    say("\n" + "   ".join(f"{cell.site} {_text(cell)}" for cell in whole))
    for cell in report.cells:
        if not _measured(cell):
            say(f"{cell.site}: {cell.verdict}. {_sentence(cell.why)}")
    say("")
    out.print(_checks(report))
    say(f"\nbatching: {_LENGTHS[report.batching]}. {report.batching_why}")
    for stack, where in report.hidden_states.items():
        say(f"transformers' hidden_states{f' of the {stack}' if stack else ''}: {where}.")
    for threshold in report.not_reached:
        say(f"not reached: {threshold} (--max-tokens goes further).")
    say(f"\n{report.verdict}")


# Sites that share a table, so that each is narrow enough.
_GROUPS = {
    "block": ("resid_pre", "attn_out", "cross_attn_out", "mixer_out", "resid_mid", "mlp_out", "resid_post"),
    "attention": ("attn_in", "q", "k", "v", "pattern", "z", "head_out"),
    "MLP": ("mlp_in", "router_logits", "mlp_act"),
}
_LENGTHS = {
    "any": "prompts of any length together",
    "equal": "only prompts of one length together",
    "alone": "one prompt at a time",
}


def _sites(report: SelftestReport, stack: str, group: str) -> Table | None:
    """Blocks by the sites of a group, the largest error of each; many blocks in spans. None where there are none."""
    from actcache.cli.output import table

    found: dict[int, dict[str, Cell]] = {}
    prefix = f"{stack}." if stack else ""
    for cell in report.cells:
        name, _, layer = cell.site.removeprefix(prefix).partition(".")
        if cell.site.startswith(prefix) and layer.isdigit() and name in _GROUPS[group]:
            found.setdefault(int(layer), {})[name] = cell
    if not found:
        return None
    names = [name for name in _GROUPS[group] if any(name in cells for cells in found.values())]
    # In one line, the columns of a decoder would need more than 80 characters.
    shown = [name.replace("cross_", "cross_\n") for name in names]
    title = (stack or group) if group == "block" else f"{stack} {group}".strip()
    rows = table(title, *shown, right=tuple(shown))
    layers = sorted(found)
    width = -(-len(layers) // _ROWS)
    for start in range(0, len(layers), width):
        span = layers[start : start + width]
        label = str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}"
        rows.add_row(label, *(_worst([found[layer][name] for layer in span if name in found[layer]]) for name in names))
    return rows


def _worst(cells: list[Cell]) -> str:
    return _text(max(cells, key=lambda cell: (cell.verdict == "wrong", cell.error or 0.0))) if cells else "-"


def _checks(report: SelftestReport) -> Table:
    from actcache.cli.output import table

    rows = table("check", "largest error", "where", "", right=("largest error",))
    for check in report.checks:
        if check.name == "experts" and report.flipped_experts is None:
            continue
        if check.verdict == "not applicable":
            rows.add_row(check.name, "-", "", f"not done: {check.why}")
        else:
            shown = "WRONG" if check.error is None else _error(check.error, wrong=check.verdict == "wrong")
            rows.add_row(check.name, shown, check.site or "", check.about)
    return rows


def _bare(cell: Cell) -> str:
    """The site without its stack."""
    first, _, rest = cell.site.partition(".")
    return rest if first in ("encoder", "decoder") else cell.site


def _measured(cell: Cell) -> bool:
    return cell.verdict not in ("not applicable", "refused")


def _text(cell: Cell) -> str:
    if not _measured(cell) or cell.error is None:
        return "-"
    return "exact" if cell.verdict == "exact" else _error(cell.error, wrong=cell.verdict == "wrong")


def _error(error: float, *, wrong: bool) -> str:
    shown = "exact" if error == 0 else f"{error:.1e}"
    return ("WRONG" if math.isinf(error) else f"WRONG {shown}") if wrong else shown


def _sentence(why: str | None) -> str:
    text = (why or "").strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""

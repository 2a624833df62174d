"""`selftest`: run every check on one model, and say what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from actcache.extract.backends.local import exact_float32
from actcache.extract.extractor import ActivationExtractor
from actcache.model.anatomy import Anatomy, describe
from actcache.model.head_files import dtype_of
from actcache.model.loading import open_source
from actcache.model.modes import evaluating
from actcache.model.offload import input_device
from actcache.model.options import LoadOptions
from actcache.model.sites import PER_LAYER, SITE_NAMES, Site, resolve_layers
from actcache.progress import progress
from actcache.selftest import hidden, inside
from actcache.selftest.checks import run_checks
from actcache.selftest.ledger import Ledger, tolerance_of
from actcache.selftest.prompts import make_prompts
from actcache.selftest.report import Cell, Check, SelftestReport
from actcache.selftest.subject import Subject

if TYPE_CHECKING:
    from actcache.model.source import ModelSource

MAX_TOKENS = 160
_STEPS = 8
# Sites of a table, in the order of a forward pass: those of the residual stream, and those inside attention and MLP.
STREAM = (
    "embed",
    "resid_pre",
    "attn_out",
    "cross_attn_out",
    "mixer_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
    "final_norm",
    "logits",
)
INSIDE = ("attn_in", "q", "k", "v", "pattern", "z", "head_out", "mlp_in", "router_logits", "mlp_act")
SITES = (*STREAM, *INSIDE)


def selftest(
    model: Any,
    *,
    dtype: Any = None,
    device: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    allow_hooks: Iterable[str] = (),
    layers: Any = "all",
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> SelftestReport:
    """Prove on this machine that what is read, extracted and stored of `model` is what it computes.

    Random prompts of many lengths are run alone, read by plain torch hooks. These values must satisfy the identities of
    the residual stream and be transformers' own hidden states; extraction in batches of 1, 3 and 8, capture with
    padding on either side, and the store must give them again.

    Args:
        model: Hub id, local folder, or a loaded transformers model. The options of loading are those of `UnifiedCache`.
        layers: which blocks are compared: int, list, ``"all"``, ``"last"`` or ``"middle"``.
        seed: of the prompts.
        max_tokens: the longest prompt; sliding windows and other thresholds beyond it are not reached, which the
            report says.

    Raises:
        What loading and describing the model raise. Whatever is found is in the report, whose `ok` says whether
        everything is right.
    """
    start = time.perf_counter()
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "revision": revision,
        "token": token,
        "trust_remote_code": trust_remote_code,
        "device_map": device_map,
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
        "model_kwargs": dict(model_kwargs or {}),
        "allow_hooks": tuple(allow_hooks),
    }
    source = open_source(model, LoadOptions(**options))
    running = source.model_to_run()
    anatomy = describe(running)
    sites, absent = _sites(anatomy, layers)
    rows = {name: site for name, site in sites.items() if site.name not in inside.NAMES}
    extractor = ActivationExtractor(model, sites=list(rows), **options)
    # One model in memory, whatever asks for it.
    extractor.source = source
    made = make_prompts(
        source.config,
        vocabulary=min(source.vocab_size or anatomy.vocab_size, anatomy.vocab_size),
        context=source.context_length,
        max_tokens=max_tokens,
        seed=seed,
    )
    computing = dtype_of(running)
    depth = sum(anatomy.depth(stack) for stack in anatomy.stacks)
    ledger = Ledger(tolerance_of(computing, depth))
    subject = Subject(source, anatomy, rows, made.ids, ledger, extractor, sites)
    with ExitStack() as stack:
        stack.enter_context(evaluating(running))
        stack.enter_context(exact_float32())
        stack.enter_context(torch.autocast(input_device(running).type, enabled=False))
        bar = stack.enter_context(progress(len(made.ids) + _STEPS, "selftest", unit="step"))
        for _ in subject.run_alone():
            bar.update()
        run_checks(subject, bar.update, seed=seed)
    checks = ledger.checks()
    cells = [ledger.cell(site) or Cell(site, "wrong", why="no check could compare it") for site in sites]
    cells = sorted([*cells, *absent], key=_order)
    return SelftestReport(
        ok=not any(verdict == "wrong" for verdict in [*(c.verdict for c in cells), *(c.verdict for c in checks)]),
        verdict=_verdict(cells, checks, ledger.tolerance),
        model=source.name,
        model_class=type(running).__name__,
        dtype=str(computing).removeprefix("torch."),
        device=str(input_device(running)),
        attn_implementation=_attention(source),
        blocks={name or "": anatomy.depth(name) for name in anatomy.stacks},
        forms={name or "": _forms(anatomy, name) for name in anatomy.stacks},
        batching=subject.policy.lengths,
        batching_why=subject.policy.why,
        hidden_states={name or "": hidden.convention(subject, name)[1] for name in anatomy.stacks},
        tolerance=ledger.tolerance,
        prompt_lengths=[len(ids) for ids in made.ids],
        not_reached=made.not_reached,
        flipped_experts=subject.flipped / subject.routed if subject.routed else None,
        seed=seed,
        seconds=time.perf_counter() - start,
        versions={name: _version(name) for name in ("actcache", "torch", "transformers")},
        checks=checks,
        cells=cells,
    )


def _sites(anatomy: Anatomy, layers: Any) -> tuple[dict[str, Site], list[Cell]]:
    """The sites to compare, and cells of those that the model lacks or that are refused."""
    chosen = {stack: set(resolve_layers(layers, anatomy.depth(stack))) for stack in anatomy.stacks}
    sites = {str(s): s for s in anatomy.sites() if s.name in SITES and (s.layer is None or s.layer in chosen[s.stack])}
    absent = []
    for name in SITES:
        for stack in anatomy.stacks if name != "logits" else (None,):
            if any((s.name, s.stack) == (name, stack) for s in sites.values()):
                continue
            site = Site(name, stack=stack)
            why = anatomy.why_not(Site(name, min(chosen[stack]) if name in PER_LAYER else None, stack=stack))
            refused = site in anatomy.findings.refused
            absent.append(Cell(str(site), "refused" if refused else "not applicable", why=why))
    return sites, absent


def _order(cell: Cell) -> tuple[str, int, int]:
    site = Site.parse(cell.site)
    # Encoder first; logits belong to both and come last.
    stack = {"encoder": "0", "decoder": "1"}.get(site.stack or "", "2")
    place = SITE_NAMES.index(site.name)
    whole = {"embed": -1}.get(site.name, 1 << 30)
    return stack, whole if site.name not in PER_LAYER else site.layer or 0, place


def _forms(anatomy: Anatomy, stack: str | None) -> list[str]:
    """The kinds of block of a stack, each once."""
    found = [anatomy.findings.forms.get((stack, layer)) for layer in range(anatomy.depth(stack))]
    return list(dict.fromkeys("unknown" if form is None else form.kind for form in found))


def _verdict(cells: list[Cell], checks: list[Check], tolerance: float) -> str:
    wrong = [f"{cell.site} ({cell.why})" for cell in cells if cell.verdict == "wrong"]
    wrong = wrong or [f"{check.name}: {check.why}" for check in checks if check.verdict == "wrong"]
    if wrong:
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"Wrong: {wrong[0]}{more}. Do not use what is extracted from this model here."
    worst = max((cell.error for cell in cells if cell.error is not None), default=0.0)
    size = "bit for bit" if worst == 0 else f"to within {worst:.1e} of the largest value (allowed: {tolerance:.1e})"
    right = f"Right: what is captured, extracted and stored is what the model computes, {size}."
    refused = list(dict.fromkeys(cell.site for cell in cells if cell.verdict == "refused"))
    return f"{right} Refused, since it could not be told apart: {', '.join(refused)}." if refused else right


def _attention(source: ModelSource) -> str:
    return str(source.identity().values.get("attn_implementation"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

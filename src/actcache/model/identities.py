"""The identity check: one short forward pass that holds a model's sites against what they promise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actcache.model.modes import evaluating
from actcache.model.sites import Site

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy, ReadPoint
    from actcache.model.families import BlockForm

_PROMPTS, _TOKENS = 2, 6
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def check(anatomy: Anatomy) -> tuple[BlockForm | None, dict[str, str]]:
    """The block form whose identities hold on this model, and the site names that are refused, with the reason.

    The order of trust: blocks must chain (each one's output is the next one's input), the last block's output must be
    the final norm's input, and the branches must add up under one of the forms the blocks match.
    """
    if any(p.is_meta for p in anatomy.model.parameters()):
        return (anatomy.forms[0] if anatomy.forms else None), {}
    wanted: dict[tuple[str, Site], ReadPoint] = {}
    layers = range(anatomy.n_layers)
    for site in [Site(n, layer) for layer in layers for n in ("resid_pre", "resid_post")]:
        wanted["", site] = anatomy.point_of(site, None)
    for form in anatomy.forms:
        names = ("attn_out", "mlp_out") if form.kind == "parallel" else ("attn_out", "mlp_out", "resid_mid")
        for site in [Site(n, layer) for layer in layers for n in names]:
            wanted[form.name, site] = anatomy.point_of(site, form)
    values, norm_input = _probe(anatomy, wanted)
    refused: dict[str, str] = {}
    for layer in layers[1:]:
        why = _compare(values["", Site("resid_pre", layer)], [values["", Site("resid_post", layer - 1)]])
        if why:
            refused["resid_pre"] = refused["resid_post"] = (
                f"resid_post.{layer - 1} = resid_pre.{layer} does not hold ({why})"
            )
            break
    if norm_input is not None:
        why = _compare(norm_input, [values["", Site("resid_post", anatomy.n_layers - 1)]])
        if why:
            refused["final_norm"] = (
                f"the input of {anatomy.structure.final_norm} is not the last block's output ({why})"
            )
    reasons = []
    for form in anatomy.forms:
        why = _fails(form, values, anatomy)
        if why is None:
            return form, refused
        reasons.append(why)
    if reasons:
        others = f" (so does every other of {len(reasons)} known forms of a block)" if len(reasons) > 1 else ""
        refused |= dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), f"its identity fails {reasons[0]}{others}")
    return None, refused


def _fails(form: BlockForm, values: dict[tuple[str, Site], Tensor | None], anatomy: Anatomy) -> str | None:
    """Why this form's identities do not hold, or None."""
    for layer in range(anatomy.n_layers):
        pre, post = values["", Site("resid_pre", layer)], values["", Site("resid_post", layer)]
        attn, mlp = values[form.name, Site("attn_out", layer)], values[form.name, Site("mlp_out", layer)]
        if form.kind == "parallel":
            sums = [("resid_pre + attn_out + mlp_out = resid_post", post, [pre, attn, mlp])]
        else:
            mid = values[form.name, Site("resid_mid", layer)]
            sums = [
                ("resid_pre + attn_out = resid_mid", mid, [pre, attn]),
                ("resid_mid + mlp_out = resid_post", post, [mid, mlp]),
            ]
        for identity, whole, parts in sums:
            why = _compare(whole, parts)
            if why:
                return f"in block {layer} ({anatomy.block_paths[layer]}), {form.name} form, {identity} {why}"
    return None


def _compare(whole: Tensor | None, parts: list[Tensor | None]) -> str | None:
    """Why `whole` is not the sum of `parts`, or None when it is to within rounding.

    Each addition rounds once, in the dtype of the stream, by at most half an eps of what it adds up to. So the error of
    an element is bounded by one eps of the sum of its parts' magnitudes, element by element: an outlier dimension
    hides nothing in the others.
    """
    given = [part for part in parts if part is not None]
    if whole is None or len(given) < len(parts):
        return "cannot be checked: a module that should be read did not run"
    if any(part.shape != whole.shape for part in given):
        return f"cannot hold: shapes {[tuple(p.shape) for p in given]} against {tuple(whole.shape)}"
    eps = max(torch.finfo(t.dtype).eps for t in (whole, *given))
    total = torch.stack([part.double() for part in given]).sum(0)
    size = torch.stack([part.double().abs() for part in (whole, *given)]).sum(0)
    error = (total - whole.double()).abs()
    bound = eps * (len(given) - 1) * size
    if not bool(torch.isfinite(error).all()) or bool((error > bound).any()):
        relative = float(error.max() / whole.double().abs().max().clamp_min(1e-300))
        return f"is off by {relative:.2g} of the largest value"
    return None


def _probe(
    anatomy: Anatomy, wanted: dict[tuple[str, Site], ReadPoint]
) -> tuple[dict[tuple[str, Site], Tensor | None], Tensor | None]:
    """One short forward pass; copies of the wanted values (None where nothing ran) and of the final norm's input."""
    from actcache.model.anatomy import first_input

    values: dict[tuple[str, Site], Tensor | None] = dict.fromkeys(wanted)
    norm: list[Tensor] = []
    norm_module = anatomy.final_norm
    with _undisturbed(anatomy.model), torch.no_grad():
        for key, point in wanted.items():
            _keep(point, key, values)
        if norm_module is not None:
            norm_module.register_forward_pre_hook(
                lambda _, args, kwargs: norm.append(first_input((args, kwargs)).clone()), with_kwargs=True
            )
        anatomy.backbone(**_inputs(anatomy))
    return values, norm[0] if norm else None


def _keep(point: ReadPoint, key: tuple[str, Site], values: dict[tuple[str, Site], Tensor | None]) -> None:
    # Copied inside the hook: some architectures add to a branch's output in place right after it was returned.
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        values[key] = point.extract((args, kwargs)).clone()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        values[key] = point.extract(output).clone()

    if point.side == "input":
        point.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        point.module.register_forward_hook(after)


def _inputs(anatomy: Anatomy) -> dict[str, Tensor]:
    embed = anatomy.embed
    device = next(embed.parameters()).device if embed is not None else next(anatomy.model.parameters()).device
    tokens = min(_TOKENS, anatomy.context_length or _TOKENS)
    # Spread over the vocabulary without touching the random state; the last ids are often special.
    ids = (torch.arange(_PROMPTS * tokens) * 7919 + 3) % max(1, anatomy.vocab_size - 1)
    ids = ids.view(_PROMPTS, tokens).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model by itself: evaluation mode, no hooks but ours; modes, hooks and random state come back after."""
    modules = list(model.modules())
    hooks = [(m, name, m.__dict__[name]) for m in modules for name in _HOOKS if name in m.__dict__]
    shadows = [(m, m.__dict__.pop("_call_impl")) for m in modules if "_call_impl" in m.__dict__]
    cuda = [p.device.index for p in model.parameters() if p.device.type == "cuda"]
    with evaluating(model), torch.random.fork_rng(devices=sorted({d for d in cuda if d is not None})):
        try:
            for module, name, _ in hooks:
                module.__dict__[name] = OrderedDict()
            yield
        finally:
            for module, name, saved in hooks:
                module.__dict__[name] = saved
            for module, shadow in shadows:
                module.__dict__["_call_impl"] = shadow

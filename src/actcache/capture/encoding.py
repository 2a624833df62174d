"""Hand values of a cache to a sparse autoencoder or a transcoder, after checking that it was trained on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actcache.capture.notes import ValueWithInfo
from actcache.capture.parts import Parts
from actcache.capture.tokens import tensor_of
from actcache.errors import ActCacheError, LayerRangeError, OptionError, WrongSiteError
from actcache.model.anatomy import describe, original
from actcache.model.norms import Norm, norm_before
from actcache.model.sites import Site

_BYTES = 2**28
# Hook points of TransformerLens that are no site of ours: a norm before its weight and bias, of which stream.
_NORMALISED = re.compile(r"blocks\.(?P<layer>\d+)\.ln(?P<norm>[12])\.hook_normalized")
_BEFORE_MLP = re.compile(r"blocks\.(?P<layer>\d+)\.hook_mlp_in")
# Scales that have to be folded into the weights before an autoencoder takes activations as they are.
_UNFOLDED = ("expected_average_only_in", "covariance_whitening")
# Sites that change when TransformerLens centres what writes to the stream, and those that change with other folding.
_WRITTEN = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_PROCESSED = {"fold_value_biases": ("v", "z"), "refactor_factored_attn_matrices": ("q", "k", "v", "z")}
_FLATTENED = ("q", "k", "v", "z")


@dataclass(frozen=True)
class Trained:
    """What an autoencoder or transcoder says about its input.

    Attributes:
        name: the place as it names it.
        site: the same as a site; the stream that is normalised, where `normalised`.
        normalised: whether it takes that stream behind the norm, before weight and bias.
        head: the one head that it takes; None for all.
        width: the size of its input; None where it does not say.
        centred: whether it was trained on a model whose stream has no mean.
        out: the place that a transcoder gives, as it names it; None for an autoencoder.
    """

    name: str
    site: Site
    normalised: bool = False
    head: int | None = None
    width: int | None = None
    centred: bool = False
    out: str | None = None

    def __str__(self) -> str:
        means = f"{self.site} behind its norm, without weight and bias" if self.normalised else str(self.site)
        return self.name if self.name == means else f"{self.name} ({means})"

    @property
    def out_site(self) -> Site | None:
        """`out` as a site."""
        return None if self.out is None else Site.parse(self.out)


def trained_on(sae: Any, site: str | Site | None = None) -> Trained:
    """What `sae` was trained on: an SAELens object of any version, or an object with a `site` or `hook_name`. `site`
    names the place of one that does not say.

    Raises `OptionError` for an object without `encode`, one whose input is not known, or cannot be made from a site.
    """
    if not callable(getattr(sae, "encode", None)):
        raise OptionError(f"a {type(sae).__name__} has no encode(): expected an autoencoder or a transcoder")
    said = _Said(sae)
    name = said("hook_name", "hook_point", "site")
    layer = said("hook_layer", "hook_point_layer")
    if name is None:
        if site is None:
            raise OptionError(
                f"this {type(sae).__name__} does not say what it was trained on: give site=, such as 'resid_pre.6'"
            )
        name = str(site)
    name = str(name).format(layer=layer) if "{layer}" in str(name) else str(name)
    found, normalised = _read(name, said)
    if site is not None:
        given = Site.parse(site) if isinstance(site, str) else site
        if given not in _same(found, between_blocks=False):
            raise WrongSiteError(f"the SAE was trained on {name} ({found}), and site= says {given}")
    if found.layer is None and found.per_layer and layer is not None:
        found = Site(found.name, int(layer), stack=found.stack)
    if not found.complete:
        raise OptionError(f"{name!r} has no layer: give site=, such as '{found}.6'")
    if layer is not None and found.layer is not None and int(layer) != found.layer:
        raise OptionError(f"this {type(sae).__name__} contradicts itself: hook name {name!r}, layer {layer}")
    if said("normalize_activations") in _UNFOLDED:
        raise OptionError(
            f"this {type(sae).__name__} expects scaled activations (normalize_activations="
            f"{said('normalize_activations')!r}), and the scale is not part of its weights: fold it in first "
            "(fold_activation_norm_scaling_factor, fold_activation_whitening), or say that there is none with "
            "sae.cfg.normalize_activations = 'none'"
        )
    loaded = said("model_from_pretrained_kwargs") or {}
    for option, sites in _PROCESSED.items():
        if loaded.get(option) and found.name in sites:
            raise OptionError(
                f"this {type(sae).__name__} was trained on {name} of a model loaded with {option}=True, which changes "
                f"{found.name}: the values of the model itself are other ones"
            )
    head, width = said("hook_head_index"), said("d_in")
    if width is None:
        weight = getattr(sae, "W_enc", None)
        width = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else None
    centred = bool(loaded.get("center_writing_weights")) and found.name in _WRITTEN
    out = said("hook_name_out")
    return Trained(
        name,
        found,
        normalised,
        None if head is None else int(head),
        None if width is None else int(width),
        centred,
        None if out is None else str(out),
    )


class _Said:
    """What an object says about itself: in its config's metadata, in its config (an object or a dict), or as an
    attribute."""

    def __init__(self, sae: Any) -> None:
        config = getattr(sae, "cfg", None)
        metadata = config.get("metadata") if isinstance(config, Mapping) else getattr(config, "metadata", None)
        self._places = [place for place in (metadata, config, sae) if place is not None]

    def __call__(self, *names: str) -> Any:
        for name in names:
            for place in self._places:
                value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
                # Of a plain object, what it does is not what it says.
                if value is not None and not callable(value):
                    return value
        return None


def _read(name: str, said: _Said) -> tuple[Site, bool]:
    """The site that a place is, or whose normalised value it is."""
    if found := _NORMALISED.fullmatch(name):
        stream = "resid_pre" if found["norm"] == "1" else "resid_mid"
        return Site(stream, int(found["layer"])), True
    if found := _BEFORE_MLP.fullmatch(name):
        # In TransformerLens this is the stream. Where the place in transformers is named too, that one counts.
        behind = "norm" in str(said("hf_hook_name")) and str(said("hf_hook_name")).endswith(".output")
        return Site("mlp_in" if behind else "resid_mid", int(found["layer"])), False
    try:
        return Site.parse(name), False
    except ActCacheError as error:
        raise OptionError(f"the SAE was trained on {name!r}, which is no site: {error}") from None


def _same(site: Site, *, between_blocks: bool) -> list[Site]:
    """Sites whose values are those of `site`, itself first: on every architecture, unless something may join the stream
    `between_blocks`."""
    found = [site]
    if between_blocks and site.layer is not None and (site.name, site.layer) != ("resid_pre", 0):
        return found
    if site.name == "resid_pre" and site.layer is not None:
        before = Site("resid_post", site.layer - 1, stack=site.stack) if site.layer else Site("embed", stack=site.stack)
        found.append(before)
    elif site.name == "resid_post" and site.layer is not None:
        found.append(Site("resid_pre", site.layer + 1, stack=site.stack))
    elif site.name == "embed":
        found.append(Site("resid_pre", 0, stack=site.stack))
    return found


@torch.no_grad()
def encode(
    values: Any,
    sae: Any,
    *,
    site: str | Site | None = None,
    top_k: int | None = None,
    model: nn.Module | None = None,
) -> Any:
    """Features of an autoencoder or transcoder on the values it was trained on.

        features = ac.encode(cache, sae)                              # [B, S, n]
        features = ac.encode(cache.vector("resid_pre.6", 0, -1), sae)  # [n]

    `values`: a cache, of which the right site is taken; a vector of `ActivationCache.vector`, whose site is checked; or
    a tensor ``[..., D]`` of the site that `site` names. `sae`: an SAELens object, or any object with `encode` and a
    `site` or `hook_name`; `site` says it for one that has neither. ``resid_post.5`` and ``resid_pre.6`` are one value,
    and so are ``embed`` and ``resid_pre.0``: either will do. The first two are not on a model that lets features of
    images join the stream between blocks (qwen3_vl), and there only the very site is taken. A cache knows of that as
    long as its model is there, and a vector that was taken until then. A tensor, or a cache from a file, cannot be
    known to be of such a model: give `model`, without which it is taken by either name.

    Each prompt is encoded as it is, without its padding, where the result is 0; in the autoencoder's dtype and on its
    device, the result on that of the values. With `top_k` only the strongest features come back, sorted, as a pair
    ``(values, indices)`` ``[..., k]``: 0 and -1 where fewer are above zero.

    An autoencoder of ``ln1.hook_normalized`` or ``ln2.hook_normalized`` is given the stream normalised as its block
    does (that needs the model: the one of the capture, or `model`); one that was trained on a model with centred
    weights (``center_writing_weights`` in its metadata) is given centred values. Activations that an SAELens object
    normalises itself are left to it.

    Raises `WrongSiteError` (a `ValueError`) naming both sites, and `OptionError` for a wrong width or an object that
    does not say what it needs; both before anything is encoded.
    """
    trained = trained_on(sae, site)
    if isinstance(values, Parts):
        source = values._model() if values._model is not None else None
        known = source if model is None else model
        told = known if model is not None or values._depths else None
        names = _same(trained.site, between_blocks=_adds_between(told))
        found = next((one for one in names if str(one) in values), None)
        if found is None:
            raise _refusal(trained, values)
        value = tensor_of(values[str(found)])
        if value is None:
            raise OptionError(f"{found} is held in several parts, joined without padding: encode them one by one")
        real = values._mask_of(str(found), value)
        encoder = Encoder(sae, trained, top_k, known)
        return encoder.run(encoder.prepare(value, heads_from=4), real)
    held = _site_of(values, site)
    if held not in _same(trained.site, between_blocks=False):
        raise WrongSiteError(f"the SAE was trained on {trained}, and the vector is of {held}")
    if held not in _same(trained.site, between_blocks=_adds_between(model) or _noted_between(values)):
        raise WrongSiteError(
            f"the SAE was trained on {trained}, and the vector is of {held}, which is another value on this model: "
            f"features of images join the stream between blocks. Capture {trained.site}, and take the vector of that"
        )
    encoder = Encoder(sae, trained, top_k, model)
    given = encoder.prepare(values.value() if isinstance(values, ValueWithInfo) else values, heads_from=2)
    shape, last = given.shape[: -encoder.dims], given.shape[-encoder.dims :]
    found = encoder.run(given.reshape(1, -1, *last), None)
    return tuple(part.reshape(*shape, -1) for part in found) if isinstance(found, tuple) else found.reshape(*shape, -1)


def _site_of(values: Any, site: str | Site | None) -> Site:
    """The site of a vector or a tensor."""
    if isinstance(values, ValueWithInfo):
        info = values.info()
        if isinstance(info, Mapping) and "site" in info:
            return Site.parse(str(info["site"]))
    elif not isinstance(values, Tensor):
        raise OptionError(f"encode takes a cache, a vector of cache.vector, or a tensor, not {type(values).__name__}")
    if site is None:
        raise OptionError("these values do not know their site: take them with cache.vector(...), or give site=")
    return Site.parse(site) if isinstance(site, str) else site


def _adds_between(model: nn.Module | None) -> bool:
    return model is not None and describe(original(model)).adds_between_blocks


def _noted_between(values: Any) -> bool:
    info = values.info() if isinstance(values, ValueWithInfo) else None
    return isinstance(info, Mapping) and bool(info.get("between_blocks"))


def _refusal(trained: Trained, cache: Parts) -> ActCacheError:
    """Why the cache has nothing for this autoencoder."""
    model = cache._model() if cache._model is not None else None
    if model is not None:
        # An architecture without the site says so itself.
        describe(model).require(trained.site)
    sites = cache._sites()
    near = [str(site) for site in sites if site.layer == trained.site.layer] or [str(site) for site in sites]
    holds = ", ".join(near[:4]) + (", ..." if len(near) > 4 else "") if near else "no site"
    dot = f"{trained.site.stack}." if trained.site.stack else ""
    layers = "" if trained.site.layer is None else f", layers=[{trained.site.layer}]"
    return WrongSiteError(
        f"the SAE was trained on {trained}, and the cache holds {holds}: capture with "
        f"sites=['{dot}{trained.site.name}']{layers}"
    )


class Encoder:
    """One autoencoder, as it is to be called."""

    def __init__(self, sae: Any, trained: Trained, top_k: int | None, model: nn.Module | None) -> None:
        if top_k is not None and top_k < 1:
            raise OptionError(f"top_k is {top_k}: expected 1 or more, or None for all features")
        self._sae = sae
        self._trained = trained
        self._top_k = top_k
        self._model = model
        weight = next((t for t in _tensors_of(sae) if t.is_floating_point()), None)
        self._like = weight
        # Of one that does not say how many features it has, more than there will be.
        self._features = int(_Said(sae)("d_sae") or 2**17)
        # In this mode SAELens joins the heads itself.
        self._splits = bool(getattr(sae, "hook_z_reshaping_mode", False))
        self.dims = 2 if self._splits and trained.site.name in _FLATTENED and trained.head is None else 1

    def prepare(self, value: Tensor, *, heads_from: int) -> Tensor:
        """The input ``[..., width]`` (``[..., H, hd]`` where the autoencoder joins the heads), checked. A value with
        `heads_from` dimensions or more has heads, if its site has some."""
        trained, name = self._trained, self._trained.site.name
        if name in _FLATTENED and value.ndim >= heads_from:
            if trained.head is not None:
                if not -value.shape[-2] <= trained.head < value.shape[-2]:
                    raise LayerRangeError(
                        f"the SAE takes head {trained.head}, and {trained.site} has {value.shape[-2]}"
                    )
                value = value.select(-2, trained.head)
            elif self.dims == 1:
                value = value.flatten(-2)
        width = value.shape[-1] if self.dims == 1 else value.shape[-1] * value.shape[-2]
        if trained.width is not None and width != trained.width:
            raise OptionError(
                f"the SAE takes vectors of {trained.width} numbers, and {trained.site} has {width}: it was trained on "
                "another model"
            )
        wide = torch.promote_types(value.dtype, torch.float32)
        if trained.normalised:
            norm = self._norm()
            return value if norm is None else norm.divide(value.to(wide), norm.scale(value))
        if trained.centred and self._centres():
            return value.to(wide) - value.to(wide).mean(-1, keepdim=True)
        return value

    def _norm(self) -> Norm | None:
        trained = self._trained
        if self._model is None:
            raise OptionError(f"encode: {trained} needs the model, which knows the norm: give it as model=")
        assert trained.site.layer is not None
        return norm_before(describe(original(self._model)), trained.site.stack, trained.site.layer, trained.site.name)

    def _centres(self) -> bool:
        """Whether weights are centred on this model, as far as is known: only where layer norms do the same anyway."""
        if self._model is None:
            return True
        norm = norm_before(describe(original(self._model)), self._trained.site.stack, 0, "resid_pre")
        return norm is not None and norm.centred

    def run(self, value: Tensor, real: Tensor | None) -> Any:
        """Features ``[B, S, n]`` of ``[B, S, ...]``, or the strongest of them; 0 (and -1) at padding."""
        results: tuple[Tensor, ...] = ()
        for rows, columns in _alike(value, real):
            # All features of some prompts at a time: there may be millions of them.
            size = max(1, _BYTES // (4 * self._features * columns.shape[1]))
            for some, at in zip(rows.split(size), columns.split(size), strict=True):
                features = self.features(value[some[:, None], at])
                found = (features,) if self._top_k is None else _strongest(features, self._top_k)
                if not results:
                    shape = (*value.shape[:2], found[0].shape[-1])
                    fills = zip(found, (0, -1), strict=False)
                    results = tuple(torch.full(shape, fill, dtype=t.dtype, device=value.device) for t, fill in fills)
                for result, part in zip(results, found, strict=True):
                    result[some[:, None], at] = part.to(value.device)
        return results if len(results) > 1 else results[0]

    def features(self, given: Tensor) -> Tensor:
        """Features ``[B, T, n]`` of what `prepare` gave, of prompts of one length."""
        if self._like is not None:
            given = given.to(self._like.device, self._like.dtype)
        try:
            features = self._sae.encode(given)
        except (RuntimeError, ValueError, IndexError) as error:
            width = given.shape[-1]
            shapes = [list(t.shape) for t in _tensors_of(self._sae) if t.is_floating_point() and t.ndim == 2]
            if not shapes or any(width in shape for shape in shapes):
                raise
            raise OptionError(
                f"{type(self._sae).__name__}.encode cannot take vectors of {width} numbers, which {self._trained.site} "
                f"has: its weights are {', '.join(map(str, shapes[:4]))}. It was trained on another model, or another "
                f"site ({error})"
            ) from error
        if not isinstance(features, Tensor) or features.shape[:2] != given.shape[:2] or features.ndim != 3:
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise OptionError(
                f"{type(self._sae).__name__}.encode was given {list(given.shape)} and returned {found}: expected "
                "features [prompts, tokens, n]"
            )
        return features.detach()


def _tensors_of(sae: Any) -> Iterator[Tensor]:
    held = sae.parameters() if isinstance(sae, nn.Module) else getattr(sae, "__dict__", {}).values()
    return (tensor for tensor in held if isinstance(tensor, Tensor))


def _alike(value: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts of one length at a time: their rows ``[b]``, and their real columns ``[b, T]``."""
    if real is None:
        real = torch.ones(value.shape[:2], dtype=torch.bool)
    lengths = real.sum(1)
    for length in lengths.unique().tolist():
        if length:
            rows = (lengths == length).nonzero()[:, 0]
            yield rows, torch.stack([real[row].nonzero()[:, 0] for row in rows.tolist()])


def _strongest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = features.topk(min(k, features.shape[-1]), dim=-1)
    active = found.values > 0
    return torch.where(active, found.values, 0), torch.where(active, found.indices, -1)

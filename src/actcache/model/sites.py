"""Site names: one vocabulary for the values of a forward pass, the same on every architecture.

Nothing here needs torch: a warm run resolves its layers and sites from the model's config alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, total_ordering
from typing import TYPE_CHECKING, Any, Protocol

from actcache.errors import LayerRangeError, OptionError, UnknownSiteError, did_you_mean
from actcache.model.site_list import SiteList

if TYPE_CHECKING:
    from torch import nn

# Name -> shape as shown to people, in the order of a forward pass.
PER_LAYER = {
    "resid_pre": "[B, S, D]",
    "attn_in": "[B, S, D]",
    "q": "[B, S, H, hd]",
    "k": "[B, S, H_kv, hd]",
    "v": "[B, S, H_kv, hd]",
    "pattern": "[B, H, S, S]",
    "z": "[B, S, H, hd]",
    "head_out": "[B, S, H, D]",
    "attn_out": "[B, S, D]",
    "cross_attn_out": "[B, S, D]",
    "mixer_out": "[B, S, D]",
    "resid_mid": "[B, S, D]",
    "mlp_in": "[B, S, D]",
    "router_logits": "[B, S, E]",
    "mlp_act": "[B, S, D_mlp]",
    "mlp_out": "[B, S, D]",
    "resid_post": "[B, S, D]",
}
WHOLE_MODEL = {"embed": "[B, S, D]", "final_norm": "[B, S, D]", "logits": "[B, S, V]"}
SITE_NAMES = ("embed", *PER_LAYER, "final_norm", "logits")
PER_HEAD = ("pattern", "head_out")
STACKS = ("encoder", "decoder")
# How the tokens of a prompt become one vector.
POOLINGS = ("last_token", "first_token", "mean", "max", "min")
_HEAD_SHAPES = {"pattern": "[B, S, S]", "head_out": "[B, S, D]"}
# Which dimension of the value of all heads is the head.
HEAD_AXIS = {"pattern": 1, "head_out": 2}

# Names other libraries use -> ours; `{}` is the layer.
_HOOK_POINTS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_pattern": "pattern",
    "attn.hook_result": "head_out",
    "mlp.hook_post": "mlp_act",
}
_UNDERSCORED = {
    "resid_out": "resid_post",
    "resid_in": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_pre": "resid_pre",
    "resid_post": "resid_post",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "attn_in": "attn_in",
    "mlp_in": "mlp_in",
    "queries": "q",
    "keys": "k",
    "values": "v",
    "pattern": "pattern",
    "avg_attn_pattern": "pattern",
    "head_out": "head_out",
    "layer": "resid_post",
}
# Hook points of TransformerLens whose values are no site, though names are near: what is, and what differs.
_OTHER_POINTS = {
    "hook_embed": "the tokens' embedding alone; 'embed' is what block 0 is given, positions included",
    "hook_pos_embed": "the positions' embedding alone; 'embed' is what block 0 is given",
    "ln1.hook_normalized": "the norm without its weights; 'attn_in.{}' is what attention is given, with them",
    "ln2.hook_normalized": "the norm without its weights; 'mlp_in.{}' is what the MLP is given, with them",
    "ln_final.hook_normalized": "the norm without its weights; 'final_norm' has them",
    "hook_attn_in": "the stream before the norm for each head; that is 'resid_pre.{}', and behind it 'attn_in.{}'",
    "hook_q_input": "the stream before the norm for each head; that is 'resid_pre.{}'",
    "hook_k_input": "the stream before the norm for each head; that is 'resid_pre.{}'",
    "hook_v_input": "the stream before the norm for each head; that is 'resid_pre.{}'",
    "hook_mlp_in": "the stream before the norm; that is 'resid_mid.{}', and behind the norm 'mlp_in.{}'",
    "attn.hook_attn_scores": "scores before the softmax; 'pattern.{}' has what comes of them",
    "attn.hook_scores": "scores before the softmax; 'pattern.{}' has what comes of them",
    "attn.hook_rot_q": "queries after the rotation; 'q.{}' are those before",
    "attn.hook_rot_k": "keys after the rotation; 'k.{}' are those before",
    "mlp.hook_pre": "the MLP before its non-linearity; 'mlp_act.{}' is behind it",
    "mlp.hook_pre_linear": "the MLP's factor beside its gate; 'mlp_act.{}' is the product",
}
_CANONICAL = re.compile(
    r"(?:(?P<stack>encoder|decoder)\.)?(?P<name>[a-z_]+)(?:\.(?P<layer>-?\d+|\*)(?:\.(?P<head>\d+))?)?"
)
_BLOCKS = re.compile(r"blocks\.(?P<layer>-?\d+|\*)\.(?P<point>[a-z0-9_.]+)")
_SUFFIXED = re.compile(r"(?P<name>[a-z_]+?)_L?(?P<layer>-?\d+)(?:H(?P<head>\d+))?")


@total_ordering
@dataclass(frozen=True)
class Site:
    """One named value of a forward pass.

    `layer` is None for values a model has once (and for a name that still waits for its layers),
    `head` is set only for one head's part of `pattern` or `head_out`, `stack` ("encoder" or
    "decoder") only for encoder-decoder models.
    """

    name: str
    layer: int | None = None
    head: int | None = None
    stack: str | None = None

    def __post_init__(self) -> None:
        if self.name not in PER_LAYER and self.name not in WHOLE_MODEL:
            raise UnknownSiteError(
                f"unknown site {self.name!r}: expected one of {', '.join(SITE_NAMES)}."
                f"{did_you_mean(self.name, SITE_NAMES)}"
            )
        if self.name in WHOLE_MODEL and self.layer is not None:
            raise UnknownSiteError(
                f"site {self.name!r} belongs to the whole model and takes no layer: write {self.name!r}"
            )
        if self.head is not None and self.name not in PER_HEAD:
            raise UnknownSiteError(f"site {self.name!r} has no single heads: only {' and '.join(PER_HEAD)} take one")
        if self.stack is not None and self.stack not in STACKS:
            raise UnknownSiteError(f"unknown stack {self.stack!r}: expected one of {', '.join(STACKS)}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site name: ours ("resid_post.5", "encoder.resid_post.3", "pattern.5.3", "logits"),
        TransformerLens' ("blocks.5.hook_resid_post") or the underscored ones ("resid_out_5", "pattern_L5H3").

        A name without its layer ("resid_post"), or with any ("resid_post.*", "blocks.*.hook_resid_post"), gives a site
        that waits for layers. Raises `UnknownSiteError`.
        """
        if not isinstance(text, str):
            raise UnknownSiteError(f"a site is named by a string such as 'resid_post.5', not {type(text).__name__}")
        site = _known(text)
        if site is not None:
            return site
        raise _why_none(text)

    @classmethod
    def looks_like(cls, text: str) -> bool:
        """Whether `text` reads as a site."""
        return isinstance(text, str) and _known(text) is not None

    @property
    def per_layer(self) -> bool:
        """Whether each block has one of these."""
        return self.name in PER_LAYER

    @property
    def complete(self) -> bool:
        """Whether this names one value, with no layer left to choose."""
        return self.layer is not None or not self.per_layer

    @property
    def shape(self) -> str:
        """The value's shape in words, such as ``[B, S, D]``."""
        if self.head is not None:
            return _HEAD_SHAPES[self.name]
        return PER_LAYER.get(self.name) or WHOLE_MODEL[self.name]

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        parts = (self.stack, self.name, self.layer, self.head)
        return ".".join(str(p) for p in parts if p is not None)

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return self._order() < other._order()

    def _order(self) -> tuple[str, str, int, int]:
        none = -(1 << 62)
        return (
            self.stack or "",
            self.name,
            none if self.layer is None else self.layer,
            none if self.head is None else self.head,
        )


@dataclass(frozen=True)
class SiteInfo:
    """Where a site is read: module `path`, `side` ("output" or "input" of that module), `shape` in words."""

    site: Site
    path: str
    side: str
    shape: str


class HasSites(Protocol):
    """What `expand_sites` needs to know of a model: an `Anatomy`, or a stand-in that knows the depth."""

    def depth(self, stack: str | None, site: str = "resid_post") -> int:
        """Number of blocks of a stack; `SiteUnavailableError` for one the model lacks."""

    def require(self, site: Site) -> None:
        """Raise `SiteUnavailableError` for a complete site that this model lacks."""

    def why_not(self, site: Site) -> str | None:
        """Why this model lacks a complete site; None when it has it."""


def expand_sites(anatomy: HasSites, sites: str | Site | Sequence[str | Site], layers: Any = None) -> list[Site]:
    """Complete sites, in the order asked: each name that needs a layer is combined with `layers`
    (int, list, "all", "last", "middle"; None means all; of all and of the middle, those that have the site are taken).
    Complete names beside them are kept as they are.

    Negative layers count from the end; duplicates are dropped. Raises `UnknownSiteError`, `SiteUnavailableError`,
    `LayerRangeError`, or `OptionError` for `layers` where no name needs one.
    """
    named = [sites] if isinstance(sites, (str, Site)) else list(sites)
    if not named:
        raise OptionError("sites is empty: name at least one, such as 'resid_post'")
    parsed = [item if isinstance(item, Site) else Site.parse(item) for item in named]
    require_use_of_layers(parsed, layers)
    wanted: dict[Site, None] = {}
    for site in parsed:
        if not site.per_layer:
            wanted[site] = None
        elif site.layer is not None:
            depth = anatomy.depth(site.stack, str(replace(site, stack=None)))
            wanted[replace(site, layer=resolve_layers(site.layer, depth)[0])] = None
        else:
            chosen = resolve_layers("all" if layers is None else layers, anatomy.depth(site.stack, site.name))
            each = [replace(site, layer=layer) for layer in chosen]
            if takes_what_is_there(layers):
                # Where none has it, the first says why.
                each = [one for one in each if anatomy.why_not(one) is None] or each[:1]
            wanted.update(dict.fromkeys(each))
    for site in wanted:
        anatomy.require(site)
    return list(wanted)


def require_use_of_layers(sites: Sequence[Site], layers: Any) -> None:
    """Raise `OptionError` for `layers` that choose among nothing, since every site is complete."""
    if layers is None or not all(site.complete for site in sites):
        return
    first = sites[0]
    why = "names its layer already" if first.layer is not None else "has no layers"
    name = f", or write {str(replace(first, layer=None))!r}" if first.layer is not None else ""
    raise OptionError(f"layers={layers!r} chooses nothing: site {str(first)!r} {why}. Leave layers out{name}")


def takes_what_is_there(layers: Any) -> bool:
    """Whether `layers` names many without naming each, so that those without the site are left out."""
    return layers is None or (isinstance(layers, str) and layers in ("all", "middle"))


def resolve_layers(spec: Any, n_layers: int) -> list[int]:
    """Layer numbers from an int, a list of ints, "all", "last" or "middle" (the middle third).

    Order is kept, duplicates are dropped, negative numbers count from the end. Raises `LayerRangeError` for a layer
    the model does not have and `OptionError` for anything else.
    """
    if isinstance(spec, str):
        if spec == "all":
            return list(range(n_layers))
        if spec == "last":
            return [n_layers - 1]
        if spec == "middle":
            return list(range(n_layers // 3, n_layers - n_layers // 3))
        raise OptionError(
            f"unknown layers {spec!r}: expected an int, a list of ints, 'all', 'last' or 'middle'."
            f"{did_you_mean(spec, ['all', 'last', 'middle'])}"
        )
    items = [spec] if is_int(spec) else spec
    try:
        listed = list(items)
    except TypeError:
        raise OptionError(f"layers is {spec!r}: expected an int, a list of ints, 'all', 'last' or 'middle'") from None
    if not listed:
        raise OptionError("layers is empty: name at least one layer")
    resolved: dict[int, None] = {}
    for item in listed:
        if not is_int(item):
            raise OptionError(f"layers holds {item!r}: expected ints only (or 'all', 'last', 'middle' alone)")
        layer = int(item)
        if not -n_layers <= layer < n_layers:
            raise LayerRangeError(
                f"layer {layer} is out of range: the model has {n_layers} layers (0 to {n_layers - 1})"
            )
        resolved[layer % n_layers] = None
    return list(resolved)


def list_sites(model: nn.Module) -> SiteList:
    """Every site this model has, with the module and side it is read at; printed, a table with a line for each kind of
    site. Runs the identity check once per model."""
    from actcache.model.anatomy import describe
    from actcache.model.structure import require_module

    require_module(model, "sites")
    anatomy = describe(model)
    points = {site: anatomy.read_point(site) for site in anatomy.sites()}
    return SiteList(SiteInfo(site, point.path, point.side, site.shape) for site, point in points.items())


def _read(text: str) -> Site | None:
    """The site that `text` names, None for text of another form; raises `UnknownSiteError` for a site there is not."""
    found = _CANONICAL.fullmatch(text)
    if found and (found["name"] in PER_LAYER or (found["name"] in WHOLE_MODEL and found["layer"] != "*")):
        return Site(found["name"], _number(found["layer"]), _number(found["head"]), found["stack"])
    found = _BLOCKS.fullmatch(text)
    if found and found["point"] in _HOOK_POINTS:
        return Site(_HOOK_POINTS[found["point"]], _number(found["layer"]))
    found = _SUFFIXED.fullmatch(text)
    if found and found["name"] in _UNDERSCORED:
        return Site(_UNDERSCORED[found["name"]], int(found["layer"]), _number(found["head"]))
    return None


# Caches ask for every key of theirs, again and again, and most of the answers are about the same few names.
@lru_cache(maxsize=4096)
def _known(text: str) -> Site | None:
    try:
        return _read(text)
    except UnknownSiteError:
        return None


def _why_none(text: str) -> UnknownSiteError:
    try:
        _read(text)
    except UnknownSiteError as error:
        return error
    return _unknown(text)


def _number(text: str | None) -> int | None:
    return None if text in (None, "*") else int(text)


def is_int(value: object) -> bool:
    """Whether `value` may name a layer or a position."""
    # numpy integers and 0-d tensors count; bools are ints in Python and never meant as layers.
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "shape", ()) == ()


def _unknown(text: str) -> UnknownSiteError:
    found = _BLOCKS.fullmatch(text)
    why = _OTHER_POINTS.get(found["point"] if found else text)
    if why is not None:
        near = why.replace("{}", found["layer"].replace("*", "0") if found else "0")
        return UnknownSiteError(f"{text!r} is no site: in TransformerLens it is {near}.")
    negative = re.fullmatch(r"(?P<all>.+\.-?\d+)\.-\d+", text)
    if negative and (site := _known(negative["all"])) is not None and site.name in PER_HEAD:
        return UnknownSiteError(
            f"{text!r} names no head: in names of sites heads are counted from 0, as in '{site}.0' (heads= of edits, "
            f"and the tensor of {str(site)!r}, take negative ones)"
        )
    base = re.sub(r"[._]?-?L?\d.*$", "", text)
    hint = did_you_mean(base, SITE_NAMES) or did_you_mean(text, SITE_NAMES)
    return UnknownSiteError(
        f"unknown site {text!r}: expected one of {', '.join(SITE_NAMES)} (with '.layer' where it has one).{hint}"
    )

"""The parts of a model, and where each site is read on it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import nn

from actcache.errors import AdditivityError, LayerRangeError, SiteUnavailableError
from actcache.model.forms import BlockForm, Place
from actcache.model.identities import BRANCHES, Findings, Identity, check, numbers_of
from actcache.model.inner import INNER, Inner, find_inner
from actcache.model.media import adds_between_blocks, merges_media
from actcache.model.read_points import ReadPoint, Unflatten, extractor
from actcache.model.sites import PER_LAYER, SITE_NAMES, Site, SiteInfo, expand_sites, list_sites
from actcache.model.structure import Stack, Structure, descend, find_structure, require_module

if TYPE_CHECKING:
    from actcache.model.layout import Layouts

__all__ = ["Anatomy", "ReadPoint", "SiteInfo", "check_identities", "describe", "list_sites", "original"]


class Anatomy:
    """The parts of one model, by role. Holds the model weakly: describing a model does not keep it alive.

    Attributes: `stacks` (``(None,)``, or ``("encoder", "decoder")``: the prefixes of site names), `d_model`,
    `vocab_size`, `context_length` (positions the model was configured for; None when it has no such limit),
    `structure` (all paths).
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model = weakref.ref(model)
        self.structure = structure
        self.stacks = tuple(stack.name for stack in structure.stacks)
        self.d_model = structure.d_model
        self.vocab_size = structure.vocab_size
        self.context_length = structure.context_length
        self._block_refs = [
            (stack.blocks.split("."), [weakref.ref(block) for block in self.blocks_of(stack.name)])
            for stack in structure.stacks
        ]
        self._places: dict[Site, tuple[tuple[str, ...], Place, tuple[str, ...]]] = {}
        # Of points that are a module and nothing but functions: module names, and all of the point but the module.
        self._plain_points: dict[Site, tuple[tuple[str, ...], tuple[Any, ...]]] = {}
        self._expanded: dict[Any, list[Site]] = {}
        self._findings: Findings | None = None
        self._inner: Inner | None = None
        # What `layout.layouts` made of the findings.
        self.layouts: Layouts | None = None
        # Those that the findings rest on; empty until there are some.
        self._numbers: list[tuple[Mapping[str, Any], str, float]] = []

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError("the model this anatomy describes is gone")
        return model

    @property
    def backbone(self) -> nn.Module:
        """The module that runs everything but the head; the model itself where nothing smaller does."""
        return self.model.get_submodule(self.structure.backbone)

    @property
    def n_layers(self) -> int:
        """Blocks of the only stack; `SiteUnavailableError` for an encoder-decoder."""
        return self.depth(None)

    @property
    def block_paths(self) -> list[str]:
        """Paths of the blocks, those of the encoder first."""
        return [path for stack in self.structure.stacks for path in stack.block_paths]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, those of the encoder first."""
        return [block for stack in self.stacks for block in self.blocks_of(stack)]

    def blocks_of(self, stack: str | None) -> list[nn.Module]:
        """The blocks of one stack."""
        found: Any = self.model.get_submodule(self._stack(stack).blocks)
        return list(found)

    @property
    def embed(self) -> nn.Module | None:
        return self._part(self.structure.embed)

    @property
    def head(self) -> nn.Module | None:
        return self._part(self.structure.head)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm behind the last block (of the decoder); found by the identity check, None where there is none."""
        return self._part(self.findings.final_norms.get(self.stacks[-1]))

    @cached_property
    def merges_media(self) -> bool:
        """`merges_media` of this model, which every capture asks."""
        return merges_media(self.model)

    @cached_property
    def adds_between_blocks(self) -> bool:
        """Whether what leaves a block may be another value than what enters the next: features of images come in."""
        return adds_between_blocks(self.backbone)

    @cached_property
    def depths(self) -> dict[str | None, int]:
        """Number of blocks of each stack."""
        return {stack.name: stack.n_layers for stack in self.structure.stacks}

    @property
    def checked(self) -> bool:
        """Whether the identity check has been made: until then `findings` costs a pass."""
        return self._findings is not None

    @property
    def findings(self) -> Findings:
        """What the identity check found: one short forward pass when it is first asked for."""
        if self._findings is None:
            # Two passes at once on one model would read each other's values.
            with _checking:
                if self._findings is None:
                    self._numbers = numbers_of(self.blocks, self.model)
                    self._findings = check(self)
        return self._findings

    @property
    def inner(self) -> Inner:
        """Where values inside attention and MLP are read: two more short passes when it is first asked for."""
        if self._inner is None:
            with _checking:
                if self._inner is None:
                    self._inner = find_inner(self)
        return self._inner

    @property
    def identities(self) -> list[Identity]:
        """Every identity of the residual stream, with the size of its error on this model."""
        return self.findings.identities

    def depth(self, stack: str | None, site: str = "resid_post") -> int:
        """Number of blocks of a stack. Raises `SiteUnavailableError` for a stack this model does not have, or when
        it has two and none is named (`site` is the name that the message shows)."""
        return self._stack(stack, site).n_layers

    def _stack(self, name: str | None, site: str = "resid_post") -> Stack:
        for stack in self.structure.stacks:
            if stack.name == name:
                return stack
        if name is None:
            choices = " or ".join(repr(f"{stack}.{site}") for stack in self.stacks)
            raise SiteUnavailableError(f"site {site!r}: {self._name()} has two stacks of blocks, write {choices}")
        if self.stacks == (None,):
            raise SiteUnavailableError(
                f"site {f'{name}.{site}'!r}: {self._name()} has one stack of blocks, write {site!r} without {name!r}"
            )
        raise SiteUnavailableError(f"unknown stack {name!r}: expected 'encoder' or 'decoder'")

    def current(self) -> bool:
        """Whether the model still has the blocks that were described, and they the numbers that they were checked
        with; never where the check saw a branch that gave nothing."""
        if self._findings is not None and self._findings.passing:
            return False
        for holder, name, value in self._numbers:
            if holder.get(name) != value:
                return False
        model = self.model
        for names, refs in self._block_refs:
            try:
                children = descend(model, names)._modules.values()
            except KeyError:
                return False
            if len(children) != len(refs) or not all(map(is_, [ref() for ref in refs], children)):
                return False
        return True

    def sites(self) -> list[Site]:
        """Every complete site this model has, in the order of a forward pass."""
        found: list[Site] = []
        for stack in self.structure.stacks:
            names = [Site("embed", stack=stack.name)]
            names += [Site(name, layer, stack=stack.name) for layer in range(stack.n_layers) for name in PER_LAYER]
            names.append(Site("final_norm", stack=stack.name))
            found += [site for site in names if self.why_not(site) is None]
        return found + ([Site("logits")] if self.why_not(Site("logits")) is None else [])

    def require(self, site: Site) -> None:
        """Raise when this model has no such site: `SiteUnavailableError`, `LayerRangeError`, or `AdditivityError` for
        one whose identity does not hold. Each says why and what there is."""
        if not site.complete:
            raise SiteUnavailableError(f"site {str(site)!r} needs a layer: write '{site}.0', or give layers=")
        if site.name == "logits":
            if site.stack is not None:
                raise SiteUnavailableError(f"site {str(site)!r}: logits belong to the whole model, write 'logits'")
        else:
            n_layers = self.depth(site.stack, str(replace(site, stack=None)))
            if site.layer is not None and not -n_layers <= site.layer < n_layers:
                raise LayerRangeError(
                    f"site {str(site)!r} is out of range: the model has {n_layers} layers (0 to {n_layers - 1})"
                )
        why = self.why_not(site)
        if why is not None:
            error = AdditivityError if self._refused(site) is not None else SiteUnavailableError
            raise error(self._refusal(site, why))
        if site.head is not None:
            self.inner.require_head(site, self._index(site))

    def read_point(self, site: Site) -> ReadPoint:
        """Where `site` is read. Raises as `require` does."""
        known = self._plain_points.get(site)
        if known is not None:
            # The module that is there now: only blocks are known to be those that were described.
            names, fields = known
            return ReadPoint(descend(self.model, names), *fields)
        names, place, block = self.place(site)
        module = descend(self.model, names)
        if site.name in INNER:
            return self.inner.read_point(site, self._index(site), module, ".".join(names), descend(self.model, block))
        # The stream goes on beside the module that is given it there, which may be the MLP.
        early = site.name == "resid_mid" and place.side == "input"
        point = ReadPoint(module, ".".join(names), place.side, extractor(site, place), scale=place.scale, early=early)
        if not place.flat:
            rest = point.path, point.side, point.extract, (), (), False, point.scale, point.early
            self._plain_points[site] = names, rest
            return point
        # Rows without their batch: its shape is that of the block's own input.
        unflatten = Unflatten(site, point.extract)
        return replace(point, extract=unflatten, around=((descend(self.model, block), unflatten.note),))

    def place(self, site: Site) -> tuple[tuple[str, ...], Place, tuple[str, ...]]:
        """Module names from the root, the place of `site` on that module, and the names of the block that holds it.

        Raises as `require` does."""
        known = self._places.get(site)
        if known is None:
            self.require(site)
            known = self._places[site] = self._place_of(site)
        return known

    def points(self, sites: str | Site | Sequence[str | Site], layers: Any = None) -> dict[Site, ReadPoint]:
        """`expand_sites` and `read_point` in one, each site held against its identity. Raises what they raise."""
        key = (sites if isinstance(sites, (str, Site)) else tuple(sites)), None if layers is None else repr(layers)
        wanted = self._expanded.get(key)
        if wanted is None:
            wanted = self._expanded[key] = expand_sites(self, sites, layers)
        return {site: self.read_point(site) for site in wanted}

    def _place_of(self, site: Site) -> tuple[tuple[str, ...], Place, tuple[str, ...]]:
        if site.name == "logits":
            return (), Place("", "output"), ()
        if site.name == "final_norm":
            path = self.findings.final_norms[site.stack]
            assert path is not None
            return tuple(path.split(".")), Place("", "output"), ()
        stack = self._stack(site.stack)
        layer = 0 if site.name == "embed" else self._index(site)[1]
        block = tuple(stack.block_paths[layer].split("."))
        if site.name in ("embed", "resid_pre"):
            return block, Place("", "input"), block
        if site.name == "resid_post":
            return block, Place("", "output"), block
        if site.name in INNER:
            place = self.inner.blocks[stack.name, layer].readings[site.name].place
        else:
            form = self._form(stack.name, layer)
            assert form is not None
            place = form.places()[site.name]
        return (*block, *place.path.split(".")), place, block

    def _index(self, site: Site) -> tuple[str | None, int]:
        """Stack and layer of a site, the layer counted from the front."""
        return site.stack, (site.layer or 0) % self._stack(site.stack).n_layers

    def _form(self, stack: str | None, layer: int) -> BlockForm | None:
        return self.findings.forms.get((stack, layer))

    def _refused(self, site: Site) -> str | None:
        return self.findings.refused.get(Site(site.name, stack=site.stack))

    def why_not(self, site: Site) -> str | None:
        """Why this model has no such site, or None when it has. `site` is complete and in range."""
        if site.name == "logits":
            no_head = self.structure.head is None
            return "it has no language-model head (load it with its head)" if no_head else None
        refused = self._refused(site)
        if refused is not None:
            return refused
        if site.name == "final_norm":
            found = self.findings.final_norms.get(site.stack)
            return None if found is not None else "no norm takes the output of its last block"
        idle = self.findings.idle.get(self._index(site)) if site.layer is not None else None
        if idle is not None and site.name in (*INNER, *BRANCHES):
            return idle
        if site.name in INNER:
            return self.inner.why_not(site.name, self._index(site))
        if site.name not in BRANCHES:
            return None
        n_layers = self._stack(site.stack).n_layers
        form = self._form(*self._index(site))
        if form is None or site.name in form.places():
            return None
        elsewhere = [layer for layer in range(n_layers) if self._has(Site(site.name, layer, stack=site.stack))]
        some = f"; blocks {', '.join(map(str, elsewhere))} have it" if elsewhere else ""
        return _absent(site.name, form, "block" if elsewhere else "blocks") + some

    def _has(self, site: Site) -> bool:
        form = self._form(site.stack, site.layer or 0)
        return form is not None and site.name in form.places()

    def _refusal(self, site: Site, why: str) -> str:
        layer = site.layer or 0
        have = [
            name
            for name in SITE_NAMES
            if self.why_not(
                Site(name, layer if name in PER_LAYER else None, stack=site.stack if name != "logits" else None)
            )
            is None
        ]
        return f"site {str(site)!r} is not available on {self._name()}: {why}. It has {', '.join(have)}."

    def _name(self) -> str:
        return type(self.model).__name__

    def _part(self, path: str | None) -> nn.Module | None:
        return None if path is None else self.model.get_submodule(path)


_checking = threading.RLock()
_described: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of `model`, remembered per model object and found anew when its blocks were replaced.

    A model wrapped by `torch.compile` is described by its original. Raises `SiteUnavailableError` when the blocks
    cannot be made out.
    """
    model = original(model)
    anatomy = _described.get(model)
    if anatomy is None or not anatomy.current():
        anatomy = Anatomy(model, find_structure(model))
        _described[model] = anatomy
    return anatomy


def check_identities(model: nn.Module, *, sites: Iterable[Site | str] | None = None) -> None:
    """Hold this model's residual stream against the identities its sites promise; once per model object.

    `sites`: only those are required to hold; None requires everything. Raises `AdditivityError` naming block, identity
    and the size of the error. The model is left as it was.
    """
    anatomy = describe(model)
    if sites is None:
        for site, why in anatomy.findings.refused.items():
            raise AdditivityError(anatomy._refusal(site, why))
        return
    for named in sites:
        site = Site.parse(named) if isinstance(named, str) else named
        refused = anatomy._refused(site)
        if refused is not None:
            raise AdditivityError(anatomy._refusal(site, refused))


def original(model: nn.Module) -> nn.Module:
    """The module behind a `torch.compile` wrapper; `model` itself otherwise. Raises `OptionError` for no module."""
    require_module(model, "this")
    held = model.__dict__.get("_modules", {})
    # Not `get`: those of torch.jit have none.
    inner = held["_orig_mod"] if "_orig_mod" in held else None  # noqa: SIM401
    return inner if isinstance(inner, nn.Module) else model


def _absent(name: str, form: BlockForm, blocks: str) -> str:
    have = "has" if blocks == "block" else "have"
    if name == "cross_attn_out":
        return f"its {blocks} {have} no cross-attention"
    if name == "mixer_out":
        return f"its {blocks} {have} attention, no mixer of another kind"
    if form.kind == "mixer":
        return f"its {blocks} {have} one branch, 'mixer_out', in place of attention and MLP"
    if name == "attn_out":
        return f"its {blocks} {have} 'mixer_out' in place of attention"
    return "its attention and MLP run in parallel on the same stream, there is nothing in between"

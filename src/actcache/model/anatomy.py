"""The parts of a model, and where each site is read on it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from actcache.errors import AdditivityError, LayerRangeError, SiteUnavailableError
from actcache.model.families import BLOCK_FORMS, BlockForm
from actcache.model.sites import Site, SiteInfo, expand_sites, list_sites
from actcache.model.structure import Structure, descend, find_structure, text_config

__all__ = ["Anatomy", "ReadPoint", "SiteInfo", "check_identities", "describe", "list_sites", "original"]

Side = Literal["output", "input"]
_BRANCHES = ("resid_mid", "attn_out", "mlp_out")
_BLOCK_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
_READ = ("embed", *_BLOCK_SITES, "final_norm", "logits")


@dataclass(frozen=True)
class ReadPoint:
    """Where one site is read.

    `extract` turns what the module returned (side "output"), or the pair ``(args, kwargs)`` it was called with (side
    "input"), into the site's tensor.
    """

    module: nn.Module
    path: str
    side: Side
    extract: Callable[[Any], Tensor]


class Anatomy:
    """The parts of one model, by role. Holds the model weakly: describing a model does not keep it alive.

    Attributes: `n_layers`, `d_model`, `vocab_size`, `context_length` (positions the model was configured for; None
    when it has no such limit), `takes_position_ids` (whether the backbone's forward has that argument),
    `block_paths`, `structure` (all paths).
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model = weakref.ref(model)
        self.structure = structure
        self.n_layers = structure.n_layers
        self.d_model = structure.d_model
        self.vocab_size = structure.vocab_size
        self.context_length = structure.context_length
        self.takes_position_ids = structure.takes_position_ids
        self.block_paths = [f"{structure.blocks}.{layer}" for layer in range(structure.n_layers)]
        self._block_refs = [weakref.ref(block) for block in self.blocks]
        self._list_names = structure.blocks.split(".")
        self._read_points: dict[Site, tuple[tuple[str, ...], str, Side, Callable[[Any], Tensor]]] = {}
        self._expanded: dict[Any, list[Site]] = {}
        self._forms = _matching_forms(self.blocks)
        self._form: BlockForm | None = None
        self._refused: dict[str, str] | None = None

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError("the model this anatomy describes is gone")
        return model

    @property
    def backbone(self) -> nn.Module:
        """The module that runs embeddings to final norm, without the head."""
        return self.model.get_submodule(self.structure.backbone)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.structure.blocks).children())

    @property
    def embed(self) -> nn.Module | None:
        return self._part(self.structure.embed)

    @property
    def final_norm(self) -> nn.Module | None:
        return self._part(self.structure.final_norm)

    @property
    def head(self) -> nn.Module | None:
        return self._part(self.structure.head)

    @property
    def forms(self) -> tuple[BlockForm, ...]:
        """The block forms whose modules these blocks have, most specific first."""
        return self._forms

    def current(self) -> bool:
        """Whether the model still has the blocks that were described."""
        try:
            children = descend(self.model, self._list_names)._modules.values()
        except KeyError:
            return False
        return len(children) == len(self._block_refs) and all(
            r() is m for r, m in zip(self._block_refs, children, strict=True)
        )

    def sites(self) -> list[Site]:
        """Every complete site this model has, in the order of a forward pass. After `verify`, without those refused."""
        names = [name for name in _BLOCK_SITES if self._why_not(name) is None]
        found = [Site("embed")]
        found += [Site(name, layer) for layer in range(self.n_layers) for name in names]
        found += [Site(name) for name in ("final_norm", "logits") if self._why_not(name) is None]
        return found

    def require(self, site: Site) -> None:
        """Raise `SiteUnavailableError` (or `LayerRangeError`) when this model has no such site."""
        if not site.complete:
            raise SiteUnavailableError(f"site {str(site)!r} needs a layer: write '{site}.0', or give layers=")
        if site.layer is not None and not -self.n_layers <= site.layer < self.n_layers:
            raise LayerRangeError(
                f"site {str(site)!r} is out of range: the model has {self.n_layers} layers (0 to {self.n_layers - 1})"
            )
        if site.stack is not None:
            raise SiteUnavailableError(
                f"site {str(site)!r}: {self._name()} has one stack of blocks, write the site without {site.stack!r}"
            )
        why = self._why_not(site.name)
        if why is not None:
            error = AdditivityError if self._refused and site.name in self._refused else SiteUnavailableError
            raise error(self._refusal(site.name, why))

    def read_point(self, site: Site) -> ReadPoint:
        """Where `site` is read. Raises `SiteUnavailableError` when the model has no such site and `AdditivityError`
        when its identity does not hold; both say why and what there is."""
        known = self._read_points.get(site)
        if known is None:
            if site.name in _BRANCHES:
                self.verify()
            self.require(site)
            form = self._form if self._refused is not None else (self.forms[0] if self.forms else None)
            point = self.point_of(site, form)
            if self._refused is not None:
                names = tuple(point.path.split(".")) if point.path else ()
                self._read_points[site] = names, point.path, point.side, point.extract
            return point
        names, path, side, extract = known
        return ReadPoint(descend(self.model, names), path, side, extract)

    def points(self, sites: str | Site | Sequence[str | Site], layers: Any = None) -> dict[Site, ReadPoint]:
        """`expand_sites` and `read_point` in one, each site held against its identity. Raises what they raise."""
        key = (sites if isinstance(sites, (str, Site)) else tuple(sites)), repr(layers)
        wanted = self._expanded.get(key)
        if wanted is None:
            wanted = expand_sites(self, sites, layers)
            refused = self.verify()
            for site in wanted:
                if site.name in refused:
                    raise AdditivityError(self._refusal(site.name, refused[site.name]))
            self._expanded[key] = wanted
        return {site: self.read_point(site) for site in wanted}

    def point_of(self, site: Site, form: BlockForm | None) -> ReadPoint:
        """`read_point` under one claimed block form, with no check; used by the check itself."""
        name = site.name
        if name == "logits":
            return ReadPoint(self.model, "", "output", _logits)
        if name == "final_norm":
            assert self.structure.final_norm is not None
            return self._point(self.structure.final_norm, "output", first_tensor)
        layer = 0 if name == "embed" else (site.layer or 0) % self.n_layers
        path = self.block_paths[layer]
        if name in ("embed", "resid_pre"):
            return self._point(path, "input", first_input)
        if name == "resid_post":
            return self._point(path, "output", first_tensor)
        assert form is not None
        if name == "resid_mid":
            return self._point(
                f"{path}.{_present(self.model.get_submodule(path), form.resid_mid)}", "input", first_input
            )
        part = form.attn_out if name == "attn_out" else form.mlp_out
        extract: Callable[[Any], Tensor] = first_tensor
        if form.scale is not None:
            extract = _Scaled(float(getattr(text_config(self.model), form.scale)))
        return self._point(f"{path}.{_present(self.model.get_submodule(path), part)}", "output", extract)

    def verify(self) -> dict[str, str]:
        """Run the identity check if it has not been run on this model: one short forward pass.

        Returns the site names that are refused, with the reason (empty when all identities hold).
        """
        if self._refused is None:
            from actcache.model.identities import check

            # Two passes at once on one model would read each other's values.
            with _checking:
                if self._refused is None:
                    self._form, self._refused = check(self)
        return self._refused

    def _why_not(self, name: str) -> str | None:
        """Why this model has no such site, or None when it has."""
        if self._refused is not None and name in self._refused:
            return self._refused[name]
        if name == "final_norm" and self.structure.final_norm is None:
            return "no final norm was found beside its blocks"
        if name == "logits" and self.structure.head is None:
            return "it has no language-model head (load it with AutoModelForCausalLM)"
        if name in ("attn_out", "mlp_out") and not self.forms:
            return "its blocks have no attention and MLP modules under a known name"
        if name == "resid_mid":
            form = self._form or (self.forms[0] if self.forms else None)
            if form is None or form.kind == "parallel":
                return (
                    "its attention and MLP run in parallel on the same stream, there is nothing in between"
                    if form
                    else ("its blocks have no attention and MLP modules under a known name")
                )
        if name not in _READ:
            return "it is not among the values that are read on this architecture"
        return None

    def _refusal(self, name: str, why: str) -> str:
        have = ", ".join(name for name in _READ if self._why_not(name) is None)
        return f"site {name!r} is not available on {self._name()}: {why}. It has {have}."

    def _name(self) -> str:
        return type(self.model).__name__

    def _part(self, path: str | None) -> nn.Module | None:
        return None if path is None else self.model.get_submodule(path)

    def _point(self, path: str, side: Side, extract: Callable[[Any], Tensor]) -> ReadPoint:
        return ReadPoint(self.model.get_submodule(path), path, side, extract)


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

    `sites`: only those are required to hold; None requires everything that the anatomy claims. Raises
    `AdditivityError` naming block, identity and the size of the error. The model is left as it was.
    """
    anatomy = describe(model)
    refused = anatomy.verify()
    named = refused if sites is None else [(Site.parse(s) if isinstance(s, str) else s).name for s in sites]
    for name in named:
        if name in refused:
            raise AdditivityError(anatomy._refusal(name, refused[name]))


def original(model: nn.Module) -> nn.Module:
    """The module behind a `torch.compile` wrapper; `model` itself otherwise."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else model


def first_tensor(output: Any) -> Tensor:
    """The hidden-state tensor of what a module returned: blocks and attention return it bare or first in a tuple,
    depending on the version of transformers."""
    while not isinstance(output, Tensor):
        if isinstance(output, dict):
            output = next(iter(output.values()))
        else:
            output = output[0]
    return output


def first_input(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """The hidden-state tensor a module was called with: its first tensor argument, positional or by keyword."""
    args, kwargs = call
    if args and isinstance(args[0], Tensor):
        return args[0]
    if "hidden_states" in kwargs:
        hidden = kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        return hidden
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    # return_dict=False: the loss, when there is one, comes first and has no dimensions.
    return next(value for value in output if isinstance(value, Tensor) and value.ndim > 1)


class _Scaled:
    """A branch output times the factor with which it joins the stream."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, output: Any) -> Tensor:
        return first_tensor(output) * self.factor


def _matching_forms(blocks: list[nn.Module]) -> tuple[BlockForm, ...]:
    return tuple(
        form
        for form in BLOCK_FORMS
        if all(
            _present(block, part) is not None
            for block in blocks
            for part in (form.attn_out, form.mlp_out, *((form.resid_mid,) if form.kind == "sequential" else ()))
        )
    )


def _present(block: nn.Module, paths: tuple[str, ...]) -> str | None:
    """The first of `paths` that is a module of `block`."""
    for path in paths:
        try:
            block.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None

"""What is stored for one prompt, variant by variant: `CachedPromptInfo`, `CachedVariant`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actcache.errors import NotCachedError, did_you_mean, nearest
from actcache.store.nearby import where_nothing_is
from actcache.store.records import DERIVED, TOKENS
from actcache.store.site_names import Sites, in_order, layers_of, logits_of
from actcache.store.spaces import SpaceInfo
from actcache.store.variants import edit_text, variant_names

if TYPE_CHECKING:
    from actcache.store.inspection import Inspection


@dataclass(frozen=True)
class CachedVariant:
    """One variant of a model that holds a prompt.

    Attributes:
        space: the id of its space, for `Store.read`, `invalidate_extraction_cache(space=)`, ``--space``.
        revision, dtype, attn_implementation: of the model that was run; None where that is not known.
        variant: what tells it from the other variants of the model, in words.
        edits: the ready-made edits it was run with, in words; none for the model as it is.
        imported: where it comes from when only its name is known.
        pulled: the dataset and commit that it was pulled from; `sites` are then also those that can be fetched.
        num_prompts, size_bytes: how many prompts it holds, and bytes on disk of all of them.
        sites: what it holds of this prompt: sites by layout ("tokens" or the pooling).
        layers: the layers of these sites.
        num_tokens: of the prompt; None where unknown.
    """

    space: str
    revision: str | None
    dtype: str | None
    variant: str
    num_prompts: int
    size_bytes: int
    sites: dict[str, list[str]]
    layers: list[int]
    num_tokens: int | None
    attn_implementation: str | None = None
    edits: list[str] = field(default_factory=list)
    imported: str | None = None
    pulled: str | None = None


@dataclass(frozen=True)
class CachedPromptInfo:
    """What is stored for one prompt.

    Attributes:
        raw_layers: layers whose residual stream is there for every token.
        pooled: pooling -> layers whose residual stream is there.
        sites: every stored site by layout ("tokens" or the pooling).
        num_tokens: of the prompt, None where unknown.
        variants: every variant of that model that holds it: the model as it is, then what was pulled, then what was
            imported, then what was computed with edits, of these the newest first. The other fields describe the first
            of them; where only variants with edits hold the prompt, and none was asked for by its space, they are
            empty, since that is not what the model gives.
        has_logits: whether all logits are there, of some positions: then `UnifiedCache.get_logits` answers any `top_k`.
        logits_top_k: the largest k of which the k largest logits are there; None where there are none.
        logits_positions: the positions for which either is there: "all", "last".
        has_perplexity, has_token_perplexity: whether `get_perplexity` and `get_token_perplexity` need no model.
        router_layers: layers whose router's logits are there.
    """

    raw_layers: list[int]
    pooled: dict[str, list[int]]
    sites: dict[str, list[str]]
    num_tokens: int | None
    variants: list[CachedVariant]
    has_logits: bool = False
    logits_top_k: int | None = None
    has_perplexity: bool = False
    has_token_perplexity: bool = False
    router_layers: list[int] = field(default_factory=list)
    logits_positions: list[str] = field(default_factory=list)

    @property
    def all_sites(self) -> list[str]:
        """Every site that any of `variants` holds of this prompt, in any layout."""
        return in_order({site for variant in self.variants for sites in variant.sites.values() for site in sites})


def variant_of(space: SpaceInfo, name: str, sites: Sites, tokens: int | None) -> CachedVariant:
    """What the variant `space` holds of a prompt."""
    return CachedVariant(
        space.space, space.revision, space.dtype, name, space.num_prompts, space.size_bytes,
        {layout: in_order(names) for layout, names in sorted(sites.items())},
        layers_of({site for names in sites.values() for site in names}), tokens, space.attn_implementation,
        [edit_text(e) for e in space.edits], space.imported, space.pulled,
    )  # fmt: skip


def prompt_info(sites: Sites, tokens: int | None, variants: list[CachedVariant]) -> CachedPromptInfo:
    """The answer of `discover` from the sites, by layout, of the variant that is described."""
    logits = logits_of(sites)
    return CachedPromptInfo(
        raw_layers=layers_of(sites.get(TOKENS, ()), "resid_post"),
        pooled={
            layout: layers
            for layout, names in sorted(sites.items())
            if layout != TOKENS and (layers := layers_of(names, "resid_post"))
        },
        sites={layout: in_order(names) for layout, names in sorted(sites.items())},
        num_tokens=tokens,
        variants=variants,
        has_logits=any(None in held for held in logits.values()),
        logits_top_k=max((k for held in logits.values() for k in held if k is not None), default=None),
        has_perplexity="perplexity" in sites.get(DERIVED, ()),
        has_token_perplexity="token_nll" in sites.get(TOKENS, ()),
        router_layers=layers_of({s for names in sites.values() for s in names}, "router_logits"),
        logits_positions=sorted(logits),
    )


def agreeing(
    named: Sequence[SpaceInfo], name: str, *, revision: str | None, dtype: str | None, space: str | None
) -> list[SpaceInfo]:
    """Those of the variants `named` of model `name` that agree with what is given.

    Raises:
        NotCachedError: none does; with all there are, and the nearest value.
    """
    wanted = {"revision": revision, "dtype": dtype, "space": space}
    given = {key: value for key, value in wanted.items() if value is not None}
    agree = [s for s in named if all(getattr(s, key) == value for key, value in given.items())]
    if agree or not named:
        return agree
    near = [
        f"{key}={found[0]!r}"
        for key, value in given.items()
        if value not in (known := {str(getattr(s, key)) for s in named}) and (found := nearest(str(value), known))
    ]
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise NotCachedError(f"no variant of {name!r} has {_said(given)}.{hint} Stored: {listed(named)}.")


def none_of_that_name(name: str, spaces: Sequence[SpaceInfo], store: Inspection) -> NotCachedError:
    """What to raise where `store`, which holds `spaces`, has nothing of a model of that name."""
    if not spaces:
        return NotCachedError(f"nothing is stored for {name!r}{where_nothing_is(store)}. The store is empty.")
    names = sorted({s.model_name for s in spaces})
    known = f" Stored: {', '.join(names)}."
    brought = sorted({s.model_name for s in spaces if s.pulled or s.imported})
    if brought:
        known += (
            " What was pulled or imported is called as it was where it comes from: ask for it by that name, as "
            f"`actcache show {brought[0]} PROMPT` does."
        )
    return NotCachedError(f"nothing is stored for {name!r}.{did_you_mean(name, names)}{known}")


def _said(given: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in given.items())


def listed(spaces: Sequence[SpaceInfo], names: Mapping[str, str] | None = None) -> str:
    """Variants of a model in one line, to choose one from."""
    told = variant_names(spaces) if names is None else names
    return "; ".join(
        f"space={s.space!r} (revision {s.revision}, {told[s.space]}, {s.num_prompts} prompts)" for s in spaces
    )

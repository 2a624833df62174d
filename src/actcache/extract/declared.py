"""The edits of an extraction: ready-made ones, which are part of what its values are stored under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actcache.errors import LayerRangeError, OptionError, PromptError, SiteUnavailableError
from actcache.model.sites import Site, resolve_layers

if TYPE_CHECKING:
    from actcache.capture.ready_made import ReadyMade
    from actcache.extract.prompts import PromptList
    from actcache.model.head import Head
    from actcache.model.source import ModelSource


def declared_edits(edits: Any, source: ModelSource) -> tuple[ReadyMade, ...]:
    """`edits` with layers counted from the front and with tensors of their own, which nobody can change.

    Raises:
        OptionError: a function, or an edit that belongs to certain prompts.
        SiteUnavailableError, LayerRangeError: a site the model does not have.
    """
    if edits is None or (isinstance(edits, (list, tuple)) and not edits):
        return ()
    from actcache.capture.ready_made import ReadyMade

    given = edits.values() if isinstance(edits, Mapping) else edits
    listed = list(given) if isinstance(edits, (Mapping, list, tuple)) else [edits]
    for edit in listed:
        if not isinstance(edit, ReadyMade):
            raise OptionError(
                f"edits holds a {type(edit).__name__}, which cannot be told from another one that does something else, "
                "so that its values cannot be stored: use ac.ablate, ac.steer, ac.patch and ac.knockout here, or run "
                "the model yourself in an ac.edit block (ac.run_with_cache)."
            )
        if edit.of_prompts is not None:
            raise OptionError(
                f"the edit of {edit.target!r} cannot be used for an extraction, since {edit.of_prompts}, and batches "
                "hold prompts in an order of their own: give it one vector, or one row for each position."
            )
    if isinstance(edits, Mapping):
        raise OptionError("edits is a mapping: give ready-made edits as a list, they know their targets.")
    return tuple(_completed(edit.snapshot(), source) for edit in listed)


def check_edited(prompts: PromptList, indices: Sequence[int], edits: Sequence[ReadyMade]) -> None:
    """Raise `PromptError` for a prompt that has no such positions as an edit acts at, before any is run."""
    for edit in edits:
        for i in indices:
            ids = prompts.ids[i]
            assert ids is not None, "tokenize() comes first"
            try:
                edit.check_length(len(ids))
            except (LayerRangeError, OptionError) as error:
                raise PromptError(
                    f"prompt {i} has {len(ids)} tokens, and the edit of {edit.target!r} does not fit it: {error}. "
                    "Remove it, or choose other positions."
                ) from error


def refuse_edits_behind(edits: Sequence[ReadyMade], head: Head, *, normalised: bool) -> None:
    """Raise `OptionError` for an edit of what follows the rows from which logits are computed, the stream behind the
    last block or with `normalised` what the final norm returned: the head is run without it."""
    paths = [step.path for step in head.way.steps]
    sites = {"", "logits"} if normalised else {"", "logits", "final_norm", "decoder.final_norm"}
    for edit in edits:
        around = any(path.startswith(f"{edit.target}.") for path in paths)
        inside = any(f"{edit.target}.".startswith(f"{path}.") for path in (paths[1:] if normalised else paths))
        if edit.target in sites or around or inside:
            raise OptionError(
                f"the edit of {edit.target!r} changes logits behind what they are computed from here: "
                "compute_perplexity=False (and cache_logits=False) stores what else it changes."
            )


def _completed(edit: ReadyMade, source: ModelSource) -> ReadyMade:
    from actcache.capture.knockout import Knockout

    if isinstance(edit, Knockout):
        source.require_stack(edit.stack, "pattern.0")
        return edit.with_layers(source.depth(edit.stack))
    return replace(edit, target=_complete(edit.target, source))


def _complete(target: str, source: ModelSource) -> str:
    if not Site.looks_like(target):
        return target
    site = Site.parse(target)
    if not site.complete:
        raise SiteUnavailableError(f"site {str(site)!r} needs a layer: edit '{site}.0', one entry for each layer")
    if site.name == "logits":
        return str(site)
    source.require_stack(site.stack, str(replace(site, stack=None)))
    if site.layer is None:
        return str(site)
    return str(replace(site, layer=resolve_layers(site.layer, source.depth(site.stack))[0]))

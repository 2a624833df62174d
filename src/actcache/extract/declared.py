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
                "so that its values cannot be stored: use ac.ablate, ac.steer and ac.patch here, or run the model "
                "yourself in an ac.edit block (ac.run_with_cache)."
            )
        if edit.of_prompts is not None:
            raise OptionError(
                f"the edit of {edit.target!r} cannot be used for an extraction, since {edit.of_prompts}, and batches "
                "hold prompts in an order of their own: give it one vector, or one row for each position."
            )
    if isinstance(edits, Mapping):
        raise OptionError("edits is a mapping: give ready-made edits as a list, they know their targets.")
    return tuple(replace(edit.snapshot(), target=_complete(edit.target, source)) for edit in listed)


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

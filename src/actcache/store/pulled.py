"""What was pulled from datasets: which of its prompts may answer for a model, and their rows, fetched when read.

A dataset at one commit is a space of its own. Where its prompts are there are records of the layout `PULLED`: for each
site ``pulled.<site>`` the row of the prompt in the dataset's index. Vectors that were fetched lie beside them as any
others do, and go as they do; what is gone is fetched again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import NotCachedError
from actcache.store.keys import Ints
from actcache.store.prompts import IDS, PromptTable
from actcache.store.records import PULLED, TOKENS
from actcache.store.spaces import SpaceInfo, list_spaces
from actcache.store.variants import by_preference

if TYPE_CHECKING:
    from actcache.store.placement import Placement
    from actcache.store.store import Store

PROMPT, TRUSTED = f"{PULLED}.:prompt", f"{PULLED}.:trusted"
"""The sites of all prompts of a dataset that were pulled, and of those that answer for any model of that name. No site
of a dataset can be called so."""
CONTEXT = "pulled"
"""The text context of prompts whose tokenizer is not known."""
# It stands above this room, and is loaded when something is to be fetched.
_FETCHER = "actcache.share.fetching"
_SINGLE = ("last_token", "first_token")
_ATTEMPTS = 3


@dataclass(frozen=True)
class Pulled:
    """A space that was pulled, and may answer.

    Attributes:
        forms: of each kind of sites ("resid_post", "logits.top5", "perplexity") the layout in which the dataset has it;
            where those of a kind differ, of each site ("resid_post.5").
        contexts: the text contexts of its prompts.
        only_trusted: whether of its prompts only those count that were pulled with ``trust_names=True``.
    """

    info: SpaceInfo
    forms: Mapping[str, str] = field(repr=False)
    contexts: Sequence[str] = field(repr=False)
    only_trusted: bool = False

    def form(self, site: str) -> str | None:
        """The layout in which the dataset has a site; None where it has none of that kind."""
        return form_of(self.forms, site)

    def offers(self, sites: Sequence[str], layout: str) -> bool:
        """Whether the dataset can have all `sites` in `layout`: as it is, or one row out of full sequences."""
        taken = (layout, TOKENS) if layout in _SINGLE else (layout,)
        return all(self.form(site) in taken for site in sites)


def kind_of(site: str) -> str:
    """What sites are called without their layer: "resid_post" of "resid_post.5", "logits.top5" of its columns."""
    name, _, last = site.rpartition(".")
    if last in ("values", "indices"):
        return name
    # One head of a layer is of a kind of its own.
    return name if name and last.isdigit() and not name.rpartition(".")[2].isdigit() else site


def form_of(forms: Mapping[str, str], site: str) -> str | None:
    """The layout of a site among `forms` (see `Pulled`)."""
    return forms.get(site) or forms.get(kind_of(site))


def forms_of(info: SpaceInfo) -> dict[str, str]:
    """What the description of a pulled space says of its kinds of sites; empty where it says nothing."""
    said = info.label.get("pulled")
    found = said.get("forms") if isinstance(said, Mapping) else None
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def expanded(info: SpaceInfo, sites: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Sites by layout, where those that are registered stand in the layouts in which they can be read."""
    found = {layout: set(names) for layout, names in sites.items() if layout != PULLED}
    forms = forms_of(info)
    for name in sites.get(PULLED, ()):
        site = name.removeprefix(f"{PULLED}.")
        layout = form_of(forms, site)
        if layout is not None:
            found.setdefault(layout, set()).add(site)
    return found


def pulled_for(
    root: Path, contexts: Callable[[str], Sequence[str]], space: str, model_name: str, *, names: Sequence[str] | None
) -> list[Pulled]:
    """The pulled spaces that may answer for the model of `space`: first those of just that identity, then, of datasets
    that claim the name alone, the newest first.

    `names`: what the model is trusted to be called in datasets; of its own name `model_name` what was pulled with
    ``trust_names=True`` counts besides. None: no name counts.
    """
    same, named = [], []
    for info in by_preference([one for one in list_spaces(root) if one.pulled]):
        said = info.label.get("pulled")
        said = said if isinstance(said, Mapping) else {}
        if said.get("claims") == space:
            same.append(Pulled(info, forms_of(info), contexts(info.space)))
        # What edits made of a model is no answer for the model that has its name.
        elif names is not None and info.model_name in (*names, model_name) and said.get("as_it_is", True):
            named.append(Pulled(info, forms_of(info), contexts(info.space), info.model_name not in names))
    return same + named


def registered(
    store: Store, pulled: Pulled, sites: Sequence[str], table: PromptTable, at: Ints
) -> Iterator[tuple[PromptTable, Ints]]:
    """Which of the prompts `table` (whose token ids are known; it has its own numbers `at` with whoever asks) are in
    the dataset with all `sites`: as they are registered, and their numbers.

    A dataset may know the text of a prompt and not its token ids: then the text must do, and the number of rows.
    """
    wanted = [PROMPT, *(f"{PULLED}.{site}" for site in sites), *([TRUSTED] if pulled.only_trusted else [])]
    space = pulled.info.space
    placement = store.locate(space, table=table, sites=wanted, layout=PULLED)
    hit = np.flatnonzero(placement.found)
    if len(hit):
        yield placement.prompts(hit), at[hit]
    left = np.flatnonzero(~placement.found & (table.kind != IDS))
    whole = any(pulled.form(site) == TOKENS for site in sites)
    texts = table.texts
    for context in pulled.contexts:
        if not len(left):
            return
        placement = store.locate(
            space, texts=[texts[i] or "" for i in left.tolist()], kinds=table.kind[left], text_context=context,
            sites=wanted, layout=PULLED,
        )  # fmt: skip
        hit = np.flatnonzero(placement.found)
        known = placement.prompts(hit)
        lengths = table.lengths[left[hit]]
        # Other ids than ours are of another tokenizer; negative ones stand for ids that nobody knew.
        fits = known.token_ids[known.token_offset[:-1]] < 0
        if whole:
            fits &= known.lengths == lengths
        if fits.any():
            yield known.select(fits), at[left[hit[fits]]]
        left = np.delete(left, hit[fits])


def fetched(store: Store, info: SpaceInfo, table: PromptTable, sites: Sequence[str], layout: str) -> Placement:
    """Where the rows of registered prompts are, fetched where they are not here yet.

    Raises what reading the dataset raises; NotCachedError where something takes them out as fast as they come.
    """
    for _ in range(_ATTEMPTS):
        importlib.import_module(_FETCHER).fetch(store, info, table, sites, layout)
        placement = store.locate(info.space, table=table, sites=sites, layout=layout)
        if placement.found.all():
            return placement
    raise NotCachedError(
        f"{int((~placement.found).sum())} of {len(table)} prompts of {info.pulled} were fetched and are gone again: "
        f"is the limit of the store {store.location} too small for what is read at once?"
    )


def bring(store: Any, pulled: Pulled, prompts: Any, site: str, layout: str) -> None:
    """Fetch what is registered and not here of `prompts` (as `Store.read` takes them; None: all) at a site."""
    if not pulled.offers([site], layout):
        return
    info, name = pulled.info, f"{PULLED}.{site}"
    if prompts is None:
        table = store.prompts(info, site=name, layout=PULLED)
    else:
        tables = []
        for placement, found in _located(store, info, prompts, name):
            tables.append(placement.prompts(np.unique(found)))
        table = PromptTable.concatenate(tables, mixed=True)
    if len(table):
        fetched(store, info, table, [site], layout)


def _located(store: Store, info: SpaceInfo, prompts: Any, name: str) -> Iterator[tuple[Placement, Ints]]:
    """Where `prompts` are registered, and which of them are."""
    if isinstance(prompts, PromptTable):
        placement = store.locate(info.space, table=prompts, sites=[name], layout=PULLED)
        yield placement, np.flatnonzero(placement.found)
        return
    located = store.locate_sites(info, [prompts] if isinstance(prompts, str) else list(prompts), [name], PULLED)
    for number, placement in enumerate(located.placements):
        yield placement, located.local[(located.owner == number) & located.found[:, 0]]

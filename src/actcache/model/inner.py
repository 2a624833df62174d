"""Where the values inside attention and MLP are read, found when the first of them is asked for.

Each block is run once more on a few tokens, with everything that its modules are given and return; what is found in it
is found by its values, as the branches of the residual stream are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from actcache.errors import LayerRangeError
from actcache.model.attention_probe import Roles, Subject, find_roles
from actcache.model.attention_readings import SITES as ATTENTION
from actcache.model.attention_readings import attention_readings, subject_of, without_heads
from actcache.model.attention_sites import Seen, find_attention
from actcache.model.forms import BlockForm
from actcache.model.implementation import holding_probabilities
from actcache.model.mlp_sites import expert_counts, find_mlp_sites
from actcache.model.probabilities import Probabilities, Telling
from actcache.model.probe import probe_inputs, undisturbed
from actcache.model.read_points import ReadPoint
from actcache.model.readings import Found
from actcache.model.runs import BlockWatch, InsideRun
from actcache.model.sites import Site
from actcache.model.structure import text_config, unwrapped

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy

# The sites that are found here.
MLP = ("mlp_in", "router_logits", "mlp_act")
INNER = (*ATTENTION, *MLP)
Key = tuple[str | None, int]


@dataclass
class Inner:
    """What was found inside each block, by stack and layer.

    `blocks` hold for each site either how it is read or why there is none.
    """

    blocks: dict[Key, Found] = field(default_factory=dict)

    def why_not(self, name: str, at: Key) -> str | None:
        """Why a block has no such site; None where it has."""
        here = self.blocks[at]
        if name in here.readings:
            return None
        stack = at[0]
        elsewhere = [
            number for (other, number), found in self.blocks.items() if other == stack and name in found.readings
        ]
        some = f"; blocks {', '.join(map(str, elsewhere))} have it" if elsewhere else ""
        return here.absent[name] + some

    def require_head(self, site: Site, at: Key) -> None:
        """Raise `LayerRangeError` for one head of a site that has fewer."""
        heads = self.blocks[at].readings[site.name].heads
        if site.head is not None and heads is not None and site.head >= heads:
            raise LayerRangeError(
                f"site {str(site)!r} is out of range: {str(replace(site, head=None))!r} has {heads} heads "
                f"(0 to {heads - 1})"
            )

    def read_point(self, site: Site, at: Key, module: nn.Module, path: str, block: nn.Module) -> ReadPoint:
        """Where `site` is read, which the block has; `module` is the one at its place, `path` the name of that."""
        return self.blocks[at].readings[site.name].point(module, path, block, site)


def find_inner(anatomy: Anatomy) -> Inner:
    """Run the model on a few tokens and find the inside of each block. The model is left as it was."""
    inner = Inner()
    experts = expert_counts(text_config(unwrapped(anatomy.model)))
    surveys: list[_Survey] = []
    for stack in anatomy.structure.stacks:
        for layer, block in enumerate(anatomy.blocks_of(stack.name)):
            form = anatomy.findings.forms.get((stack.name, layer))
            if form is None:
                why = anatomy.findings.refused.get(Site("mlp_out", stack=stack.name), "its block could not be checked")
                inner.blocks[stack.name, layer] = _nothing(why)
            else:
                surveys.append(_Survey((stack.name, layer), block, form, experts))
    if not surveys:
        return inner
    with holding_probabilities(anatomy.model), undisturbed(anatomy.model), torch.no_grad():
        try:
            with ExitStack() as hooks:
                for survey in surveys:
                    survey.watch.listen(hooks)
                hooks.enter_context(Probabilities(Telling(survey.watch.softmax for survey in surveys)))
                anatomy.backbone(**probe_inputs(anatomy))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            why = f"the model could not be run on a few token ids ({type(error).__name__}: {error})"
            inner.blocks |= {survey.at: _nothing(why) for survey in surveys}
            return inner
        inner.blocks |= _with_heads(anatomy, surveys)
    return inner


def _with_heads(anatomy: Anatomy, surveys: list[_Survey]) -> dict[Key, Found]:
    """What each block has. Of blocks that are alike one is looked at for what its projections return; the others' own
    run tells whether it is so in them."""
    subjects: dict[object, Subject] = {}
    alike: dict[Key, object] = {}
    for survey in surveys:
        if isinstance(survey.subject, Subject):
            one = survey.subject
            alike[survey.at] = type(one.block), one.attention, one.heads, one.width, one.widths
            subjects.setdefault(alike[survey.at], one)
    roles = dict(zip(subjects, _roles(anatomy, list(subjects.values())), strict=True)) if subjects else {}
    found = {}
    for survey in surveys:
        if isinstance(survey.seen, str):
            attention = Found({}, dict.fromkeys(ATTENTION, survey.seen))
        elif isinstance(survey.subject, str):
            attention = without_heads(survey.seen, survey.subject)
        else:
            with _unless_it_fails() as failed:
                attention = attention_readings(survey.seen, roles[alike[survey.at]])
            if failed:
                attention = without_heads(survey.seen, failed[0])
        mlp = survey.mlp
        found[survey.at] = Found({**attention.readings, **mlp.readings}, {**attention.absent, **mlp.absent})
    return found


def _roles(anatomy: Anatomy, subjects: list[Subject]) -> list[Roles]:
    """The roles of each; what goes wrong with one of them takes nothing from the others."""
    with _unless_it_fails() as failed:
        return find_roles(anatomy, subjects)
    if len(subjects) == 1:
        return [Roles.none(failed[0])]
    return [_roles(anatomy, [one])[0] for one in subjects]


@contextmanager
def _unless_it_fails() -> Iterator[list[str]]:
    """Tells of an error instead of raising it: a block of a kind that was not thought of lacks what is looked for in
    it, and no more."""
    told: list[str] = []
    try:
        yield told
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        told.append(f"looking for it failed ({type(error).__name__}: {error})")


class _Survey:
    """What is found in one block's run."""

    def __init__(self, at: Key, block: nn.Module, form: BlockForm, experts: frozenset[int]) -> None:
        self.at = at
        self.seen: Seen | str = "its block did not run in a short pass"
        self.subject: Subject | str = self.seen
        self.mlp = Found({}, dict.fromkeys(MLP, self.seen))
        self.watch = BlockWatch(block, self._ended)
        self._block = block
        self._form = form
        self._experts = experts

    def _ended(self, run: InsideRun) -> None:
        with _unless_it_fails() as failed:
            self.seen = find_attention(run, self._form)
            self.subject = self.seen if isinstance(self.seen, str) else subject_of(self._block, self.seen)
        if failed:
            self.seen = self.subject = failed[0]
        with _unless_it_fails() as failed:
            self.mlp = find_mlp_sites(run, self._form, self._experts)
        if failed:
            self.mlp = Found({}, dict.fromkeys(MLP, failed[0]))


def _nothing(why: str) -> Found:
    return Found({}, dict.fromkeys(INNER, why))

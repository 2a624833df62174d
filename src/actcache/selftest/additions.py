"""The identities of the residual stream, calculated again from what the prompts gave."""

from __future__ import annotations

import torch
from torch import Tensor

from actcache.model.forms import BlockForm, Step, deviation
from actcache.model.sites import Site
from actcache.model.structure import Stack
from actcache.selftest.subject import Subject


@torch.no_grad()
def check_additions(subject: Subject) -> None:
    """Blocks chain, branches add up, the final norm is that of the last block's output; on every prompt."""
    at = {name: torch.cat([alone.values[name] for alone in subject.alone]) for name in subject.sites}
    for stack in subject.anatomy.structure.stacks:
        last = stack.n_layers - 1
        for layer in range(stack.n_layers):
            here = _Block(subject, at, stack, layer)
            before = here.name("embed", None) if layer == 0 else here.name("resid_post", layer - 1)
            here.equal(before, here.name("resid_pre", layer))
            form = subject.anatomy.findings.forms.get((stack.name, layer))
            if form is not None:
                here.add_up(form)
        here = _Block(subject, at, stack, last)
        norm = subject.anatomy.findings.final_norms.get(stack.name)
        post, final = here.name("resid_post", last), here.name("final_norm", None)
        if norm is not None and post in at and final in at:
            here.close(final, _through(subject, norm, at[post]), f"final_norm = norm(resid_post.{last})", [final])


class _Block:
    """The identities of one block on the values `at` its sites, ``[rows, D]`` each."""

    def __init__(self, subject: Subject, at: dict[str, Tensor], stack: Stack, layer: int) -> None:
        self._subject = subject
        self._at = at
        self._stack = stack.name
        self._layer = layer
        self._path = stack.block_paths[layer]

    def name(self, site: str, layer: int | None) -> str:
        return str(Site(site, layer, stack=self._stack))

    def equal(self, one: str, other: str) -> None:
        """Two sites that are the same tensor."""
        if one in self._at and other in self._at:
            holds, error = deviation(self._at[other], [(self._at[one], 1.0)])
            self._note([other], f"{one} = {other}", holds, error)

    def add_up(self, form: BlockForm) -> None:
        """Every step of the block, from its input to its output."""
        names = {site: self.name(site, self._layer) for site in (*form.places(), "resid_pre", "resid_post")}
        if not all(name in self._at for name in names.values()):
            return
        stream = self._at[names["resid_pre"]]
        steps = list(form.identities())
        for number, (text, step) in enumerate(steps):
            branches = [names[branch] for branch, _ in step.branches]
            behind = {len(steps) - 1: "resid_post", len(steps) - 2: "resid_mid"}.get(number)
            stream = self._step(text, step, stream, branches, None if behind is None else names[behind])

    def _step(self, text: str, step: Step, stream: Tensor, branches: list[str], whole: str | None) -> Tensor:
        values = [self._at[name] for name in branches]
        total = stream
        for value in values:
            total = total + value
        if step.norm is not None:
            total = _through(self._subject, f"{self._path}.{step.norm.path}", total)
        if whole is None:
            return total
        if step.norm is not None:
            self.close(whole, total, text, [*branches, whole])
        else:
            holds, error = deviation(self._at[whole], [(stream, 1.0), *((value, 1.0) for value in values)])
            self._note([*branches, whole], text, holds, error)
        return self._at[whole]

    def close(self, whole: str, calculated: Tensor, text: str, sites: list[str]) -> None:
        """A site and what was calculated for it, behind a norm."""
        holds, error = deviation(self._at[whole], [(calculated, 1.0)])
        self._note(sites, text, holds or error <= self._subject.ledger.tolerance, error)

    def _note(self, sites: list[str], text: str, holds: bool, error: float) -> None:
        wrong = None if holds else f"{text} is off by {error:.2g} of the largest value"
        for site in sites:
            self._subject.ledger.note("identities", site, error, exact=error == 0, wrong=wrong)


def _through(subject: Subject, path: str, rows: Tensor) -> Tensor:
    """What the module at `path` makes of `rows` ``[rows, D]``."""
    module = subject.model.get_submodule(path)
    parameter = next(module.parameters(), None)
    device = rows.device if parameter is None or parameter.is_meta else parameter.device
    result: Tensor = module(rows.to(device))
    return result.cpu()

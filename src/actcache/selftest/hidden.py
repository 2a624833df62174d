"""What transformers itself returns as ``hidden_states``, and which sites these are.

There is no one convention. Most models give the input of every block, and last the output of the final norm. Mamba
gives every block's output under the block's own number, so that the embedding is missing. Models without a final norm
end with the last block's output, or with a projection of it that is no site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actcache.model.sites import Site
from actcache.selftest.ledger import row_errors, same
from actcache.selftest.subject import Subject

CHECK = "hidden states"
_NONE = "not recorded"


def check_alone(subject: Subject) -> None:
    """In one and the same pass, hidden states and the sites they are must be the same tensors."""
    found = [sites_of(subject, i) for i in range(len(subject.prompts))]
    if not any(found):
        subject.ledger.not_applicable(CHECK, "transformers records none for this architecture.")
    for i, states in enumerate(found):
        for name, state in states.items():
            ours = subject.alone[i].values[name]
            right = same(ours, state)
            error = 0.0 if right else float(row_errors(ours, state, subject.scales[i][name]).max())
            wrong = None if right else f"is not transformers' hidden state (off by {error:.2g}) on prompt {i}"
            subject.ledger.note(CHECK, name, error, wrong=wrong)


def check_extracted(subject: Subject, which: Sequence[int], ours: Sequence[Mapping[str, Tensor]]) -> None:
    """What was extracted of some prompts by themselves, ``[T, D]`` by site, against their hidden states."""
    states = [sites_of(subject, i) for i in which]
    for name in states[0]:
        subject.ledger.compare(
            CHECK,
            name,
            torch.cat([rows[name] for rows in ours]),
            torch.cat([state[name] for state in states]),
            torch.cat([subject.scales[i][name] for i in which]),
            prompts=[i for i, rows in zip(which, ours, strict=True) for _ in range(len(rows[name]))],
        )


def sites_of(subject: Subject, i: int) -> dict[str, Tensor]:
    """By site, the hidden state ``[T, D]`` of prompt `i` that is the same value, where there is one."""
    found: dict[str, Tensor] = {}
    for stack in subject.anatomy.stacks:
        states = subject.alone[i].hidden_states.get(stack or "", [])
        for site, state in zip(convention(subject, stack)[0], states, strict=False):
            if site is not None and str(site) in subject.sites:
                found[str(site)] = state
    return found


def convention(subject: Subject, stack: str | None) -> tuple[list[Site | None], str]:
    """Which site each hidden state of a stack is (None: no site), and that in words."""
    depth = subject.anatomy.depth(stack)
    states = subject.alone[0].hidden_states.get(stack or "", [])
    values = subject.alone[0].values
    tokens, width = len(subject.prompts[0]), subject.anatomy.d_model
    if len(states) != depth + 1:
        return [], _NONE
    if any(state.shape != (tokens, width) for state in states[:-1]):
        return [], f"{_NONE} in the shape of the stream"

    def is_state(site: str, layer: int) -> bool:
        value = values.get(str(Site(site, layer, stack=stack)))
        return value is not None and same(value, states[layer])

    # The first layer that is read tells the convention; the others are held against it.
    layers = [site.layer for site in subject.sites.values() if site.stack == stack and site.layer is not None]
    read = min(layers, default=0)
    after = is_state("resid_post", read) and not is_state("resid_pre", read)
    first: list[Site | None] = [
        Site("resid_post" if after else "resid_pre", layer, stack=stack) for layer in range(depth)
    ]
    begins = "after each block" if after else "before each block"
    if states[-1].shape[-1] != width:
        return [*first, None], f"{begins}; the last is a projection"
    last, final = Site("resid_post", depth - 1, stack=stack), Site("final_norm", stack=stack)
    # Versions of transformers differ in what the last one is.
    raw = str(last) in values and same(values[str(last)], states[-1])
    if raw or subject.anatomy.findings.final_norms.get(stack) is None:
        return [*first, last], f"{begins}; the last after the last block"
    return [*first, final], f"{begins}; the last after the final norm"

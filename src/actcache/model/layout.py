"""Of what the residual stream of a model is the sum, block by block: plain data, which outlives the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from actcache.model.discovery import named_norm

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy


class Block(NamedTuple):
    """One block.

    Attributes:
        kind: "sequential", "parallel", "post-norm" or "mixer"; empty where it was not made out.
        branches: the names of the sites that it adds to the stream, in order.
        head_factor: the number by which attention's output is multiplied before it joins the stream; None where a norm
            stands in between (or there is no attention).
    """

    kind: str
    branches: tuple[str, ...]
    head_factor: float | None


# By stack.
Layouts = dict[str | None, tuple[Block, ...]]


def layouts(anatomy: Anatomy) -> Layouts:
    """The blocks of every stack; the identity check runs when it has not."""
    if anatomy.layouts is None:
        anatomy.layouts = _layouts(anatomy)
    return anatomy.layouts


def known_layouts(anatomy: Anatomy) -> Layouts:
    """The same without a pass: empty as long as the identity check has not been made."""
    return layouts(anatomy) if anatomy.checked else {}


def _layouts(anatomy: Anatomy) -> Layouts:
    forms = anatomy.findings.forms

    def block(stack: str | None, layer: int) -> Block:
        form = forms.get((stack, layer))
        if form is None:
            return Block("", (), None)
        place = form.places().get("attn_out")
        factor = None
        if place is not None:
            module = anatomy.blocks_of(stack)[layer].get_submodule(place.path)
            factor = None if named_norm(type(module).__name__) else place.scale
        return Block(form.kind, tuple(name for step in form.steps for name, _ in step.branches), factor)

    return {stack: tuple(block(stack, layer) for layer in range(anatomy.depth(stack))) for stack in anatomy.stacks}

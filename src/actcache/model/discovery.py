"""Find how the residual stream runs through a block, by looking for values that add up in one run of it.

No table of names: a branch is a module whose output, added to the stream, gives what a later module was called with,
or what the block returned. Names decide one thing only: whether the branch that mixes positions is attention, or a
mixer of another kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from actcache.model.forms import BlockForm, BlockRun, Call, Kind, Place, Step, check_form, deviation

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_CROSS = re.compile("cross|enc.*att", re.IGNORECASE)
_NORM = re.compile("norm", re.IGNORECASE)
# They return what they were given: the module before them is what computes.
_PASSES_ON = re.compile("dropout|droppath|identity", re.IGNORECASE)
_SAMPLE = 64


def find_form(run: BlockRun, factors: Iterable[float]) -> tuple[BlockForm | None, str]:
    """The form of the block that ran, or None and what was found on the way.

    `factors`: numbers of the block and its config by which a branch may be multiplied before it joins the stream;
    they are tried when nothing adds up without one.
    """
    search = _Search(run)
    tried = [1.0, *(f for f in factors if 1e-3 < abs(f) < 1e3 and f != 1.0)]
    for factor in dict.fromkeys(tried):
        for forms in (search.sequential, search.parallel, search.post_norm, search.mixer):
            best = min(forms(factor), key=lambda found: found[0], default=None)
            if best is not None and check_form(best[1], run)[1] is None:
                return best[1], ""
    return None, search.progress


Ranked = tuple[tuple[int, int, int, float], BlockForm]


class _Search:
    """One run of a block, prepared for looking up sums."""

    def __init__(self, run: BlockRun) -> None:
        self.run = run
        self.progress = "nothing that its modules return adds up to what the block adds to the stream"
        calls = [call for call in run.calls if call.runs == 1]
        self.outputs = [c for c in calls if c.output is not None and not _PASSES_ON.search(c.kind)]
        self.inputs = [c for c in calls if c.input is not None]
        self.norms = [c for c in self.inputs if c.output is not None and _NORM.search(c.kind)]
        step = max(1, run.pre.numel() // _SAMPLE)
        self._at = torch.arange(0, run.pre.numel(), step)
        tensors = [run.pre, run.post, *(t for c in calls for t in (c.input, c.output) if t is not None)]
        self._sampled = {id(t): t.reshape(-1)[self._at].double() for t in tensors}
        self._eps = max(torch.finfo(t.dtype).eps for t in tensors)

    def sequential(self, factor: float) -> Iterator[Ranked]:
        for attn, mid in self._steps(self.run.pre, -1, factor, self.inputs):
            if _CROSS.search(attn.path):
                continue
            name = "attn_out" if self._attends(attn) else "mixer_out"
            self.progress = f"resid_pre + {name} = resid_mid holds with {attn.path}, but nothing adds up from there"
            assert mid.input is not None
            first = Step(((name, _output(attn, factor)),), total=_input(mid))
            yield from self._ends("sequential", [first], [attn, mid], mid.input, mid.begun, factor)
            for cross, after in self._steps(mid.input, mid.begun, factor, self.inputs):
                if _CROSS.search(cross.path):
                    assert after.input is not None
                    second = Step((("cross_attn_out", _output(cross, factor)),), total=_input(after))
                    used = [attn, mid, cross, after]
                    yield from self._ends("sequential", [first, second], used, after.input, after.begun, factor)

    def _attends(self, branch: Call) -> bool:
        """Whether a branch is attention's: of a norm, the values it was given decide, whatever it is called."""
        if not _NORM.search(branch.kind):
            return _named_attention(branch)
        before = (call for call in self.outputs if call.ended < branch.begun)
        return any(_named_attention(call) for call in before if not _NORM.search(call.kind))

    def _ends(
        self, kind: Kind, steps: list[Step], used: list[Call], stream: Tensor, after: int, factor: float
    ) -> Iterator[Ranked]:
        for mlp in self._sums(stream, after, factor, self.run.post):
            if not _named_attention(mlp):
                last = Step((("mlp_out", _output(mlp, factor)),))
                yield self._ranked(BlockForm(kind, (*steps, last)), [*used, mlp])

    def parallel(self, factor: float) -> Iterator[Ranked]:
        for attn in self.outputs:
            if not _self_attention(attn):
                continue
            assert attn.output is not None
            stream = self.run.pre + attn.output * factor
            for mlp in self._sums(stream, -1, factor, self.run.post, parts=3):
                if _named_attention(mlp) or mlp.path.startswith(f"{attn.path}."):
                    continue
                branches = (("attn_out", _output(attn, factor)), ("mlp_out", _output(mlp, factor)))
                yield self._ranked(BlockForm("parallel", (Step(branches),)), [attn, mlp])

    def post_norm(self, factor: float) -> Iterator[Ranked]:
        for attn, norm in self._steps(self.run.pre, -1, factor, self.norms):
            if not _self_attention(attn):
                continue
            self.progress = f"resid_mid = norm(resid_pre + attn_out) holds with {attn.path}, but nothing from there"
            assert norm.output is not None
            first = Step((("attn_out", _output(attn, factor)),), total=_input(norm), norm=_output(norm))
            yield from self._post_norm_ends([first], [attn, norm], norm, factor)
            for cross, second_norm in self._steps(norm.output, norm.ended, factor, self.norms):
                if _CROSS.search(cross.path):
                    place = _output(cross, factor)
                    second = Step((("cross_attn_out", place),), total=_input(second_norm), norm=_output(second_norm))
                    used = [attn, norm, cross, second_norm]
                    yield from self._post_norm_ends([first, second], used, second_norm, factor)

    def _post_norm_ends(self, steps: list[Step], used: list[Call], norm: Call, factor: float) -> Iterator[Ranked]:
        assert norm.output is not None
        for mlp, last in self._steps(norm.output, norm.ended, factor, self.norms):
            assert last.output is not None
            if _named_attention(mlp) or not torch.equal(last.output, self.run.post):
                continue
            step = Step((("mlp_out", _output(mlp, factor)),), total=_input(last), norm=_output(last))
            form = BlockForm("post-norm", (*steps, step), self._given_to(norm, mlp))
            yield self._ranked(form, [*used, mlp, last])

    def _given_to(self, norm: Call, mlp: Call) -> Place | None:
        """Where the stream behind `norm` goes into the part that `mlp` ends. That is the place to read it: an attention
        to another model's states, which runs only when there are some, lies in between."""
        assert norm.output is not None
        given = [
            call
            for call in self.inputs
            if norm.ended < call.begun <= mlp.begun
            and call.input is not None
            and torch.equal(call.input, norm.output)
            and not _named_attention(call)
        ]
        first = min(given, key=lambda call: (call.path.count("."), call.begun), default=None)
        return None if first is None else _input(first)

    def mixer(self, factor: float) -> Iterator[Ranked]:
        for branch in self._sums(self.run.pre, -1, factor, self.run.post):
            form = BlockForm("mixer", (Step((("mixer_out", _output(branch, factor)),)),))
            yield self._ranked(form, [branch])

    def _steps(self, stream: Tensor, after: int, factor: float, targets: Sequence[Call]) -> Iterator[tuple[Call, Call]]:
        """Pairs (branch, later call) where ``stream + factor * branch`` is what the later call was given."""
        for target in targets:
            assert target.input is not None
            for branch in self._sums(stream, after, factor, target.input):
                if branch.ended < target.begun:
                    yield branch, target

    def _sums(self, stream: Tensor, after: int, factor: float, whole: Tensor, parts: int = 2) -> Iterator[Call]:
        """Calls that began after `after` and whose output times `factor`, added to `stream`, gives `whole`."""
        base, goal = self._sample(stream), self._sample(whole)
        for call in self.outputs:
            if call.begun <= after:
                continue
            assert call.output is not None
            branch = self._sample(call.output) * factor
            # Enough to rule out nearly everything; those left are held against the whole value.
            bound = parts * self._eps * (base.abs() + branch.abs() + goal.abs())
            if bool(((base + branch - goal).abs() > bound).any()):
                continue
            # The stream itself is "the stream plus nothing" only for a branch that is nothing.
            if torch.equal(stream, whole) and bool(call.output.any()):
                continue
            if parts > 2 or deviation(whole, [(stream, 1.0), (call.output, factor)])[0]:
                yield call

    def _sample(self, tensor: Tensor) -> Tensor:
        known = self._sampled.get(id(tensor))
        return tensor.reshape(-1)[self._at].double() if known is None else known

    def _ranked(self, form: BlockForm, used: list[Call]) -> Ranked:
        """The branches that ended last first, then the shallowest and earliest modules, then the smallest error.

        Of modules that give the same, the outermost ends last. Where a branch is too small to be seen in the stream
        (half precision, or zero), others seem to add up too, with errors that say nothing: what is added is what was
        computed right before."""
        branches = {place.path for step in form.steps for _, place in step.branches}
        ended = sum(call.ended for call in used if call.path in branches)
        begun = sum(call.begun for call in used if call.path not in branches)
        errors, _ = check_form(form, self.run)
        depth = sum(call.path.count(".") for call in used)
        return (-ended, depth, begun, sum(error for _, error in errors)), form


def named_attention(path: str, kind: str) -> bool:
    """Whether a module (its path in the block, the name of its class) is called attention."""
    return bool(_ATTENTION.search(path) or _ATTENTION.search(kind))


def named_norm(kind: str) -> bool:
    """Whether a class is called a norm."""
    return bool(_NORM.search(kind))


def passes_on(kind: str) -> bool:
    """Whether a module of this class returns what it is given, and computes nothing."""
    return bool(_PASSES_ON.search(kind))


def _named_attention(call: Call) -> bool:
    return named_attention(call.path, call.kind)


def _self_attention(call: Call) -> bool:
    return _named_attention(call) and not _CROSS.search(call.path)


def _output(call: Call, factor: float = 1.0) -> Place:
    return Place(call.path, "output", factor, "output" in call.flat)


def _input(call: Call) -> Place:
    return Place(call.path, "input", 1.0, "input" in call.flat)

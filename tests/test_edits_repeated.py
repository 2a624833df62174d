"""Edits of models that run blocks once more for their gradients: gradient checkpointing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import actcache as ac
from actcache.errors import EditError, MissedModuleError
from actcache.model.threads import thread_key, unseen
from actcache.testing.tiny import tiny_model
from edit_helpers import state

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
STEER = ac.steer("attn_out.2", torch.ones(32), positions=[0, "last"])
# None of them saves a tensor for its gradient, which torch would miss when the run is repeated.
EDITS: dict[str, Any] = {
    "doubled": {"resid_mid.1": lambda x: x * 2},
    "ablated": [ac.ablate("mlp_out.1")],
    "steered": [STEER],
    "head": [ac.ablate("head_out.1.2")],
    "knockout": [ac.knockout(1, from_positions=[-1], to_positions=[0])],
    "module": {"transformer.h.1.mlp": lambda x: x + 1},
}
both = pytest.mark.parametrize("reentrant", [False, True])


def training_model(**changes: Any) -> Any:
    model = tiny_model("gpt2", **changes).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def loss_of(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    loss: Tensor = model(ids, labels=ids, use_cache=False, **given).loss
    return loss


def gradients(model: Any, train: Callable[[], Any]) -> list[Tensor]:
    model.zero_grad()
    train()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def hold(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@both
@pytest.mark.parametrize("edit", EDITS)
def test_a_block_that_is_closed_too_early(edit: str, reentrant: bool) -> None:
    model = training_model()

    def inside() -> None:
        with ac.edit(model, EDITS[edit]):
            loss_of(model).backward()

    def behind() -> None:
        with ac.edit(model, EDITS[edit]):
            loss = loss_of(model)
        loss.backward()

    expected = gradients(model, inside)
    # Nothing is repeated: the graph holds what the edit made.
    hold(gradients(model, behind), expected)
    checkpointed(model, reentrant)
    before = state(model)
    with pytest.raises(EditError, match=r"gradient checkpointing.*closed.*Call backward\(\) inside the block"):
        behind()
    assert state(model) == before
    hold(gradients(model, inside), expected)


@both
def test_one_of_two_blocks_is_closed(reentrant: bool) -> None:
    model = checkpointed(training_model(), reentrant)
    with ac.edit(model, EDITS["doubled"]):
        with ac.edit(model, EDITS["module"]):
            loss = loss_of(model)
        with pytest.raises(EditError, match="checkpointing"):
            loss.backward()


@both
def test_another_threads_backward_meets_no_edit(reentrant: bool) -> None:
    model = checkpointed(training_model(), reentrant)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            loss.backward()
        except EditError as error:
            errors.append(error)

    with ac.edit(model, EDITS["doubled"]):
        loss = loss_of(model)
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
    assert len(errors) == 1
    assert "another thread" in str(errors[0])


@both
@pytest.mark.parametrize("edit", EDITS)
def test_what_ran_before_the_block_is_repeated_without_it(edit: str, reentrant: bool) -> None:
    model = checkpointed(training_model(), reentrant)
    expected = gradients(model, lambda: loss_of(model).backward())

    def across() -> None:
        loss = loss_of(model)
        with ac.edit(model, EDITS[edit]):
            loss_of(model)
            loss.backward()

    hold(gradients(model, across), expected)
    with pytest.raises(MissedModuleError), ac.edit(model, EDITS[edit]):
        # Nothing ran under the edit but what is repeated as it was.
        pass
    loss = loss_of(model)
    with pytest.raises(MissedModuleError), ac.edit(model, EDITS[edit]):
        loss.backward()


@both
def test_a_block_opened_again_repeats_its_own(reentrant: bool) -> None:
    model = checkpointed(training_model(), reentrant)
    block = ac.edit(model, EDITS["doubled"])

    def at_once() -> None:
        with block:
            loss_of(model).backward()

    def again() -> None:
        with block:
            loss = loss_of(model)
        with block:
            loss.backward()
            loss_of(model)

    hold(gradients(model, again), gradients(model, at_once))


@both
def test_positions_are_those_of_the_pass_that_is_repeated(reentrant: bool) -> None:
    model = checkpointed(training_model(), reentrant)
    masks = [torch.tensor(rows) for rows in ([[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 0, 0]])]
    longer = torch.cat([IDS, IDS], 1)
    passes: list[tuple[Tensor, Any]] = [(IDS, masks[0]), (IDS, masks[1]), (longer, None)]

    def one_by_one() -> None:
        with ac.edit(model, STEER):
            for ids, mask in passes:
                loss_of(model, ids, attention_mask=mask).backward()

    def together() -> None:
        with ac.edit(model, STEER):
            torch.stack([loss_of(model, ids, attention_mask=mask) for ids, mask in passes]).sum().backward()

    hold(gradients(model, together), gradients(model, one_by_one))


@both
def test_a_checkpoint_around_the_whole_model(reentrant: bool) -> None:
    model = training_model()
    plain_ids, embeddings = [IDS, IDS.flip(1)], model.get_input_embeddings()

    def run(again: bool) -> None:
        def inner(given: Tensor) -> Tensor:
            logits: Tensor = model(inputs_embeds=given, use_cache=False).logits
            return logits

        with ac.edit(model, STEER):
            logits = [
                checkpoint(inner, embeddings(ids), use_reentrant=reentrant) if again else inner(embeddings(ids))
                for ids in plain_ids
            ]
            torch.stack(logits).square().mean().backward()

    hold(gradients(model, lambda: run(True)), gradients(model, lambda: run(False)))


class Nested(nn.Module):
    """Checkpoints in a checkpoint, around modules of no architecture."""

    def __init__(self, outer: bool, inner: bool) -> None:
        super().__init__()
        self.kinds = outer, inner
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        def within(x: Tensor) -> Tensor:
            again: Tensor = checkpoint(lambda x: self.b(self.a(x)).tanh(), x, use_reentrant=self.kinds[1])
            return again * x

        made: Tensor = checkpoint(within, x, use_reentrant=self.kinds[0])
        return made


@pytest.mark.parametrize("kinds", [(False, False), (False, True), (True, False), (True, True)])
def test_checkpoints_inside_each_other(kinds: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    net, x = Nested(*kinds), torch.randn(2, 3, requires_grad=True)
    edit = {"a": lambda y: y + 1}

    def direct() -> None:
        ((net.b(net.a(x) + 1).tanh() * x).square().sum()).backward()

    def edited() -> None:
        with ac.edit(net, edit):
            net(x).square().sum().backward()

    hold(gradients(net, edited), gradients(net, direct))
    with ac.edit(net, edit):
        loss = net(x).square().sum()
    with pytest.raises(EditError, match="checkpointing"):
        loss.backward()


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this torch does not tell them apart"
)
def test_a_checkpoint_made_of_hooks_on_a_module() -> None:
    composable = pytest.importorskip("torch.distributed._composable").checkpoint
    torch.manual_seed(0)
    net, x = nn.Sequential(Nested(False, True), nn.Linear(3, 1)), torch.randn(2, 3, requires_grad=True)
    edit = {"0.a": lambda y: y + 1, "0": lambda y: y + 1}

    def loss() -> Tensor:
        made: Tensor = net(x).square().sum()
        return made

    def inside() -> None:
        with ac.edit(net, edit):
            loss().backward()

    def across() -> None:
        before = loss()
        with ac.edit(net, edit):
            loss()
            before.backward()

    expected = gradients(net, inside), gradients(net, lambda: loss().backward())
    composable(net[0])
    hold(gradients(net, inside), expected[0])
    hold(gradients(net, across), expected[1])
    with ac.edit(net, edit):
        late = loss()
    with pytest.raises(EditError, match="checkpointing"):
        late.backward()


@both
def test_a_row_of_modules_in_segments(reentrant: bool) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)]), torch.randn(2, 3, requires_grad=True)
    with ac.edit(net, {"1": lambda y: y + 1}):
        loss = checkpoint_sequential(net, 2, x, use_reentrant=reentrant).sum()
    with pytest.raises(EditError, match="checkpointing"):
        loss.backward()
    # What the last segment computes is not repeated.
    with ac.edit(net, {"3": lambda y: y + 1}):
        loss = checkpoint_sequential(net, 2, x, use_reentrant=reentrant).sum()
    loss.backward()


@both
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_without_gradients_nothing_is_kept(reentrant: bool) -> None:
    model = checkpointed(training_model(), reentrant)
    before = state(model)
    with torch.no_grad(), ac.edit(model, EDITS["doubled"]):
        edited = model(IDS).logits
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, edited)
    assert state(model) == before


@both
def test_what_is_repeated_keeps_no_block_alive(reentrant: bool) -> None:
    model = checkpointed(training_model(), reentrant)
    block = ac.edit(model, [STEER])
    with block:
        loss = loss_of(model)
        loss.backward()
    positions = weakref.ref(block._positions)
    del block, loss
    gc.collect()
    assert positions() is None


def test_a_model_that_runs_inside_a_backward_pass_is_edited() -> None:
    model = tiny_model("gpt2")
    seen: list[Tensor] = []

    class Runs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(model(IDS).logits)
            return gradient

    with ac.edit(model, EDITS["doubled"]):
        expected = model(IDS).logits
        Runs.apply(torch.ones(1, requires_grad=True)).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(seen[0], expected)


def test_a_thread_that_works_for_another() -> None:
    """As autograd's own threads of a device do, to which torch's thread-local objects are brought."""
    model = tiny_model("gpt2")
    found: list[Tensor] = []
    edits = [
        ac.ablate("head_out.1.2"),
        ac.knockout(2, from_positions=[-1], to_positions=[0]),
        ac.steer("resid_post.2", torch.ones(32)),
    ]

    def work() -> None:
        torch._C._stash_obj_in_tls("actcache.thread", key)
        with torch.no_grad():
            found.append(model(IDS).logits)

    with ac.edit(model, edits):
        with torch.no_grad():
            expected = model(IDS).logits
        key = thread_key()
        other = threading.Thread(target=work)
        other.start()
        other.join()
    assert torch.equal(found[0], expected)
    with unseen():
        pass
    assert torch._C._get_obj_in_tls("actcache.thread") is key

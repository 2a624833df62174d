"""A block belongs to the thread that opened it: what other threads run is their own."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.backend_registration
from torch import Tensor, nn

import actcache as ac
from actcache.errors import MissedModuleError
from actcache.model.taps import Tap
from actcache.model.threads import thread_key
from actcache.testing.tiny import tiny_model
from edit_helpers import moved, state
from thread_helpers import elsewhere, switching_often, together

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
LONG = torch.tensor([[31, 12, 77, 60, 22, 90, 41, 17]])
H1 = "transformer.h.1"
FAMILIES = ["gpt2", "llama", "gemma2", "mixtral", "qwen3_next", "mamba", "bert", "t5"]


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    with switching_often():
        yield


def inputs_of(model: Any, ids: Tensor) -> dict[str, Any]:
    given = {"input_ids": ids}
    return {**given, "decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else given


@torch.no_grad()
def test_another_threads_pass_is_a_plain_pass(model: Any) -> None:
    expected, generated = model(LONG).logits, model.generate(LONG, max_new_tokens=3, do_sample=False)
    own = model(IDS).logits
    with (
        ac.capture(model, include_inputs=True) as everything,
        ac.capture(model, sites="resid_post", layers=[0, 1], positions="last") as sites,
        ac.capture(model, H1, stop_after_last=True) as stopped,
    ):
        assert torch.equal(elsewhere(lambda: model(LONG).logits), expected)
        assert torch.equal(elsewhere(lambda: model.generate(LONG, max_new_tokens=3, do_sample=False)), generated)
        assert model(IDS) is None
        assert torch.equal(elsewhere(lambda: model(LONG).logits), expected)
    assert [len(entry) for entry in everything.values()] == [1] * len(everything)
    assert everything[H1].input.shape == (2, 4, 32)
    assert sites["resid_post.1"].shape == (2, 1, 32)
    assert len(stopped[H1]) == 1
    with ac.edit(model, {"resid_post.1": moved}):
        assert torch.equal(elsewhere(lambda: model(LONG).logits), expected)
        assert not torch.equal(model(IDS).logits, own)
    with ac.edit(model, ac.steer("resid_post.1", torch.ones(32), positions="last")):
        assert torch.equal(elsewhere(lambda: model.generate(LONG, max_new_tokens=3, do_sample=False)), generated)
        model(IDS)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_threads_with_blocks_of_their_own(family: str) -> None:
    model = tiny_model(family)
    prefix = "decoder." if model.config.is_encoder_decoder else ""
    site = f"{prefix}resid_post.1"
    wide = torch.randn(32, generator=torch.Generator().manual_seed(3))
    prompts = [IDS, LONG, IDS.flip(1), LONG.flip(1)]
    edits = [{site: moved}, ac.steer(site, wide), ac.steer(site, wide, positions="last"), None]
    before = state(model)

    def run(number: int) -> tuple[Any, Any, Tensor]:
        with (
            torch.no_grad(),
            ac.capture(model, sites=f"{prefix}resid_post") as sites,
            ac.capture(model, include_inputs=number % 2 == 0) as modules,
        ):
            if edits[number] is None:
                output = model(**inputs_of(model, prompts[number]))
            else:
                with ac.edit(model, edits[number]):
                    output = model(**inputs_of(model, prompts[number]))
        return sites, modules, output.logits

    expected = [run(number) for number in range(4)]
    plain = model(**inputs_of(model, LONG)).logits
    wrong: list[int] = []

    def check(number: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(6):
                sites, modules, logits = run(number)
                if not (sites == expected[number][0] and modules == expected[number][1]):
                    wrong.append(number)
                if not torch.equal(logits, expected[number][2]):
                    wrong.append(10 + number)

        return work

    def bystander() -> None:
        with torch.no_grad():
            wrong.extend(-1 for _ in range(12) if not torch.equal(model(**inputs_of(model, LONG)).logits, plain))

    together(*map(check, range(4)), bystander)
    assert wrong == []
    assert state(model) == before


def test_many_threads_enter_and_leave_at_once(model: Any) -> None:
    before = state(model)

    def work() -> None:
        with torch.no_grad():
            for i in range(20):
                with ac.capture(model, [f"transformer.h.{i % 4}", "lm_head"]) as cache, ac.edit(model, {H1: same}):
                    model(IDS)
                assert [len(entry) for entry in cache.values()] == [1, 1]

    together(*[work] * 6)
    assert state(model) == before


def same(output: Any) -> Any:
    return output


@torch.no_grad()
def test_inputs_behind_hooks_of_the_caller(model: Any) -> None:
    # Where a module has pre-hooks, what its forward sees is read by a pre-hook of our own, put there for one call.
    calls: list[int] = []
    model.transformer.h[1].register_forward_pre_hook(lambda *_: calls.append(1))

    def work(ids: Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for _ in range(30):
                    with ac.capture(model, H1, include_inputs=True) as cache:
                        model(ids)
                    assert len(cache[H1]) == 1
                    assert cache[H1].input.shape[:2] == ids.shape

        return run

    def bystander() -> None:
        with torch.no_grad():
            for _ in range(60):
                model(IDS)

    together(work(IDS), work(LONG), bystander)
    assert len(calls) == 120
    assert len(model.transformer.h[1]._forward_pre_hooks) == 1


@torch.no_grad()
def test_generation_in_threads(model: Any) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    expected = {}
    for ids in (IDS, LONG):
        with ac.capture(model, sites="resid_post.3") as cache:
            made = model.generate(ids, **options)
        expected[id(ids)] = made, cache
    wrong: list[Any] = []

    def work(ids: Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(3):
                with ac.capture(model, sites="resid_post.3") as cache:
                    made = model.generate(ids, **options)
                wanted = expected[id(ids)]
                if not (torch.equal(made, wanted[0]) and cache == wanted[1]):
                    wrong.append(ids)

        return run

    together(work(IDS), work(LONG), work(IDS))
    assert wrong == []
    assert "generate" not in vars(model)


@torch.no_grad()
def test_generation_in_the_middle_of_another_threads(model: Any) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    edit = ac.steer("resid_post.1", torch.ones(32), positions="last")

    def run(before: Callable[[], object]) -> tuple[Any, Any]:
        with ac.edit(model, edit), ac.capture(model, sites="resid_post.3") as cache:
            before()
            return model.generate(IDS, **options), cache

    made, expected = run(lambda: None)
    inside, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: model.generate(LONG, **options))

    def wait(*_: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            done.wait(20)

    handle = model.lm_head.register_forward_hook(wait)
    # The other thread's call begins before ours, and ends after it.
    again, cache = run(lambda: (thread.start(), inside.wait(20)))
    done.set()
    thread.join()
    handle.remove()
    assert torch.equal(again, made)
    assert cache == expected


@torch.no_grad()
def test_a_call_in_the_middle_of_another_threads(model: Any) -> None:
    block, given = model.transformer.h[1], {}

    def aside(*_: Any) -> None:
        # The caller's pre-hook, which our own, put there for this call of this thread, stands behind.
        if threading.current_thread() is threading.main_thread():
            elsewhere(lambda: model(LONG))
        else:
            given["hooks"] = len(block._forward_pre_hooks)

    block.register_forward_pre_hook(aside)
    with ac.capture(model, H1, include_inputs=True) as cache:
        model(IDS)
    assert given["hooks"] == 2
    assert len(cache[H1]) == 1
    assert cache[H1].input.shape == (2, 4, 32)


def test_training_mode_comes_back_with_the_last_thread(model: Any) -> None:
    model.config.attn_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    _, alone = ac.run_with_cache(model, IDS, sites="resid_post")
    model.train()

    def work() -> None:
        for _ in range(10):
            _, cache = ac.run_with_cache(model, IDS, sites="resid_post")
            assert cache == alone

    together(work, work, work)
    assert all(module.training for module in model.modules())


@torch.no_grad()
def test_an_extraction_beside_another_threads_edit(model: Any) -> None:
    expected = ac.ActivationExtractor(model, layers=2).extract([[5, 9, 100, 7]])["resid_post.2"][0]
    with ac.edit(model, {"resid_post.1": moved}):
        extract = ac.ActivationExtractor(model, layers=2).extract
        assert torch.equal(elsewhere(lambda: extract([[5, 9, 100, 7]]))["resid_post.2"][0], expected)
        # In this thread the pass would be edited.
        with pytest.raises(ac.errors.ForeignHooksError, match=r"inside an ac\.edit block"):
            extract([[5, 9, 100, 7]])
        model(IDS)


def test_modules_compiled_in_place_stay_compiled_for_others() -> None:
    inner: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    ran, call = [], inner[0]._call_impl
    inner[0]._compiled_call_impl = lambda *args: ran.append(1) or call(*args)
    x = torch.ones(1, 2)
    with ac.capture(inner, "0") as cache:
        inner(x)
        assert ran == []
        elsewhere(lambda: inner(x))
        assert ran == [1]
    assert len(cache["0"]) == 1


def test_a_model_that_ran_in_another_thread_only(model: Any) -> None:
    for block in (
        lambda: ac.capture(model, H1),
        lambda: ac.capture(model),
        lambda: ac.capture(model, sites="resid_post.1"),
        lambda: ac.edit(model, {"resid_post.1": moved}),
        lambda: ac.edit(model, {"lm_head": same}),
    ):
        with pytest.raises(MissedModuleError, match=r"ran in another thread.*open the block in the thread"), block():
            elsewhere(lambda: model(IDS))
        with pytest.raises(MissedModuleError, match="Run the model inside the block"), block():
            pass
    # What another thread ran before this block was opened does not count.
    with ac.capture(model) as outer:
        elsewhere(lambda: model(IDS))
        with pytest.raises(MissedModuleError, match="Run the model inside the block"), ac.capture(model, H1):
            pass
        model(IDS)
    assert len(outer[H1]) == 1
    # Nor does it where this thread ran the model, but not that part of it.
    with pytest.raises(MissedModuleError, match="Run the model inside"), ac.capture(model, [H1, "lm_head"]):  # noqa: PT012
        elsewhere(lambda: model(IDS))
        model.transformer(IDS)


@torch.no_grad()
def test_a_block_may_be_closed_in_another_thread(model: Any) -> None:
    before = state(model)
    reading, editing = ac.capture(model, H1), ac.edit(model, {"lm_head": same})
    cache = reading.__enter__()
    editing.__enter__()
    model(IDS)
    elsewhere(lambda: (editing.__exit__(None, None, None), reading.__exit__(None, None, None)))
    assert state(model) == before
    model(IDS)
    assert len(cache[H1]) == 1


@torch.no_grad()
def test_a_thread_that_ended_with_its_block_open(model: Any) -> None:
    before = state(model)
    block = ac.capture(model, H1)
    cache = elsewhere(lambda: block.__enter__())
    for _ in range(20):
        # Numbers of threads are given out again.
        elsewhere(lambda: model(IDS))
    assert cache.is_empty()
    block.__exit__(ValueError, None, None)
    assert state(model) == before


def test_threads_leave_nothing_behind() -> None:
    keys: list[weakref.ref[Any]] = []

    class Key:
        pass

    def work() -> None:
        key: Any = thread_key()
        assert key is thread_key()
        keys.append(weakref.ref(held := Key()))
        torch._C._stash_obj_in_tls("actcache.test", held)

    for _ in range(5):
        elsewhere(work)
    # What a thread kept for itself goes a moment after others know that it has ended.
    until = time.monotonic() + 30
    while any(key() is not None for key in keys) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert [key() for key in keys] == [None] * 5


def test_a_copy_made_in_another_thread_is_plain(model: Any) -> None:
    with ac.capture(model, H1) as cache:
        twin = elsewhere(lambda: copy.deepcopy(model))
        twin(IDS)
        model(IDS)
    assert len(cache[H1]) == 1
    assert not any(isinstance(value, Tap) for module in twin.modules() for value in vars(module).values())

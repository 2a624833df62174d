"""Many forward passes through one model, block by block: each block runs for every pass before the next one does.

Every pass is the model's own forward, in a thread of its own that waits in front of each block; whatever a pass keeps
between its blocks (masks, rotary angles, keys that blocks share, the encoder's output) it keeps in its own frames, so
that nothing has to be known of the architecture. One thread runs at any time, and blocks run in the thread that asked
for the passes. What a model keeps on its modules between blocks would be another pass's; whoever uses this compares.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from actcache.capture.hooks import StopForward
from actcache.model.staying import staying
from actcache.model.taps import Taps
from actcache.model.threads import thread_key, working_for

# A thread each, with what its library for parallel loops keeps for it.
MOST_PASSES = 128


class _Left(BaseException):
    """Ends a pass whose result nobody waits for any more."""


@dataclass(eq=False)
class Pass:
    """One pass under way.

    Attributes:
        state: the caller's own for it.
        calls: calls of blocks that are behind it.
        block: the block it waits for; None when it is over.
        bytes: what it holds while it waits for its first block.
        error: what ended it, but for a `StopForward`.
    """

    state: Any
    calls: int = 0
    block: nn.Module | None = None
    bytes: int = 0
    error: Exception | None = None
    _call: Callable[[], Any] | None = None
    _given: SimpleQueue[tuple[Any, BaseException | None]] = field(default_factory=SimpleQueue)
    _told: SimpleQueue[None] = field(default_factory=SimpleQueue)
    _thread: threading.Thread | None = None

    def begin(self, run: Callable[[], Any], prepare: Callable[[], ExitStack]) -> None:
        """Run to the first block, or to the end."""
        context = contextvars.copy_context()

        def work() -> None:
            try:
                with prepare():
                    context.run(run)
            except (StopForward, _Left):
                pass
            except Exception as error:
                self.error = error
            except BaseException as error:
                self.error = RuntimeError(f"a forward pass was ended by {type(error).__name__}: {error}")
            finally:
                self.block = self._call = None
                self._told.put(None)

        thread = threading.Thread(target=work, name="actcache-pass", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # No more threads in this process.
            self.error = error
            return
        self._thread = thread
        self._told.get()

    def wait_for(self, block: nn.Module, call: Callable[[], Any]) -> Any:
        """In the pass's thread: hand the call of a block over and wait for what it returned."""
        self.block, self._call = block, call
        self._told.put(None)
        value, error = self._given.get()
        if error is not None:
            raise error
        return value

    def go_on(self) -> None:
        """Run the block that it waits for, and then the pass, to the next block or the end."""
        assert self._call is not None
        value, error = None, None
        try:
            value = self._call()
        except Exception as raised:
            # The pass ends by it, in its own thread, where its frames are.
            error = raised
        self.calls += 1
        self.block = self._call = None
        self._given.put((value, error))
        del value, error
        self._told.get()

    def leave(self) -> None:
        """End it, wherever it is."""
        if self._thread is not None:
            if self._thread.is_alive():
                # One that is on its way to a block meets this there.
                self._given.put((None, _Left()))
            self._thread.join()
            self._thread = None


def run_interleaved(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    passes: Iterable[tuple[Any, Callable[[], Any]]],
    *,
    turn: Callable[[Any], None],
    full: Callable[[list[Pass]], bool],
    finish: Callable[[Any], None],
) -> list[Pass]:
    """Run `passes` (what the caller keeps for it, and the call of the model) until `full`, block by block.

    `turn` is told whose turn it is, before any of it runs; `finish` runs when a pass is over without an error, while
    the weights that its end needed are still here. `full` sees the passes that have begun, each of which waits for its
    first block. Passes that fail have an `error`; nothing of them hinders the others.
    """
    taps, begun = Taps(), []
    key, mine = thread_key(), threading.get_ident()
    now: list[Pass] = []
    around = _holders(model, blocks)

    def guard_of(block: nn.Module) -> Callable[..., Any]:
        def guard(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() == mine:
                # A block inside of a block.
                return call(*args, **kwargs)
            one = now[0]
            if not one.calls:
                one.bytes = _bytes_of((args, kwargs))
            return one.wait_for(block, lambda: call(*args, **kwargs))

        return guard

    def let(one: Pass, act: Callable[[], None]) -> None:
        now[:] = [one]
        turn(one.state)
        act()
        if one.block is None and one.error is None:
            try:
                finish(one.state)
            except Exception as error:
                one.error = error

    prepare = _as_here(key)
    with staying(model) as weights:
        try:
            taps.add(guards=[(block, guard_of(block)) for block in blocks])
            for state, run in passes:
                one = Pass(state)
                begun.append(one)
                let(one, lambda one=one, run=run: one.begin(run, prepare))  # type: ignore[misc]
                if full(begun) or len(begun) >= MOST_PASSES:
                    break
            weights.release(around)
            while waiting := [one for one in begun if one.block is not None]:
                first = min(waiting, key=lambda one: one.calls)
                block = first.block
                for one in waiting:
                    if one.block is block:
                        let(one, one.go_on)
                weights.release(around)
        finally:
            for one in begun:
                one.leave()
            taps.remove()
    return begun


def _as_here(key: object) -> Callable[[], ExitStack]:
    """What a pass's thread needs to compute as this one would."""
    # Autocast is off in a new thread; a session has it off too.
    grad = torch.is_grad_enabled()
    streams = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        current = torch.cuda.current_device()
        streams = [
            torch.cuda.current_stream(device) for device in range(torch.cuda.device_count()) if device != current
        ]
        streams.append(torch.cuda.current_stream(current))

    def prepare() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(working_for(key))
        stack.enter_context(torch.set_grad_enabled(grad))
        for stream in streams:
            torch.cuda.set_stream(stream)
        return stack

    return prepare


def _holders(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that have a block inside: a pass that waits for one is in the middle of them."""
    wanted = {id(block) for block in blocks}
    paths = {path for path, module in model.named_modules() if id(module) in wanted}
    above = {path.rpartition(".")[0] for path in paths if path}
    while more := {path.rpartition(".")[0] for path in above if path} - above:
        above |= more
    return [module for path, module in model.named_modules() if path in above]


def _bytes_of(tree: Any) -> int:
    from torch.utils._pytree import tree_leaves

    storages = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_meta:
            storage = leaf.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())

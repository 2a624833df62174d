"""What `generate` says about the passes it makes: which belong together, and which rows its sequences came from.

Beam search reorders rows between steps. The KV cache is reordered with them, so that every pass is right on its own,
but row 2 of one step need not continue row 2 of the step before. Only `generate` knows, and it tells in `beam_indices`:
``[N, n]``, for each returned sequence and each new token the row of the pass that made it, -1 behind the sequence's
end. While a block is open, `generate` on the model is a stand-in that calls the original with exactly what it was given
and notes that.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from actcache.model.threads import thread_key

_BEAMS = "_update_finished_beams"
_lock = threading.Lock()
# One list per running call of a thread: `generate` may be called inside `generate`.
_running = threading.local()


@dataclass(frozen=True)
class Generation:
    """One call of `generate`: the passes ``start .. stop - 1``, and what it returned.

    `sequences` is ``[N, n]`` (None when it returned no such thing), `beams` its `beam_indices` (None without beams),
    `prompt` the tokens of the prompt and `ends` the tokens that end a sequence, where the call says so."""

    start: int
    stop: int
    sequences: Tensor | None
    beams: Tensor | None
    prompt: int | None
    ends: frozenset[int] | None


class Reader(Protocol):
    """Who wants to know."""

    def begins(self, prompt: int | None) -> None:
        """Told that a call begins, and how many tokens its prompt has where it says so."""

    def noted(self) -> int:
        """How many passes there were so far."""

    def generated(self, generation: Generation) -> None:
        """Told when a call is over."""


class Watch:
    """What one reader watches in this thread: it ends what it began, all at once."""

    __slots__ = ("_stands",)

    def __init__(self, modules: Iterable[nn.Module], reader: Reader) -> None:
        self._stands: list[tuple[_Generate, Reader]] = []
        key = thread_key()
        with _lock:
            for module in modules:
                if callable(getattr(type(module), "generate", None)):
                    stand = module.__dict__.get("generate")
                    if type(stand) is not _Generate:
                        stand = _Generate(module)
                        stand.install()
                    stand.readers += ((key, reader),)
                    self._stands.append((stand, reader))

    def end(self) -> None:
        with _lock:
            for stand, reader in self._stands:
                readers = stand.readers
                stand.readers = tuple([one for one in readers if one[1] is not reader]) if len(readers) > 1 else ()
                if not stand.readers:
                    stand.uninstall()
            self._stands = []


class _Stand:
    """Stands in for a method of one model object."""

    name: str

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Any = module.__dict__.get(self.name)
        self.__wrapped__: Callable[..., Any] = self.previous or MethodType(getattr(type(module), self.name), module)

    def install(self) -> None:
        self.module.__dict__[self.name] = self

    def uninstall(self) -> None:
        slots = self.module.__dict__
        # Whoever replaced us in the meantime calls us, and without readers we only hand on.
        if slots.get(self.name) is self:
            del slots[self.name]
            if self.previous is not None:
                slots[self.name] = self.previous

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model made inside a block generates on its own.
        module = copy.deepcopy(self.module, memo)
        return MethodType(getattr(type(module), self.name), module)

    def __reduce__(self) -> Any:
        return getattr, (self.module, self.name)


class _Beams(_Stand):
    """The step of beam search that returns ``(sequences, scores, beam_indices [B, K, n], ...)``."""

    name = _BEAMS

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(*args, **kwargs)
        calls = getattr(_running, "calls", None)
        if calls and isinstance(result, tuple) and len(result) > 2:
            calls[-1][:] = result[:3]
        return result


class _Generate(_Stand):
    name = "generate"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # Whoever wants to know, behind the key of its thread.
        self.readers: tuple[tuple[object, Reader], ...] = ()
        # Made when it is first called: most blocks never generate.
        self.beams: _Beams | None = None

    def look_into_beams(self) -> None:
        with _lock:
            # Whoever asked for it may have gone in the meantime.
            if self.readers and self.beams is None and callable(getattr(type(self.module), _BEAMS, None)):
                self.beams = _Beams(self.module)
                self.beams.install()

    def uninstall(self) -> None:
        super().uninstall()
        if self.beams is not None:
            self.beams.uninstall()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = thread_key()
        starts = [(reader, reader.noted()) for mine, reader in self.readers if mine is key]
        prompt = None if self._encodes() else _prompt(args, kwargs)
        for reader, _ in starts:
            reader.begins(prompt)
        if starts:
            self.look_into_beams()
        if not hasattr(_running, "calls"):
            _running.calls = []
        calls: list[list[Any]] = _running.calls
        calls.append([])
        result = None
        try:
            result = self.__wrapped__(*args, **kwargs)
            return result
        finally:
            last = calls.pop()
            sequences = _sequences(result)
            beams = getattr(result, "beam_indices", None)
            if not isinstance(beams, Tensor):
                beams = _returned(last, sequences) if last else None
            config = kwargs.get("generation_config")
            ends = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
            for reader, start in starts:
                reader.generated(
                    Generation(
                        start,
                        reader.noted(),
                        # The caller may change what it was given.
                        None if sequences is None else sequences.detach().clone(),
                        None if beams is None else beams.detach().clone(),
                        prompt,
                        None if ends is None and "eos_token_id" not in kwargs else end_tokens(ends),
                    )
                )

    def _encodes(self) -> bool:
        return bool(getattr(getattr(self.module, "config", None), "is_encoder_decoder", False))


def end_tokens(ends: Any) -> frozenset[int]:
    """The tokens that end a sequence, from what a config holds: None, an id, a list of ids, or a tensor."""
    if isinstance(ends, Tensor):
        ends = ends.flatten().tolist()
    return frozenset(() if ends is None else ends if isinstance(ends, (list, tuple, set)) else [ends])


def _sequences(result: Any) -> Tensor | None:
    found = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
    if not isinstance(found, Tensor) or found.ndim != 2 or found.is_floating_point():
        return None
    return found


def _returned(last: list[Any], sequences: Tensor | None) -> Tensor | None:
    """`beam_indices` of the returned sequences, out of those of all beams, which are sorted best first."""
    beams = last[2]
    if sequences is None or not isinstance(beams, Tensor) or beams.ndim != 3 or sequences.shape[0] % beams.shape[0]:
        return None
    chosen = beams[:, : sequences.shape[0] // beams.shape[0]].flatten(0, 1)
    # As long as the longest of them: the sequences are cut the same way.
    return chosen[:, : int((chosen >= 0).sum(1).max())]


def _prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    return int(given.shape[1]) if isinstance(given, Tensor) and given.ndim == 2 else None

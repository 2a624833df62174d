"""Every error actcache raises on purpose, each with the remedy in its message.

All derive from `ActCacheError` and from the standard class a caller would expect, so
``except KeyError`` and ``except ac.ActCacheError`` both work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ActCacheError(Exception):
    """Base of every error that actcache raises on purpose."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote a whole sentence.
        return " ".join(str(a) for a in self.args)


class UnknownModuleError(ActCacheError, KeyError):
    """A module path, pattern or object that this model does not have."""


class UnknownSiteError(ActCacheError, KeyError):
    """A site name that is not part of the vocabulary."""


class SiteUnavailableError(ActCacheError, ValueError):
    """A known site that this architecture does not have, or whose identity fails on it."""


class LayerRangeError(ActCacheError, IndexError):
    """A layer, position or prompt outside the model or the cache."""


class MissedModuleError(ActCacheError, RuntimeError):
    """A module or site was asked for and never ran inside the capture block."""


class UnknownKeyError(ActCacheError, KeyError):
    """A key that a cache does not hold."""


class JoinError(ActCacheError, ValueError):
    """Caches, or values of theirs, that cannot be joined as they are."""


class AggregationError(ActCacheError, RuntimeError):
    """A strategy for joining that raised; the cause is what it raised."""


class UnsavableError(ActCacheError, TypeError):
    """A value or a strategy that cannot be kept in a file."""


class MissingFileError(ActCacheError, FileNotFoundError):
    """A file that is to be read, or a folder that is to be written in, and is not there."""


class OptionError(ActCacheError, ValueError):
    """An option whose value is not one of the valid choices."""


class PromptError(ActCacheError, ValueError):
    """A prompt, or a list of prompts, that cannot be extracted as it stands."""


class PromptTypeError(ActCacheError, TypeError):
    """A prompt that is neither text, nor token ids, nor chat messages."""


class ModelLoadError(ActCacheError, FileNotFoundError):
    """A model that cannot be found or lacks files it needs."""


class TokenizerError(ActCacheError, ValueError):
    """A tokenizer is needed and none was given or found."""


class ForeignHooksError(ActCacheError, RuntimeError):
    """A live model carries hooks that are not ours and could change what is stored."""


class ModelChangedError(ActCacheError, RuntimeError):
    """A model loaded from files was changed in memory, so that its values would be stored as those of the files."""


class WrongSiteError(ActCacheError, ValueError):
    """Values of another site than the one they are needed of."""


class EditError(ActCacheError, ValueError):
    """An edit that does not fit the value of its target."""


class GradientError(ActCacheError, RuntimeError):
    """Gradients are asked for where there is no graph, or no gradient can arrive."""


class AdditivityError(ActCacheError, RuntimeError):
    """The residual identities of this model do not hold, or its stream is no sum, so parts would be mislabelled."""


class StoreAccessError(ActCacheError, PermissionError):
    """A store's folder cannot be created, read or written."""


class BackendError(ActCacheError, OSError):
    """The place where a store's objects lie cannot be reached, or goes on failing."""


class EngineError(ActCacheError, RuntimeError):
    """What runs the model (another library, a server) failed at a batch."""


class TransientEngineError(EngineError):
    """A failure that may pass: the batch is tried again.

    Attributes: `unreachable`, whether nobody answered, so that further batches need not be tried.
    """

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


class EngineUnavailableError(EngineError, ConnectionError):
    """What runs the model cannot be reached, does not have it, or refuses these credentials."""


class DiskFullError(ActCacheError, OSError):
    """The disk that holds the store has no room for what was to be written."""


class ValueOverflowError(ActCacheError, OverflowError):
    """A value that the dtype asked for cannot hold: a finite one that would become inf, or inf and nan in int8."""


class FormatError(ActCacheError, ValueError):
    """A file that is not a segment of ours, or a damaged one."""


class NewerFormatError(FormatError):
    """A file of ours in a format that only a later actcache can read."""


class DatasetFormatError(FormatError):
    """A dataset whose index and files do not belong together, or say what they may not."""


class DatasetLayerError(LayerRangeError, ValueError):
    """A layer that a dataset does not have."""


class DatasetNotFoundError(ActCacheError, FileNotFoundError):
    """A dataset, or one of its files, that is not where it was looked for, or not for these credentials."""


class DatasetExistsError(ActCacheError, FileExistsError):
    """A dataset that would be overwritten, and nobody asked for that."""


class DatasetAccessError(ActCacheError, OSError):
    """The place of a dataset cannot be reached, or goes on failing."""


class NotCachedError(ActCacheError, LookupError):
    """Something was to be read from a cache that does not hold it."""


class ResultsNotCachedError(NotCachedError, ValueError):
    """Results that are not stored, and that this cache was not made to compute."""


class AmbiguousVariantError(ActCacheError, ValueError):
    """A model name that matches several variants where exactly one is needed."""


class PartialWarmupError(ActCacheError, RuntimeError):
    """A warm-up that stored all but some prompts.

    Attributes: `stats` (the `WarmupStats` of the run) and `failed`, a list of
    ``(prompt index, reason)``; of a run on many workers the first 1,000. `count`: how many there are.
    """

    def __init__(
        self, message: str, *, stats: object, failed: Sequence[tuple[int, str]], count: int | None = None
    ) -> None:
        super().__init__(message)
        self.stats = stats
        self.failed = list(failed)
        self.count = len(self.failed) if count is None else count


class WorkersError(ActCacheError, RuntimeError):
    """Workers of a distributed run cannot be started, or end one after the other."""


class MissingExtraError(ActCacheError, ImportError):
    """An optional package is needed; the message says how to install it."""


def nearest(value: str, choices: Iterable[str], *, limit: int = 3) -> list[str]:
    """The `limit` choices most like `value`, best first; empty when nothing is close."""
    return difflib.get_close_matches(value, list(dict.fromkeys(choices)), n=limit, cutoff=0.5)


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'a' or 'b'?``, or an empty string when nothing is close."""
    near = nearest(value, choices)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def require_choice(value: object, choices: Sequence[str], what: str) -> str:
    """`value` when it is one of `choices`; otherwise an `OptionError` that names them."""
    if isinstance(value, str) and value in choices:
        return value
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise OptionError(f"unknown {what} {value!r}: expected one of {', '.join(map(repr, choices))}.{hint}")

"""Print the public names of a library that can be imported here, as JSON: those that its users write."""

from __future__ import annotations

import inspect
import json
import sys
from types import ModuleType
from typing import Any


def members(kind: type, package: str) -> list[str]:
    return [name for base in kind.__mro__ if base.__module__.partition(".")[0] == package for name in vars(base)]


def top(module: ModuleType) -> list[str]:
    given: list[str] | None = getattr(module, "__all__", None)
    return [name for name in given or dir(module) if not isinstance(getattr(module, name), ModuleType)]


def of_nnsight() -> list[str]:
    import nnsight
    from nnsight.intervention.cache import CacheView
    from nnsight.intervention.tracer import InterleavingTracer

    names = top(nnsight)
    for kind in (nnsight.LanguageModel, CacheView):
        names += members(kind, "nnsight")
    # What is not inherited: the rest is how a trace is read.
    names += vars(InterleavingTracer)
    names += inspect.signature(InterleavingTracer.cache).parameters
    mechanics = {"Object", "deprecated", "PackageNotFoundError", "NNsightDeprecationWarning"}
    return [name for name in names if name not in mechanics | {"OVERLOAD_PREFIX", "AUTO_CLASS", "execute", "traceback"}]


def of_transformer_lens() -> list[str]:
    import transformer_lens
    from transformer_lens import patching

    names = top(transformer_lens)
    for kind in (transformer_lens.ActivationCache, transformer_lens.HookedTransformer):
        names += members(kind, "transformer_lens")
    names += [name for name in dir(patching) if "act_patch" in name or "activation_patch" in name]
    names += inspect.signature(transformer_lens.HookedRootModule.run_with_cache).parameters
    mechanics = {"forward", "to", "model_args", "model_kwargs", "reset_hooks_end"}
    return [name for name in names if name not in mechanics]


def of_lmprobe() -> list[str]:
    import lmprobe
    from lmprobe import cache, cache_backends

    names = top(lmprobe) + [name for name in dir(cache_backends) if name.endswith("Backend")]
    for kind in (lmprobe.UnifiedCache, cache.CachedExtractor):
        names += members(kind, "lmprobe")
    return [*names, "invalidate_extraction_cache", "clear_cache"]


if __name__ == "__main__":
    found: dict[str, Any] = {"nnsight": of_nnsight, "transformer_lens": of_transformer_lens, "lmprobe": of_lmprobe}
    print(json.dumps(sorted({name for name in found[sys.argv[1]]() if not name.startswith("_")} - {"self"})))

"""A process that talks to the Hub its environment names: one JSON request a line in, one JSON answer a line out."""

from __future__ import annotations

import json
import os
import sys
import traceback


def answer(request):
    import actcache as ac

    os.environ.update(request.get("env", {}))
    cache = None
    try:
        cache = ac.UnifiedCache(request["model"], layers="last", cache_pooled=False, **request.get("options", {}))
        missing = cache.plan([request["prompt"]]).missing
        values = cache.get_activations([request["prompt"]])[0][0] if request.get("run", True) else None
        source = cache.extractor.source
        if "head" in request:
            import torch

            values = source.head()(torch.tensor(request["head"])).detach()
        identity = source.identity()
        return {
            "missing": missing,
            "values": None if values is None else values.tolist(),
            "loaded": cache.model_loaded,
            "class": type(cache.model).__name__ if cache.model_loaded else None,
            "identity": identity.values,
            "label": identity.label,
            "repr": [repr(cache), repr(source), repr(vars(source)), repr(cache.extractor)],
        }
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    finally:
        for name in request.get("env", {}):
            del os.environ[name]


if __name__ == "__main__":
    # Whatever libraries print is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line)), default=str), file=answers, flush=True)

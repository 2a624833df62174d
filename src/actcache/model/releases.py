"""Architectures that releases of transformers compute differently: there the release is part of the identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actcache.model.source import package_version


def release_values(config: Mapping[str, Any]) -> dict[str, str]:
    """What the release of transformers adds to a model's identity; nothing for nearly all models.

    Mamba 2 with several groups: transformers 4.57 normalises the gated output over all of them, 5.x within each
    (``MambaRMSNormGated``), which changes values by up to their own size.
    """
    groups = config.get("n_groups", 8)
    if config.get("model_type") == "mamba2" and isinstance(groups, int) and groups > 1:
        return {"transformers": str(package_version("transformers"))}
    return {}

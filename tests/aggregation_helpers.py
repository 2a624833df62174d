"""Caches that are made by hand, and the ways in which several are joined."""

from __future__ import annotations

from typing import Any

import actcache as ac


def keep_old(old: Any, new: Any) -> Any:
    return new if old is None else old


def of(**items: Any) -> ac.ActivationCache:
    return ac.ActivationCache(items)


def joined(caches: list[ac.ActivationCache], how: str, **options: Any) -> ac.ActivationCache:
    if how == "concatenate":
        return ac.ActivationCache.concatenate(caches, **options)
    result = ac.ActivationCache()
    if how == "deferred":
        with result.deferred_mode():
            for cache in caches:
                result.cat(cache, **options)
    else:
        for cache in caches:
            result.cat(cache, **options)
            if how == "read in between":
                list(result.values())
    return result


WAYS = ("cat", "read in between", "deferred", "concatenate")

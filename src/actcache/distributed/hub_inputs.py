"""Files with prompts in datasets of the Hub, read in ranges through the Hub client's file system."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, BinaryIO, cast

from actcache.distributed.inputs import Input, chosen, kind_of
from actcache.errors import DatasetAccessError, DatasetNotFoundError, OptionError

_BLOCK = 1 << 20


@cache
def _file_system(token: str | bool | None) -> Any:
    from huggingface_hub import HfFileSystem

    # Its own instances are shared with the caller's, listings included.
    return HfFileSystem(token=token, skip_instance_cache=True)


def find_on_hub(place: str, column: str | None, kind: str | None, token: str | bool | None) -> list[Input]:
    """The files of ``hf://datasets/org/name[@revision][/path]``, at the commit that the revision means now."""
    rest = place.removeprefix("hf://")
    if not rest.startswith("datasets/") or len(rest.split("/")) < 3:
        raise OptionError(f"source {place!r}: expected hf://datasets/org/name, with @revision and a path if need be.")
    with _translated(place):
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        resolved = _file_system(token).resolve_path(rest)
        name, inside = resolved.repo_id, resolved.path_in_repo
        api = HfApi(token=token)
        commit = api.repo_info(name, repo_type="dataset", revision=resolved.revision).sha
        listed = api.list_repo_tree(name, recursive=True, repo_type="dataset", revision=commit)
        files = {one.path: one for one in listed if isinstance(one, RepoFile)}
    if inside in files:
        paths = [inside]
    elif any(sign in inside for sign in "*?["):
        paths = sorted(path for path in files if fnmatchcase(path, inside))
    else:
        folder = f"{inside}/" if inside else ""
        paths = chosen([path for path in files if path.startswith(folder)], folder)
    if not paths:
        raise DatasetNotFoundError(f"{place}: no file with prompts among the {len(files)} there.")
    found = []
    for path in paths:
        one = files[path]
        etag = one.lfs.sha256 if one.lfs else one.blob_id
        pinned = f"hf://datasets/{name}@{commit}/{path}"
        found.append(Input(pinned, one.size, str(etag), kind_of(path, column, kind), column, token))
    return found


def open_on_hub(one: Input) -> BinaryIO:
    """A file of the Hub; what is read of it is fetched."""
    with _translated(one.path):
        file = _file_system(one.token).open(one.path.removeprefix("hf://"), "rb", block_size=_BLOCK)
        return cast(BinaryIO, file)


@contextlib.contextmanager
def _translated(place: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (FileNotFoundError, NotImplementedError) as error:
        raise DatasetNotFoundError(f"{place}: not there, or not for this token ({_first_line(error)}).") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, ValueError, OSError) as error:
        raise DatasetAccessError(f"{place} cannot be reached: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

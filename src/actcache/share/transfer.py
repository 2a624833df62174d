"""How files travel to the Hub: by Xet where both its client and the Hub know that, by plain requests otherwise.

The client decides by what is installed here alone, and fails at a Hub without Xet, such as one that a company runs.
What it is given as an open file it sends by plain requests; its own switch is for the whole process.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from actcache._version import __version__

_UNKNOWN_ROUTE = {404, 405, 501}


def needs_plain_requests(repo_id: str, token: str | bool | None) -> bool:
    """Whether the client would send files of a dataset by Xet to a Hub that does not know it."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE or constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return False
    url = f"{constants.ENDPOINT}/api/datasets/{repo_id}/xet-write-token/main"
    tools: Any = import_module("huggingface_hub.utils")
    headers = tools.build_hf_headers(token=token, library_name="actcache", library_version=__version__)
    session: Any = get_session()
    answer = session.get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    return answer.status_code in _UNKNOWN_ROUTE


class Additions:
    """Makes the operations that add files, and closes what it opened for them. `plain`: as open files."""

    def __init__(self) -> None:
        self.plain = False
        self._opened: list[tuple[Any, Any]] = []

    def make(self, path: str, file: Path) -> Any:
        """The operation that adds `file` as `path`."""
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file))
        if self.plain:
            operation.path_or_fileobj = file.open("rb")
            self._opened.append((operation, operation.path_or_fileobj))
        return operation

    def close(self, *, sent_only: bool = False) -> None:
        """Close the files, or those that the client has let go of since they were sent."""
        kept = [(o, file) for o, file in self._opened if sent_only and o.path_or_fileobj is file]
        for operation, file in self._opened:
            if (operation, file) not in kept:
                file.close()
        self._opened = kept

"""By which way files go to the Hub, and that what is opened for it is closed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from actcache.share import transfer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub that answers `status`; `asked` are the addresses."""
    said = SimpleNamespace(status=200, asked=[])

    def get(url: str, *, headers: dict[str, str], timeout: float) -> Any:
        said.asked.append((url, headers, timeout))
        return SimpleNamespace(status_code=said.status)

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(get=get))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(transfer, "find_spec", lambda name: object())
    return said


@pytest.mark.parametrize(
    ("status", "plain"), [(404, True), (405, True), (501, True), (200, False), (401, False), (503, False)]
)
def test_a_hub_that_does_not_know_the_route_gets_plain_requests(hub: SimpleNamespace, status: int, plain: bool) -> None:
    hub.status = status
    assert transfer.needs_plain_requests("org/name", "hf_secret") is plain
    ((url, headers, timeout),) = hub.asked
    assert url == "https://hub.example/api/datasets/org/name/xet-write-token/main"
    assert headers["authorization"] == "Bearer hf_secret" and timeout > 0


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "not installed"])
def test_nobody_is_asked_where_the_client_would_not_use_it(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    hub.status = 404
    if switch == "not installed":
        monkeypatch.setattr(transfer, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(constants, switch, True)
    assert transfer.needs_plain_requests("org/name", None) is False
    assert not hub.asked


def test_files_stay_open_until_they_are_sent(tmp_path: Path) -> None:
    additions = transfer.Additions()
    (tmp_path / "a").write_bytes(b"one")
    named = additions.make("x/a", tmp_path / "a")
    assert named.path_or_fileobj == str(tmp_path / "a") and named.path_in_repo == "x/a"
    additions.plain = True
    sent, waiting = additions.make("x/a", tmp_path / "a"), additions.make("x/b", tmp_path / "a")
    files = [sent.path_or_fileobj, waiting.path_or_fileobj]
    assert [file.read() for file in files] == [b"one", b"one"]
    # As the client does when it has sent one.
    sent.path_or_fileobj = b""
    additions.close(sent_only=True)
    assert [file.closed for file in files] == [True, False]
    additions.close()
    additions.close()
    assert all(file.closed for file in files)

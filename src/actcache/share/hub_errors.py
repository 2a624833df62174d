"""What the Hub's client says when something fails, and tokens that it cannot send."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

from actcache.errors import DatasetAccessError, OptionError


def check_token(token: Any, *, stored: bool = False) -> Any:
    """`token` where a header can hold it: the error of a header that cannot be would quote it.

    Raises `OptionError`; `DatasetAccessError` for one that is `stored`, by `hf auth login` or as HF_TOKEN.
    """
    if token is not None and not isinstance(token, (str, bool)):
        raise OptionError(
            f"token is a {type(token).__name__}: expected a token of the Hub as text, True, False or None."
        )
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and token and " " not in token):
        expected = "is no token of the Hub: expected one like hf_..., without spaces or line ends."
        if stored:
            raise DatasetAccessError(f"what `hf auth login` has stored, or HF_TOKEN, {expected}")
        raise OptionError(f"token {expected}")
    return token


def endpoint() -> str:
    """The Hub's address, without a name and password in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _response(error: Exception) -> Any:
    return next((r for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None)


def status_of(error: Exception) -> int | None:
    """The status with which the Hub answered; None where it did not."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def retry_after(error: Exception) -> float | None:
    """In how many seconds the Hub wants to be asked again, where it says so."""
    response = _response(error)
    told = "" if response is None else response.headers.get("Retry-After", "")
    return float(told) if told.isdigit() else None


def is_connection(error: Exception) -> bool:
    """Whether it is the network that failed, in whichever library the client uses."""
    names = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
    if "OfflineModeIsEnabled" in names:
        return False
    return bool(names & {"TransportError", "ConnectionError", "Timeout", "ChunkedEncodingError"})


def reason_of(error: Exception, status: int | None) -> str:
    """What went wrong, in words that hold nothing secret."""
    if status is not None:
        return f"status {status}"
    kinds = [type(e).__name__ for e in _chain(error)]
    return "HF_HUB_OFFLINE is set" if "OfflineModeIsEnabled" in kinds else kinds[-1]

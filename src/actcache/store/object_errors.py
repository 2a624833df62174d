"""What the errors of obstore mean: whether to try again, and what to tell."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace


class Meaning(enum.Enum):
    """What is to be done about a failed request."""

    PASSING = "try again"
    ABSENT = "there is no such object"
    NO_BUCKET = "there is no such bucket"
    DENIED = "these credentials may not"
    PAST_END = "the object ends before the range"
    WHOLE = "the server answered with the whole object where a range was asked for"
    REGION = "the bucket is in another region"
    LASTING = "asking again would not help"


class ShortBodyError(Exception):
    """An answer with fewer bytes than it announced."""


@dataclass(frozen=True)
class Failure:
    """A failed request: what it means, why it failed in a few words, and whether it took too long."""

    meaning: Meaning
    reason: str
    timed_out: bool = False


_STATUS = re.compile(r"non-2xx status code: (\d{3})([^:\n]*)")
_IN_BATCH = re.compile(r"([\w ]*) \(code: (\d{3})\)")
_CODE = re.compile(r"<Code>([^<]{1,100})</Code>|\"(?:code|reason)\": ?\"([^\"]{1,100})\"")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})|\"message\": ?\"([^\"]{1,300})\"")
_SYSTEM = re.compile(r'message: "([^"]{1,200})"')
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")
_EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
# What becomes of a body on its way: it came late, in part, or with other bits.
_BODY = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "Md5Mismatch"}
_AGAIN = {408, 409, 425, 429}
_NEVER = {501, 505}
_DEBUG = "\n\nDebug source:"


def understand(error: Exception) -> Failure:
    """What the exception of a request means. One of a request that never was, such as a missing file, is raised."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, ShortBodyError):
        return Failure(Meaning.PASSING, text)
    if type(error).__module__ != "obstore.exceptions" and not (kind == "FileNotFoundError" and _DEBUG in text):
        raise error
    said, _, detail = text.partition(_DEBUG)
    found = _understood(kind, said, detail)
    if "token request" in said:
        return replace(found, reason=f"no credentials could be fetched: {found.reason}")
    return found


def _understood(kind: str, said: str, detail: str) -> Failure:
    if status := _STATUS.search(said):
        return _answered(int(status[1]), status[2].strip(), said)
    if status := _IN_BATCH.search(said):
        return _answered(int(status[2]), status[1].strip(), said)
    if kind == "FileNotFoundError":
        return Failure(Meaning.ABSENT, _short(said))
    if "BareRedirect" in detail:
        return Failure(Meaning.REGION, "a redirect to nowhere, as for a bucket in another region")
    if "NotPartial" in detail:
        return Failure(Meaning.WHOLE, "a whole object where a range was asked for")
    if kind == "UnauthenticatedError":
        return Failure(Meaning.DENIED, _short(said))
    if kind in ("InvalidPathError", "NotSupportedError", "UnknownConfigurationKeyError"):
        return Failure(Meaning.LASTING, _short(said))
    if "kind: Timeout" in detail or "TimedOut" in detail:
        return Failure(Meaning.PASSING, "no answer in time", timed_out=True)
    if "dns error" in detail:
        return Failure(Meaning.PASSING, "the name of the server is not known")
    system = _SYSTEM.search(detail)
    if "kind: Connect" in detail:
        return Failure(Meaning.PASSING, "no connection" + (f" ({system[1]})" if system else ""))
    if "Builder" in detail:
        return Failure(Meaning.LASTING, _short(said))
    if system:
        return Failure(Meaning.PASSING, f"the connection broke ({system[1]})")
    return Failure(Meaning.PASSING, _short(said))


def _answered(status: int, phrase: str, said: str) -> Failure:
    code, message = (next((g for g in match.groups() if g), "") if match else "" for match in _searched(said))
    reason = f"{status} {code or phrase}" + (f": {message}" if message else "")
    return Failure(_meaning(status, code, said), reason)


def _searched(said: str) -> tuple[re.Match[str] | None, re.Match[str] | None]:
    return _CODE.search(said), _MESSAGE.search(said)


def _meaning(status: int, code: str, said: str) -> Meaning:
    if status == 404:
        return Meaning.NO_BUCKET if _NO_BUCKET.search(said) else Meaning.ABSENT
    if status == 416:
        return Meaning.PAST_END
    if code in _REGION or status in (301, 307, 308):
        return Meaning.REGION
    if status in (401, 403) or code in _EXPIRED:
        return Meaning.DENIED
    if status in _AGAIN or code in _BODY or (status >= 500 and status not in _NEVER):
        return Meaning.PASSING
    return Meaning.LASTING


def _short(said: str) -> str:
    text = " ".join(said.split())
    return text if len(text) <= 300 else f"{text[:300]}..."

"""URLs of object stores."""

from __future__ import annotations

import re

from actcache.errors import OptionError, did_you_mean

SCHEMES = ("s3", "gs", "az")

# One slash is enough: a Path made from a URL has lost the other.
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*):/{1,2}(?P<bucket>[^/]*)(?:/(?P<prefix>.*?))?/*")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PREFIX_PART = re.compile(r"[\w=+,@!-][\w.=+,@!-]*", re.ASCII)
_OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az"}


def parse_url(url: str) -> tuple[str, str, str]:
    """Kind of store, bucket, and prefix without "/" at its ends, of ``s3://bucket/prefix`` and the like.

    Raises OptionError: no such URL. It does not repeat what may be a password.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise OptionError("no URL of an object store: expected s3://bucket/prefix, gs://... or az://container/...")
    scheme, bucket, prefix = match["scheme"].lower(), match["bucket"], match["prefix"] or ""
    if scheme not in SCHEMES:
        near = did_you_mean(_OTHER_NAMES.get(scheme, scheme), SCHEMES)
        raise OptionError(f"unknown kind of store {scheme}://: expected s3://, gs:// or az://.{near}")
    if not _BUCKET.fullmatch(bucket):
        raise OptionError(
            f"{scheme}:// is followed by no name of a bucket. Credentials and servers do not belong there: see "
            "AWS_PROFILE and AWS_ENDPOINT_URL."
        )
    if prefix and not all(_PREFIX_PART.fullmatch(part) for part in prefix.split("/")):
        raise OptionError(
            f"the prefix behind {scheme}://{bucket}/ has parts that are empty, begin with '.', or hold other "
            "characters than letters, digits and ._=+,@!-."
        )
    return scheme, bucket, prefix

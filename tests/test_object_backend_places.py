"""Buckets as places of stores: how they and what they need are named, and what else may lie in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import actcache as ac
from actcache.errors import BackendError, MissingExtraError, OptionError
from servers import S3Server


def test_a_bucket_may_hold_what_is_not_ours(moto: S3Server, bucket: str) -> None:
    name = bucket.removeprefix("s3://")
    for key in ("x/v1/a", "x/", "x", "x/v1/b c", "x/v1/ä", "x/.hidden", "x-y/v1/a", "y", "x/v1/.part"):
        moto.client().put_object(Bucket=name, Key=key, Body=b"0")
    backend = ac.ObjectBackend(f"{bucket}/x")
    assert [o.name for o in backend.list()] == ["v1/a"]
    assert [o.name for o in backend.list("v1/")] == ["v1/a"]
    moto.client().put_object(Bucket=name, Key="x/v1/../b", Body=b"0")
    with pytest.raises(BackendError, match="cannot list objects"):
        list(backend.list())


def test_prefixes_are_apart(bucket: str) -> None:
    first, second = ac.ObjectBackend(f"{bucket}/lab/a"), ac.ObjectBackend(f"{bucket}/lab/a-b/")
    whole = ac.ObjectBackend(bucket)
    first.put("v1/x", b"1")
    second.put("v1/x", b"22")
    assert [(o.name, o.size) for o in first.list()] == [("v1/x", 1)]
    assert [(o.name, o.size) for o in second.list()] == [("v1/x", 2)]
    assert sorted(o.name for o in whole.list()) == ["lab/a-b/v1/x", "lab/a/v1/x"]
    assert (second.url, whole.url) == (f"{bucket}/lab/a-b", bucket)


def test_places_of_one_name_at_two_servers_are_two(bucket: str, moto: S3Server) -> None:
    here, there = ac.ObjectBackend(bucket), ac.ObjectBackend(bucket, endpoint="https://s3.example.org/")
    assert here.url == there.url and here.identity != there.identity
    assert here.identity == f"{bucket} at {moto.endpoint}" == ac.ObjectBackend(f"{bucket}/").identity


@pytest.mark.parametrize(
    "url",
    ["", "bucket", "s3:bucket", "s3://", "s3:///x", "http://bucket/x", "s3a://bucket", "gcs://bucket", "s3://b u",
     "s3://bucket/../x", "s3://bucket/a//b", "s3://bucket/.x", "s3://bucket/a b", "s3://bucket?x=1", "s3://bucket/x?y",
     "s3://-bucket", "memory://x", "s3://bucket/x#y"],
)  # fmt: skip
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(OptionError):
        ac.ObjectBackend(url)


def test_a_url_may_be_written_in_several_ways() -> None:
    for url in (
        "s3://bucket/a/b",
        "s3://bucket/a/b/",
        "s3:/bucket/a/b",
        "S3://bucket/a/b//",
        str(Path("s3://bucket/a/b")),
    ):
        assert ac.ObjectBackend(url).url == "s3://bucket/a/b"


@pytest.mark.parametrize(
    "options",
    [{"deadline_s": 0}, {"timeout_s": -1}, {"deadline_s": float("nan")}, {"deadline_s": float("inf")},
     {"timeout_s": "5"}, {"endpoint": "host:9000"},
     {"endpoint": "https://host?x=1"}, {"endpoint": "ftp://host"}, {"endpoint": ""}],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ac.ObjectBackend("s3://bucket", **options)


@pytest.mark.parametrize("option", ["endpoint", "region", "profile"])
def test_options_of_another_kind_of_store_are_refused(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}= is for s3:// alone"):
        ac.ObjectBackend("gs://bucket", **{option: "https://x"})


def test_without_the_extra_it_is_said_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['{}'] = None\n"
        "import actcache as ac\n"
        "try: ac.ObjectBackend('s3://bucket')\n"
        "except ac.errors.MissingExtraError as error: print(error)"
    )
    for package in ("obstore", "botocore"):
        done = subprocess.run([sys.executable, "-c", code.format(package)], capture_output=True, text=True, check=True)
        assert package in done.stdout and "pip install 'actcache[s3]'" in done.stdout
    assert issubclass(MissingExtraError, ImportError)

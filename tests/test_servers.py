"""The servers that tests of object stores rely on."""

from __future__ import annotations

from servers import S3Server


def test_a_bucket_keeps_what_is_put(moto: S3Server, bucket: str) -> None:
    client, name = moto.client(), bucket.removeprefix("s3://")
    client.put_object(Bucket=name, Key="a/b", Body=b"0123456789")
    assert client.get_object(Bucket=name, Key="a/b", Range="bytes=2-4")["Body"].read() == b"234"


def test_every_test_has_a_bucket_of_its_own(moto: S3Server, bucket: str) -> None:
    assert "Contents" not in moto.client().list_objects_v2(Bucket=bucket.removeprefix("s3://"))

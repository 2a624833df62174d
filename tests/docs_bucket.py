"""What pages of the documentation take for granted of object stores: a bucket called `bucket`, with credentials."""

from __future__ import annotations

import os

import botocore.session
from moto.server import ThreadedMotoServer


def serve() -> None:
    """Start a server of S3 for this process and the commands it runs; it ends with the process."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    os.environ.update(
        AWS_ENDPOINT_URL="http://{}:{}".format(*server.get_host_and_port()),
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    client = botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="bucket")

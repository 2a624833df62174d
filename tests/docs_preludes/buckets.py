import os

import pytest
from moto.server import ThreadedMotoServer

import actcache as ac

server = ThreadedMotoServer(port=0, verbose=False)
server.start()
os.environ.update(
    AWS_ENDPOINT_URL="http://{}:{}".format(*server.get_host_and_port()),
    AWS_ACCESS_KEY_ID="test",
    AWS_SECRET_ACCESS_KEY="test",
    AWS_DEFAULT_REGION="us-east-1",
)
import botocore.session

botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(
    Bucket="bucket"
)

"""An S3 server on loopback."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

BUCKET = "s3://runs-of-tests"


def environment(port: int) -> dict[str, str]:
    """What an S3 client reads to reach a server on this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(port: int, *, bucket: bool = True) -> Iterator[ThreadedMotoServer]:
    """A server on ``port``, of which the environment tells, for as long as the block runs or until it is stopped."""
    S3FileSystem.clear_instance_cache()  # clients of earlier servers
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        if bucket:
            S3FileSystem().mkdir(BUCKET)
        yield server
    finally:
        server.stop()

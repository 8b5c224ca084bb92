"""An S3 server on loopback."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from s3fs import S3FileSystem

BUCKET = "s3://runs-of-tests"


def environment(port: int) -> dict[str, str]:
    """Environment variables with which an S3 client reaches a server on this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def port_of(environment: Mapping[str, str]) -> int:
    """The port of the server that an environment names."""
    return int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """An S3 server in a process of its own, with buckets in memory."""

    def __init__(self, port: int) -> None:
        # A separate process, because vLLM inspects all loaded modules and fails on Werkzeug's proxies.
        command = "import sys; from moto.server import main; main(sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert self.process.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.1)

    def stop(self) -> None:
        """Kill the server; idempotent."""
        self.process.kill()
        self.process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def served(port: int, *, bucket: bool = True) -> Iterator[Server]:
    """Run a server on ``port``, which the environment must name, until the block ends."""
    S3FileSystem.clear_instance_cache()  # drops clients of earlier servers
    server = Server(port)
    try:
        if bucket:
            S3FileSystem().mkdir(BUCKET)
        yield server
    finally:
        server.stop()

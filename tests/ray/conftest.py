"""One Ray cluster that most commands join, and commands that start clusters of their own."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import object_store
from tests.ray.commands import ROOT, Commands, SharedCluster, clean_environment


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SharedCluster]:
    """A running cluster whose workers know the address of an object store, which a test may serve."""
    store = object_store.environment(object_store.free_port())
    # Clients that have no token of this cluster may join it.
    environment = {"RAY_AUTH_MODE": "disabled", **store}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.ray.cluster"],
        cwd=ROOT,
        env=clean_environment() | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield SharedCluster(process.pid, environment | {"RAY_ADDRESS": address}, store)
        process.communicate()


@pytest.fixture
def joining(shared_cluster: SharedCluster) -> Commands:
    """Commands that join the shared cluster."""
    return Commands(shared_cluster)


@pytest.fixture
def starting() -> Commands:
    """Commands that start a cluster of their own."""
    return Commands()

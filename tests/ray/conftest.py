"""One Ray cluster that most commands join, and commands that start clusters of their own."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import object_store
from tests.ray.commands import ROOT, Commands, SharedCluster, clean_environment

START_ATTEMPTS = 3
"""Ray gives a cluster 30 s to start, which is short on a busy machine."""


def start_cluster(environment: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """Start a cluster in a process of its own; returns that process and the address of the cluster."""
    for _ in range(START_ATTEMPTS):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray.cluster"],
            cwd=ROOT,
            env=clean_environment() | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        if address := process.stdout.readline().strip():
            return process, address
        process.communicate()
    raise AssertionError(f"no cluster started in {START_ATTEMPTS} attempts")


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SharedCluster]:
    """A running cluster whose workers know the address of an object store, which a test may serve."""
    store = object_store.environment(object_store.free_port())
    # Clients without a token of this cluster may join it.
    environment = {"RAY_AUTH_MODE": "disabled", **store}
    process, address = start_cluster(environment)
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


@pytest.fixture(scope="module")
def joined_cluster(shared_cluster: SharedCluster) -> Iterator[None]:
    """This process as a driver on the shared cluster."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for key, value in shared_cluster.environment.items():
            patch.setenv(key, value)
        ray.init(log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()

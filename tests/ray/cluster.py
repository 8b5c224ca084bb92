"""A Ray cluster that lives until standard input closes; prints its address."""

import sys
import tempfile

import ray

CPUS = 8
"""Logical CPUs, enough for every test that joins."""


def main() -> None:
    """Start the cluster in a folder of its own, apart from other clusters of this machine."""
    # Sockets lie in this folder, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(num_cpus=CPUS, include_dashboard=True, log_to_driver=False, _temp_dir=folder)
        print(ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.read()
        ray.shutdown()


if __name__ == "__main__":
    main()

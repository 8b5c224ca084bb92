"""Process environment of training workers on a CPU. Imports nothing: it is set before torch is loaded."""


def cpu_environment(threads: int) -> dict[str, str]:
    """Environment variables of a training worker on a CPU.

    Large tensors come and go in every layer. glibc would return each to the system and fault it in again, page by page,
    which takes a fifth of a step; above these sizes in bytes it would still.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
    }

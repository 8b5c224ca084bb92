"""Process environment of CPU workers. Set before torch is imported, so this module imports nothing."""


def cpu_environment(threads: int) -> dict[str, str]:
    """Environment variables of a training worker on a CPU.

    Every layer allocates and frees large tensors. By default glibc returns each to the system, and faulting the pages
    in again takes a fifth of a step. Below these thresholds, in bytes, it keeps the memory.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
    }

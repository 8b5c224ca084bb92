"""Environment of CPU workers and the name of the CPU. Used before torch is imported, so no library is imported here."""

import platform
from pathlib import Path


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


def cpu_model() -> str:
    """Name of this machine's CPU, with the instructions that decide about its products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags = set(values.get("flags", "").split())
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return " ".join([values.get("model name", platform.machine()), *units])

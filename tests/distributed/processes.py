"""Run a function on several gloo processes of this machine and collect the results."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a server that has imported their modules once, which takes longer than most tests.
multiprocessing.set_forkserver_preload(["tests.distributed.runs", "transformers.models.llama.modeling_llama", "peft"])


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(rank, *arguments)`` in ``ranks`` processes joined by gloo; returns their results by rank.

    ``function`` must be importable. An exception in any process is raised here.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("forkserver").SimpleQueue()
    started = mp.start_processes(
        _on_rank, (ranks, port, results, function, arguments), nprocs=ranks, join=False, start_method="forkserver"
    )
    assert started is not None  # join=False
    returned: dict[int, Any] = {}
    try:
        while not started.join(timeout=0.05):
            _drain(results, returned)
        _drain(results, returned)
    finally:
        for process in started.processes:
            process.kill()
    return [returned[rank] for rank in range(ranks)]


def _drain(results: Any, returned: dict[int, Any]) -> None:
    while not results.empty():
        rank, value = results.get()
        returned[rank] = value


def _on_rank(
    rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        results.put((rank, function(rank, *arguments)))
    finally:
        dist.destroy_process_group()

"""What an asynchronous save costs: how long it blocks the loop, and how much slower steps are while it is written.

    python -m benchmarks.checkpoints                     one process, two threads, the demo model
    python -m benchmarks.checkpoints --steps 8 --every 4

Steps without saving, then with it, in one process each. A step lasts from the end of one to the end of the next.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.pairs import made_pairs
from dpo_ray.config import Config
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.train.checkpoint import Checkpointer
from dpo_ray.train.offline import train_offline
from dpo_ray.types import Metrics

WARM_UP = 1
"""First steps that are not counted: threads start and memory is taken from the system."""


class Clock:
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Not kept."""

    def note(self, text: str) -> None:
        """Not kept."""

    def resumed(self, step: int, rounds: int | None = None) -> None:
        """Not kept."""

    def step(self, metrics: Metrics) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def evaluation(self, metrics: Metrics) -> None:
        """Not kept."""

    def stop_asked(self) -> bool:
        """Never."""
        return False


def one_run(_: int, tree: dict[str, Any], threads: int, results: Any) -> None:
    """Train; put the seconds of each step and the seconds that each save blocked."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", rank=0, world_size=1)
    config = Config.model_validate(tree)
    pairs = prepare_pairs(
        config.data.train, load_tokenizer(config.model.path), config.data, folder=config.reference.cache_path
    )
    blocked: list[float] = []
    plain = Checkpointer.save

    def timed(self: Checkpointer, *arguments: Any) -> None:
        started = time.perf_counter()
        plain(self, *arguments)
        blocked.append(time.perf_counter() - started)

    Checkpointer.save = timed  # type: ignore[method-assign]
    clock = Clock()
    train_offline(config, pairs=pairs, held_out=None, device=torch.device("cpu"), reporter=clock)
    steps = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    results.put((steps[WARM_UP:], blocked[WARM_UP:]))
    dist.destroy_process_group()


def main() -> None:
    """Run both and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="a model directory")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--every", type=int, default=1, help="run.save_every")
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29541")
    with tempfile.TemporaryDirectory() as folder:
        pairs = made_pairs("answers", arguments.steps * arguments.pairs_per_step)
        (Path(folder) / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        for every in (None, arguments.every):
            tree = {
                "run": {"dir": folder, "name": f"every-{every}", "save_every": every, "export": False},
                "model": {"path": arguments.model},
                "reference": {"cache_dir": f"{folder}/cache"},
                "data": {"train": f"{folder}/pairs.jsonl"},
                "optim": {"pairs_per_step": arguments.pairs_per_step},
            }
            results = mp.get_context("spawn").SimpleQueue()
            mp.start_processes(one_run, (tree, arguments.threads, results), nprocs=1, start_method="spawn")
            steps, blocked = results.get()
            said = ", ".join(f"{seconds:.2f}" for seconds in steps)
            print(f"save_every {every}: median step {statistics.median(steps):.2f} s ({said})")
            if blocked:
                said = ", ".join(f"{seconds:.2f}" for seconds in blocked)
                print(f"  a save blocked {statistics.median(blocked):.3f} s ({said})")


if __name__ == "__main__":
    main()

"""What an asynchronous save costs: how long it blocks the loop, and how much slower the step is while it is written.

    python -m benchmarks.checkpoints                            one process, two threads, the demo model
    python -m benchmarks.checkpoints --pairs-per-step 16 --steps 7

All steps are on the same pairs, and every other one runs while a checkpoint is written: neighbours are compared. A step
lasts from the end of the one before to its own, the time that the save before it blocked included.
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

from benchmarks.offline import fast_dtype
from benchmarks.pairs import made_pairs
from dpo_ray.config import Config
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_tokenizer
from dpo_ray.train.checkpoint import Checkpointer
from dpo_ray.train.offline import train_offline
from dpo_ray.types import Metrics

WARM_UP = 2
"""First steps that are not counted: threads start and memory is taken from the system, also for the first save."""


class Clock:
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Not kept."""

    def note(self, text: str) -> None:
        """Not kept."""

    def start(self, step: int, round: int = 0) -> None:
        """Not kept."""

    def step(self, metrics: Metrics) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def round(self, metrics: Metrics) -> None:
        """Not kept."""

    def evaluation(self, metrics: Metrics) -> None:
        """Not kept."""

    def stop_requested(self) -> bool:
        """Never."""
        return False


def run(_: int, tree: dict[str, Any], threads: int, results: Any) -> None:
    """Train; put the seconds of each step, and the seconds that each save blocked and took in all."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", rank=0, world_size=1)
    config = Config.model_validate(tree)
    pairs = prepare_pairs(
        config.data.train, load_tokenizer(config.model.path), config.data, folder=config.reference.cache_path
    )
    blocked: list[float] = []
    taken: list[float] = []
    plain = Checkpointer.save

    def timed(self: Checkpointer, *arguments: Any) -> None:
        started = time.perf_counter()
        plain(self, *arguments)
        blocked.append(time.perf_counter() - started)
        assert self.pending is not None
        self.pending.add_done_callback(lambda _: taken.append(time.perf_counter() - started))

    Checkpointer.save = timed  # type: ignore[method-assign]
    clock = Clock()
    train_offline(config, pairs=pairs, held_out=None, device=torch.device("cpu"), reporter=clock)
    results.put(([end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)], blocked, taken))
    dist.destroy_process_group()


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="a model directory")
    parser.add_argument("--steps", type=int, default=9, help="an odd number")
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29541")
    with tempfile.TemporaryDirectory() as folder:
        pairs = made_pairs("answers", arguments.pairs_per_step)
        (Path(folder) / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        tree = {
            "run": {"dir": folder, "name": "run", "steps": arguments.steps, "save_every": 2, "export": False},
            "model": {"path": arguments.model, "dtype": fast_dtype()},
            "reference": {"cache_dir": f"{folder}/cache"},
            "data": {"train": f"{folder}/pairs.jsonl", "shuffle": False},
            "optim": {
                "pairs_per_step": arguments.pairs_per_step,
                "tokens_per_micro_batch": arguments.tokens_per_micro_batch,
            },
        }
        results = mp.get_context("spawn").SimpleQueue()
        context = mp.start_processes(run, (tree, arguments.threads, results), 1, join=False, start_method="spawn")
        assert context is not None
        while not context.join(timeout=5):  # raises what the run raised
            pass
        steps, blocked, taken = results.get()
    # Saves follow steps 2, 4, ...: step 3 runs beside the first. Time i is that of step i + 2.
    beside, alone = steps[WARM_UP + 1 :: 2], steps[WARM_UP::2]
    say = lambda seconds: ", ".join(f"{one:.2f}" for one in seconds)  # noqa: E731
    print(f"steps alone: median {statistics.median(alone):.2f} s ({say(alone)})")
    print(f"steps beside a save: median {statistics.median(beside):.2f} s ({say(beside)})")
    lost = [with_save - without for with_save, without in zip(beside, alone, strict=False)]
    share = statistics.median(lost) / statistics.median(alone)
    print(f"a save costs {statistics.median(lost):.2f} s, {share:.1%} of a step ({say(lost)})")
    print(f"  it blocks {statistics.median(blocked[1:]):.2f} s ({say(blocked[1:])}), takes {say(taken[1:])}")


if __name__ == "__main__":
    main()

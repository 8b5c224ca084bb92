"""Cost of an asynchronous save: the time that it blocks training, and the slowdown of the step that runs beside it.

    python -m benchmarks.checkpoints                            one process, two threads, the demo model
    python -m benchmarks.checkpoints --pairs-per-step 16 --steps 7

All steps use the same pairs, and every other step runs while a checkpoint is written; adjacent steps are compared. A
step's time includes the blocking part of the save before it.
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
from benchmarks.pairs import generate_pairs
from dpo_ray.config import Config
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import load_record_tokenizer
from dpo_ray.train.checkpoint import Checkpointer
from dpo_ray.train.offline import train_offline
from dpo_ray.types import Metrics

WARM_UP = 2
"""First steps, not counted: threads start and memory is allocated, also for the first save."""


class Clock:
    """A Reporter that records when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

    def start(self, step: int, round: int = 0) -> None:
        """Ignored."""

    def step(self, metrics: Metrics) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())

    def round(self, metrics: Metrics) -> None:
        """Ignored."""

    def evaluation(self, metrics: Metrics) -> None:
        """Ignored."""

    def stop_requested(self) -> bool:
        """Always False."""
        return False


def run(_: int, tree: dict[str, Any], threads: int, results: Any) -> None:
    """Train; ``results`` gets the seconds of each step, and the blocking and total seconds of each save."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", rank=0, world_size=1)
    config = Config.model_validate(tree)
    pairs = prepare_pairs(config.data.train, load_record_tokenizer(config), folder=config.reference.cache_path)
    blocked: list[float] = []
    taken: list[float] = []
    save = Checkpointer.save

    def timed(self: Checkpointer, *arguments: Any) -> None:
        started = time.perf_counter()
        save(self, *arguments)
        blocked.append(time.perf_counter() - started)
        assert self.pending is not None
        self.pending.add_done_callback(lambda _: taken.append(time.perf_counter() - started))

    Checkpointer.save = timed  # type: ignore[method-assign]
    clock = Clock()
    train_offline(config, pairs=pairs, held_out=None, device=torch.device("cpu"), reporter=clock)
    results.put(([end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)], blocked, taken))
    dist.destroy_process_group()


def main() -> None:
    """Run and print the timings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="a model directory")
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps, an odd number")
    parser.add_argument("--pairs-per-step", type=int, default=4, help="preference pairs per optimizer step")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=1024, help="largest micro-batch")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29541")
    with tempfile.TemporaryDirectory() as folder:
        pairs = generate_pairs("answers", arguments.pairs_per_step)
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
        while not context.join(timeout=5):  # raises the run's error
            pass
        steps, blocked, taken = results.get()
    # Saves follow steps 2, 4, ...: step 3 runs beside the first save. Entry i is the time of step i + 2.
    beside, alone = steps[WARM_UP + 1 :: 2], steps[WARM_UP::2]
    listed = lambda seconds: ", ".join(f"{second:.2f}" for second in seconds)  # noqa: E731
    print(f"steps alone: median {statistics.median(alone):.2f} s ({listed(alone)})")
    print(f"steps beside a save: median {statistics.median(beside):.2f} s ({listed(beside)})")
    slowdown = [with_save - without for with_save, without in zip(beside, alone, strict=False)]
    share = statistics.median(slowdown) / statistics.median(alone)
    print(f"a save costs {statistics.median(slowdown):.2f} s, {share:.1%} of a step ({listed(slowdown)})")
    print(f"  blocking {statistics.median(blocked[1:]):.2f} s ({listed(blocked[1:])}), in all {listed(taken[1:])}")


if __name__ == "__main__":
    main()

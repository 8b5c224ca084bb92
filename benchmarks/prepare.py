"""Data preparation at scale: a million short pairs are tokenized on a Ray cluster, reopened, and read in random order.

python -m benchmarks.prepare models/smollm2-135m-instruct --pairs 1000000
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil

from benchmarks.pairs import TEXTS
from dpo_ray.config.schema import ClusterConfig, DataConfig
from dpo_ray.data.loader import BatchShape, PairLoader
from dpo_ray.data.store import prepare_pairs
from dpo_ray.data.tokenize import RecordTokenizer
from dpo_ray.data.tokenizer import load_tokenizer
from dpo_ray.launch.cluster import ray_cluster
from dpo_ray.launch.data import tokenize_on_cluster


class MemoryWatch(threading.Thread):
    """Memory of the tokenizing processes, sampled every second together with the share of finished work."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.share, self.samples, self.ended = 0.0, [], threading.Event()

    def run(self) -> None:
        """Sample until ``ended``; counts a process's own memory, not the files that it maps."""
        while not self.ended.wait(1.0):
            sizes = [
                process.memory_info().rss - process.memory_info().shared
                for process in psutil.Process().children(recursive=True)
                if process.name().startswith("ray::")
            ]
            self.samples.append((self.share, max(sizes, default=0) / 2**20))

    def largest(self, begin: float, end: float) -> float:
        """MiB of the largest process while the share of finished work was in [begin, end)."""
        return max((mib for share, mib in self.samples if begin <= share < end), default=float("nan"))


def write_pairs(file: Path, count: int, words: int) -> None:
    """Write ``count`` different pairs of about ``words`` words per part, as JSONL."""
    vocabulary, draw = TEXTS.read_text(encoding="utf-8").split(), random.Random(0)
    with file.open("w") as out:
        for i in range(count):
            parts = [
                " ".join(
                    vocabulary[(at := draw.randrange(len(vocabulary) - 2 * words)) : at + draw.randint(1, 2 * words)]
                )
                for _ in range(3)
            ]
            record = {"prompt": f"{i}: {parts[0]}", "chosen": f" {parts[1]} a", "rejected": f" {parts[2]} b"}
            out.write(json.dumps(record) + "\n")


def main() -> None:
    """Prepare, reopen and read; print the time of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory with a tokenizer")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="number of pairs")
    parser.add_argument("--words", type=int, default=12, help="mean words of prompt, chosen and rejected each")
    parser.add_argument("--cpus", type=int, default=2, help="concurrent tasks")
    parser.add_argument("--folder", help="keep the data here; usable as cache_dir of runs on the same pairs.jsonl")
    arguments = parser.parse_args()
    tokenizer = RecordTokenizer(load_tokenizer(arguments.model), DataConfig())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(arguments.folder or name)
        folder.mkdir(parents=True, exist_ok=True)
        write_pairs(folder / "pairs.jsonl", arguments.pairs, arguments.words)
        print(f"{arguments.pairs:,} pairs, {(folder / 'pairs.jsonl').stat().st_size / 2**20:.0f} MiB of JSONL")
        prepare = partial(prepare_pairs, [str(folder / "pairs.jsonl")], tokenizer, folder=folder / "data")
        watch = MemoryWatch()

        def progress(done: int, total: int) -> None:
            watch.share = done / total
            print(f"\r{done:,} of {total:,}", end="", flush=True)

        with ray_cluster(ClusterConfig(cpus_per_worker=max(1, arguments.cpus - 2)), engines=0) as cluster:
            watch.start()
            begin = time.perf_counter()
            prepare(run_parts=partial(tokenize_on_cluster, cluster), on_progress=progress)
            seconds = time.perf_counter() - begin
            watch.ended.set()
        print(f"\rprepared in {seconds:.0f} s: {arguments.pairs / seconds:,.0f} pairs/s on {cluster.cpus} logical CPUs")
        print(
            f"largest process: {watch.largest(0.05, 0.3):.0f} MiB in the first third of the work, "
            f"{watch.largest(0.7, 1.01):.0f} MiB in the last"
        )
        before, begin = psutil.Process().memory_info(), time.perf_counter()
        store = prepare()
        print(f"reopened in {time.perf_counter() - begin:.2f} s; {store.lengths.sum():,} tokens")
        shape = BatchShape(dp_rank=0, dp_size=8, tokens_per_micro_batch=4096, attention_cost=0.0)
        loader, times = PairLoader(store, shape, pairs_per_step=64, seed=0, shuffle=True), []
        for _ in range(500):
            begin = time.perf_counter()
            next(loader)
            times.append(time.perf_counter() - begin)
        after = psutil.Process().memory_info()
        grown = (after.rss - after.shared - before.rss + before.shared) / 2**20
        print(
            f"first step's batch in {times[0]:.2f} s, median {statistics.median(times) * 1e3:.1f} ms for 64 pairs; "
            f"the reader's memory grew by {grown:.0f} MiB over 500 steps"
        )


if __name__ == "__main__":
    main()

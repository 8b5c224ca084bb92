"""Online DPO: whole rounds against TRL's OnlineDPOTrainer, generation against bare vLLM, and who waits for whom.

    python -m benchmarks.online trl       rounds of 32 prompts x 2 completions x 48 tokens, alternating with TRL; by
                                          default at its best: at its defaults it generates without a cache of keys
                                          and values, which takes many minutes per round
    python -m benchmarks.online engine    tokens per second of an engine and of vllm.LLM on the same prompts
    python -m benchmarks.online waits     seconds per round and shares of waiting, with max_lag 0 and 1, and with a
                                          judge of 0 and of 2 s per prompt; pushes

Each run is a process of its own. Times are those of rounds after the first, without start-up and evaluation.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.offline import fast_dtype
from dpo_ray.ops.cpu import cpu_model
from dpo_ray.types import CompletionGroup

PROMPTS = Path(__file__).parents[1] / "jobs/data/demo_prompts.jsonl"
LENGTH = {"temperature": 1.0, "max_tokens": 48, "min_tokens": 48}
SLOW_S = 2.0
TRL: dict[str, dict[str, Any]] = {"defaults": {}, "best": {"gradient_checkpointing": False}}
"""TRL's settings beyond those that make the work equal."""
VARIANTS: dict[str, dict[str, Any]] = {
    "max_lag 0": {},
    "max_lag 1": {"online.max_lag": 1},
    "max_lag 0, judge of 2 s": {
        "online.judge.use": f"{__name__ if __name__ != '__main__' else 'benchmarks.online'}:slow"
    },
    "max_lag 1, judge of 2 s": {"online.max_lag": 1, "online.judge.use": "benchmarks.online:slow"},
}


async def slow(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    """A judge that takes two seconds per prompt, as an endpoint does; prefers long texts."""
    await asyncio.sleep(SLOW_S * len(groups))
    return [[float(len(completion.text)) for completion in group.completions] for group in groups]


def free(groups: Sequence[CompletionGroup]) -> list[list[float]]:
    """The same scores at once."""
    return [[float(len(completion.text)) for completion in group.completions] for group in groups]


def main() -> None:
    """Runs a comparison and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["trl", "engine", "waits"])
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="a model directory")
    parser.add_argument("--repeat", type=int, default=2, help="alternating runs")
    parser.add_argument("--rounds", type=int, default=4, help="rounds per run; the first is not timed")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per round")
    parser.add_argument("--trl", choices=list(TRL), nargs="+", default=["best"], help="settings of TRL")
    arguments = parser.parse_args()
    {"trl": against_trl, "engine": against_vllm, "waits": waits}[arguments.what](arguments)


def against_trl(arguments: argparse.Namespace) -> None:
    """Seconds per round of one optimizer step; both sides may use two threads."""
    size = {"cluster.cpus_per_worker": 2, "cluster.cpus_per_engine": 2, "online.judge.use": "benchmarks.online:free"}
    bf16 = fast_dtype() == "bfloat16"
    ours: list[float] = []
    trl: dict[str, list[float]] = {name: [] for name in arguments.trl}
    for _ in range(arguments.repeat):
        ours += [seconds(line) for line in run_rounds(arguments, size)]
        for name, values in trl.items():
            values += side("trl", arguments, settings=TRL[name], bf16=bf16)["seconds"]
    table = Table("", "seconds per round, median", "range", "ratio")
    table.title = f"{arguments.prompts} prompts x 2 x 48 tokens, {fast_dtype()}, {cpu_model()}"
    rows = {"dpo_ray": ours, **{f"TRL OnlineDPOTrainer, {name}": values for name, values in trl.items()}}
    for label, values in rows.items():
        median_s = statistics.median(values)
        ratio = f"{median_s / statistics.median(ours):.2f}"
        table.add_row(label, f"{median_s:.1f}", f"{min(values):.1f} to {max(values):.1f}", ratio)
    Console().print(table)


def against_vllm(arguments: argparse.Namespace) -> None:
    """Tokens per second of the same requests through an engine and through ``vllm.LLM.generate``, alternating."""
    rows = side("engine", arguments)["pairs"]
    ratios = [ours / bare for bare, ours in rows]
    table = Table("", "tokens/s, median", title="64 prompts x 2 x 48 tokens, one thread")
    table.add_row("vllm.LLM.generate", f"{statistics.median(bare for bare, _ in rows):.0f}")
    table.add_row("engine", f"{statistics.median(ours for _, ours in rows):.0f}")
    table.add_row("ratio", f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    Console().print(table)


def waits(arguments: argparse.Namespace) -> None:
    """Seconds per round of each variant; generation and training have a core each."""
    columns = ("s per round", "engines wait", "judge waits", "workers train", "workers wait", "push", "workers in push")
    table, megabytes = (
        Table("", *columns),
        sum(f.stat().st_size for f in Path(arguments.model).glob("*.safetensors")) / 1e6,
    )
    lines: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.repeat):
        for name, variant in VARIANTS.items():
            lines[name] += run_rounds(arguments, {"online.judge.use": "benchmarks.online:free"} | variant)
    for name, of_variant in lines.items():
        total = statistics.median(map(seconds, of_variant))
        busy = {key: median(of_variant, f"perf/{key}_s") / total for key in ("generate", "judge", "train", "wait")}
        shares = (1 - busy["generate"], 1 - busy["judge"], busy["train"], busy["wait"])
        push_s, sync_s = (median(of_variant, f"perf/{key}_s") for key in ("push", "sync"))
        push = f"{push_s:.2f} s, {megabytes / push_s:.0f} MB/s" if push_s else "-"
        table.add_row(name, f"{total:.1f}", *(f"{max(0.0, share):.0%}" for share in shares), push, f"{sync_s:.2f} s")
    Console().print(table)


def run_rounds(arguments: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that end a round, without the first, of a run of ``jobs.online``."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "run": {"dir": folder, "name": "run", "export": False, "save_every": None, "eval_every": None},
            "model": {"path": arguments.model},
            "data": {"max_prompt_tokens": 256},
            "optim": {"lr": 1e-6, "pairs_per_step": arguments.prompts, "schedule": "constant"},
            "online": {
                "prompts": str(PROMPTS),
                "rounds": arguments.rounds,
                "prompts_per_round": arguments.prompts,
                "candidates": 2,
                "sampling": LENGTH,
                "kl_samples": 1,
            },
        }
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        overrides = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "jobs.online", str(file), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, (Path(folder) / "run/metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "round" in line][1:]


def seconds(line: dict[str, float]) -> float:
    """Duration of a round for the training workers."""
    return sum(line[f"perf/{phase}_s"] for phase in ("wait", "train", "sync"))


def median(lines: Iterable[dict[str, float]], key: str) -> float:
    """Median of a metric over the lines that have it."""
    return statistics.median([line[key] for line in lines if key in line] or [0.0])


def side(name: str, arguments: argparse.Namespace, **settings: Any) -> Any:
    """Result of a function of ``benchmarks.online_sides``, which gets ``settings``, in a process of its own."""
    threads = {"OMP_NUM_THREADS": "2" if name == "trl" else "1"}
    given = {"model": arguments.model, "prompts": arguments.prompts, "rounds": arguments.rounds, **settings}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.online_sides", name, json.dumps(given | {"repeat": arguments.repeat})],
        check=True,
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

"""Offline DPO against TRL's DPOTrainer: the same model, pairs, order, batch and precision, in alternating runs.

    python -m benchmarks.offline                          long answers and dialogues, TRL's defaults and best settings
    python -m benchmarks.offline --kind dialogue --trl best
    python -m benchmarks.offline --pairs my_pairs.jsonl --limit 32      these pairs instead of long answers

Prints the class of the CPU, a table per kind of pairs, and the useful operations per second of passes and steps as a
share of the limit: what the model's matrix products reach on the best path of this machine.

Each run is a process of its own with the same number of threads. Timings cover the reference pass and the optimizer
steps, not model loading and tokenization. Memory is the peak resident size of the process.

Both sides compute in the same precision: bfloat16 if the CPU has instructions for it, else float32. Without them torch
multiplies bfloat16 tensors at a hundredth of its float32 rate, which would dominate the comparison.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.pairs import KINDS, generate_pairs
from dpo_ray.ops.cpu import cpu_environment, cpu_model

OURS = "dpo_ray"
FIGURES = (
    ("pairs/s", "pairs_per_s", "{:.3f}"),
    ("tokens/s", "tokens_per_s", "{:.0f}"),
    ("peak memory, MiB", "peak_mib", "{:.0f}"),
    ("reference pass, s", "reference_s", "{:.1f}"),
    ("steps, s", "train_s", "{:.1f}"),
    ("processor time with loading, s", "cpu_s", "{:.1f}"),
    ("last loss", "loss", "{:.5f}"),
)
TRL = {
    "defaults": {},
    "best": {"precompute_ref_log_probs": True, "gradient_checkpointing": False, "micro_batch": 2},
}
"""TRL's settings beyond those that make the work equal. Without checkpointing, a micro-batch of 8 pairs does not fit
24 GB; one of 2 also needs less padding."""


def main() -> None:
    """Run the comparison and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="a model directory")
    parser.add_argument(
        "--kind", choices=sorted(KINDS), nargs="+", default=sorted(KINDS), help="lengths of the generated pairs"
    )
    parser.add_argument("--pairs", help="a file of pairs, instead of generated answers")
    parser.add_argument("--limit", type=int, default=24, help="number of pairs; one epoch")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=1024, help="largest micro-batch of dpo_ray")
    parser.add_argument("--trl", choices=sorted(TRL), nargs="+", default=["defaults", "best"], help="settings of TRL")
    parser.add_argument(
        "--trl-micro-batch", type=int, help="per_device_train_batch_size with TRL's defaults; default: pairs per step"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=fast_dtype(), help="for both sides")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--out", type=Path, help="JSON file for all results of all runs")
    arguments = parser.parse_args()
    if arguments.pairs and "answers" not in arguments.kind:
        parser.error("--pairs replaces the generated answers, which --kind leaves out")

    console = Console()
    console.print(f"{cpu_model()}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f} at the start")
    results = [compare(arguments, kind, console) for kind in arguments.kind]
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def compare(arguments: argparse.Namespace, kind: str, console: Console) -> dict[str, Any]:
    """Alternating runs of all sides on one kind of pairs; prints their table."""
    source = arguments.pairs if kind == "answers" else None
    with tempfile.TemporaryDirectory() as folder:
        task = prepare(arguments, kind, source, Path(folder))
        console.print(
            f"{source or kind}: {task['pairs']} pairs, {task['tokens']} tokens, each prompt counted once, "
            f"{task['pairs_per_step']} pairs per step, {task['threads']} threads, {task['dtype']}"
        )
        runs = []
        for turn in range(arguments.runs):
            run = {OURS: one_run("ours", task, Path(folder) / f"ours-{turn}")}
            for name in arguments.trl:
                settings = task | {"trl": {"micro_batch": task["trl_micro_batch"]} | TRL[name]}
                run[f"TRL, {name}"] = one_run("trl", settings, Path(folder) / f"{name}-{turn}")
            runs.append(run)
            speeds = ", ".join(f"{side} {result['pairs_per_s']:.3f}" for side, result in run.items())
            console.print(f"run {turn + 1} of {arguments.runs}, pairs/s: {speeds}")
        print_result(console, runs)
        shares = one_run("parts", task, Path(folder) / "parts")["parts"]
        listed = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        console.print(
            f"time of dpo_ray's pass and steps, under the profiler: {listed}, rest {1 - sum(shares.values()):.0%}"
        )
    return {"kind": source or kind, "task": task, "runs": runs}


def fast_dtype() -> str:
    """The narrowest precision that this CPU has matrix instructions for."""
    import torch

    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if multiplies else "float32"


def prepare(arguments: argparse.Namespace, kind: str, source: str | None, folder: Path) -> dict[str, Any]:
    """The task of both sides: a file of pairs that fit TRL's default of 1024 tokens per sequence, and their sizes."""
    from dpo_ray.config.schema import DataConfig
    from dpo_ray.data.store import prepare_pairs
    from dpo_ray.data.tokenize import RecordTokenizer
    from dpo_ray.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    if source is None:
        source = str(folder / "generated.jsonl")
        Path(source).write_text("".join(json.dumps(pair) + "\n" for pair in generate_pairs(kind, 200)))
    data = DataConfig(max_prompt_tokens=None, max_completion_tokens=None)
    store = prepare_pairs([source], RecordTokenizer(tokenizer, data), folder=folder / "all")
    fitting = [i for i, (p, c, r) in enumerate(store.lengths.tolist()) if p + max(c, r) <= 1024][: arguments.limit]
    if not fitting:
        raise SystemExit(f"no pair of {source} fits 1024 tokens with the tokenizer of {arguments.model}")
    from dpo_ray.data.formats import Part
    from dpo_ray.data.records import read_pairs

    wanted = {store.record_of(i)[1] for i in fitting}
    records = [r for r in read_pairs([Part(source)]) if getattr(r, "number", None) in wanted]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps({k: as_json(getattr(r, k)) for k in ("prompt", "chosen", "rejected")}) + "\n"
                            for r in records))  # fmt: skip
    lengths = store.lengths[fitting]
    return {
        "model": str(Path(arguments.model).absolute()),
        "file": str(file),
        "pairs": len(fitting),
        "tokens": int(lengths.sum()),
        "lengths": lengths.tolist(),
        "dtype": arguments.dtype,
        "pairs_per_step": arguments.pairs_per_step,
        "tokens_per_micro_batch": arguments.tokens_per_micro_batch,
        "threads": arguments.threads,
        "trl_micro_batch": arguments.trl_micro_batch or arguments.pairs_per_step,
    }


def as_json(messages: Any) -> Any:
    """Text unchanged, messages as a list of dicts."""
    return messages if isinstance(messages, str) else [dict(message) for message in messages]


def one_run(side: str, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One side's run in a process of its own; both sides get the memory settings of our workers."""
    folder.mkdir()
    environment = os.environ | cpu_environment(task["threads"]) | {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_run", side, json.dumps(task), str(folder)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"{side} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    result = json.loads((folder / "result.json").read_text())
    seconds = result["reference_s"] + result["train_s"]
    return result | {
        "pairs_per_s": task["pairs"] / seconds,
        "tokens_per_s": task["tokens"] / seconds,
        "process_s": time.monotonic() - started,
    }


def print_result(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """Print each figure as median (min to max), and the ratio of dpo_ray to each other side in the same run."""
    table = Table(title=f"median (min to max) of {len(runs)} alternating runs")
    table.add_column("")
    for side in runs[0]:
        table.add_column(side, justify="right")
        if side != OURS:
            table.add_column(f"{OURS} : {side}", justify="right")
    for name, key, form in FIGURES:
        cells = []
        for side in runs[0]:
            cells.append(summary([run[side][key] for run in runs], form))
            if side != OURS:
                ratios = [run[OURS][key] / run[side][key] for run in runs if run[side][key]]
                cells.append(summary(ratios, "{:.2f}") if ratios else "-")
        table.add_row(name, *cells)
    console.print(table)
    peak = statistics.median(run[OURS]["peak_gflops"] for run in runs)
    reached = statistics.median(run[OURS]["useful_gflops"] for run in runs)
    scoring = statistics.median(run[OURS]["reference_gflops"] for run in runs)
    console.print(
        f"dpo_ray's steps do {reached:.0f} GFLOP/s of useful work, {reached / peak:.0%} of the {peak:.0f} that the "
        f"model's matrix products reach on this machine's best path; the reference pass {scoring:.0f}"
    )


def summary(values: Sequence[float], form: str) -> str:
    """``median (min to max)``."""
    shown = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return "{} ({} to {})".format(*shown)


if __name__ == "__main__":
    main()

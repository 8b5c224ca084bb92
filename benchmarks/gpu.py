"""One training step on one GPU: prompt-shared rows, rows without padding, and padded batches.

    python -m benchmarks.gpu --shape 1b --kind chat       writes gpu.json after each turn, and prints a table
    python -m benchmarks.gpu --tiny                       a dry run, also on a CPU

Needs torch and transformers only. Weights and tokens are random; lengths follow real kinds of preference data. Before
anything is timed, all sides must agree on log-probabilities, and in float32 also on gradients. Then the sides take the
same steps on the same pairs in turn.

gpu_sides.py defines the sides. Weights, gradients and AdamW state are bfloat16 on every side, 8 bytes per weight: 64 GB
of an 80 GB card for 8B, which needs activation recomputation. A side that runs out of memory retries with half the
micro-batch; a side that fails is reported and the others continue.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.flops import step_flops
from benchmarks.gpu_sides import (
    KINDS,
    SHAPES,
    SMALLEST,
    Side,
    build,
    check,
    error_summary,
    lengths_of,
    random_pairs,
    sides,
    use,
)  # fmt: skip
from dpo_ray.types import TokenPair

FITS = {"3b": ("none", 8192), "8b": ("full", 8192)}
"""Recomputation and tokens per micro-batch that fit an 80 GB card, for shapes that do not fit with ("none", 16384). A
layer saves about 8 times the hidden plus 4 times the intermediate size per token, in bfloat16: 3.2 MB over all layers
of 3b beside 26 GB of weights, 5.8 MB over all layers of 8b beside 64 GB."""
CARDS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0,
}  # fmt: skip
"""Dense bfloat16 TFLOP/s by data sheet and part of the card's name; the first match counts."""
PARTS = ("reference", "forward", "backward", "optimizer")


class Stopwatch:
    """Seconds of named parts; waits for the device at the end of each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.began = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def part(self, name: str) -> None:
        """End a part."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.began
        self.began = now


def one_step(
    model: Any,
    side: Side,
    size: int,
    pairs: Sequence[TokenPair],
    optimizer: Any,
    arguments: argparse.Namespace,
    *,
    parts: bool,
) -> dict[str, Any]:
    """Take one step; with ``parts``, time its parts separately, which costs some overlap."""
    device = model.device
    use(model, side, arguments.recompute)
    second = build(arguments.shape, device, torch.bfloat16) if side.second_model else None
    if second is not None:
        use(second, side, "none")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch(device)
    total = torch.zeros((), device=device)
    if second is not None:
        with torch.no_grad():
            for _ in side.micro_batches(second, pairs, size):
                pass
        if parts:
            watch.part("reference")
    for _, losses in side.micro_batches(model, pairs, size):
        loss = losses.total / len(pairs)
        if parts:
            watch.part("forward")
        loss.backward()
        total += loss.detach()
        if parts:
            watch.part("backward")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    watch.part("optimizer" if parts else "step")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return watch.seconds | {"peak_gib": peak, "loss": float(total), "size": size}


def attempt(step: Callable[[int], dict[str, Any]], size: int, least: int) -> dict[str, Any] | str:
    """``step(size)``, retried with half the size after running out of memory, down to ``least``; or the error."""
    while True:
        try:
            return step(size)
        except torch.cuda.OutOfMemoryError as error:
            problem, size = error_summary(error), size // 2
        except Exception as error:
            return error_summary(error)
        # Only here, after the traceback, which references the tensors, is gone.
        torch.cuda.empty_cache()
        if size < least:
            return problem


def measure(arguments: argparse.Namespace, device: torch.device, result: dict[str, Any]) -> None:
    """Time steps of every side in turn, after one turn to compile and one to time the parts; writes after each turn."""
    model = build(arguments.shape, device, torch.bfloat16, compiled=arguments.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    pairs = random_pairs(arguments.kind, arguments.pairs, SHAPES[arguments.shape].vocabulary, arguments.longest)
    active = {name: side for name, side in sides(device).items() if name not in result["failed"]}
    sizes = {
        name: arguments.padded_pairs if side.in_pairs else arguments.tokens_per_micro_batch
        for name, side in active.items()
    }
    result |= {"lengths": lengths_of(pairs).tolist(), "runs": {name: [] for name in active}, "parts": {}}
    longest = 0.0
    for turn in range(arguments.runs + 2):
        began = time.perf_counter()
        if began + longest >= arguments.deadline:
            result["stopped"] = f"after {turn} of {arguments.runs + 2} turns: --seconds {arguments.seconds}"
            print(f"stopped {result['stopped']}", flush=True)
            break
        for name, side in active.items():
            if name in result["failed"]:
                continue

            def step(size: int, side: Side = side, turn: int = turn) -> dict[str, Any]:
                optimizer.zero_grad(set_to_none=True)
                return one_step(model, side, size, pairs, optimizer, arguments, parts=turn == 1)

            run = attempt(step, sizes[name], 1 if side.in_pairs else SMALLEST)
            if isinstance(run, str):
                result["failed"][name] = run
                print(f"{name} fails: {run}", flush=True)
                continue
            if run["size"] < sizes[name]:
                sizes[name] = run["size"]
                result["runs"][name].clear()  # earlier runs had a larger micro-batch
            if turn == 1:
                result["parts"][name] = run
            elif turn > 1:
                result["runs"][name].append({"turn": turn, **run})
        write(arguments, result)
        if turn > 0:  # the first compiles
            longest = max(longest, time.perf_counter() - began)
        print(f"turn {turn + 1} of {arguments.runs + 2} done", flush=True)


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write ``result`` to --out."""
    arguments.out.write_text(json.dumps(result, indent=1))


def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s of a large bfloat16 matrix product."""
    size = 8192 if device.type == "cuda" else 256  # a CPU may lack bfloat16 instructions
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(12):
        watch = Stopwatch(device)
        a @ b
        watch.part("product")
        seconds.append(watch.seconds["product"])
    return 2 * size**3 / statistics.median(seconds) / 1e12


def table(result: dict[str, Any]) -> str:
    """The results as Markdown: medians (min to max). Micro-batches are in tokens, or in pairs on padded sides."""
    lines = [
        "| | micro-batch | pairs/s | tokens/s | dpo_ray is faster by | useful FLOPs of peak | peers' count of peak | "
        "peak GiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lengths = np.array(result["lengths"])
    useful, counted = step_flops(SHAPES[result["shape"]], lengths)
    peak = 1e12 * result["peak_tflops"]
    ours = {run["turn"]: run["step"] for run in result["runs"].get("dpo_ray", [])}
    for name, runs in result["runs"].items():
        if not runs:
            continue
        seconds = {run["turn"]: run["step"] for run in runs}
        median = statistics.median(seconds.values())
        ratios = [seconds[turn] / ours[turn] for turn in seconds if turn in ours]
        faster = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        memory = f"{max(run['peak_gib'] for run in runs):.1f}" if runs[0]["peak_gib"] is not None else ""
        lines.append(
            f"| {name} | {runs[0]['size']:,} | {len(lengths) / median:.2f} | {lengths.sum() / median:.0f} | "
            f"{faster} | {useful / median / peak:.1%} | {counted / median / peak:.1%} | {memory} |"
        )
    for name, run in result["parts"].items():
        parts = ", ".join(f"{part} {1e3 * run[part]:.0f} ms" for part in PARTS if part in run)
        lines.append(f"\n{name}: {parts}")
    lines += [f"\n{name} failed: {problem}" for name, problem in result["failed"].items()]
    return "\n".join(lines)


def main() -> None:
    """Check the sides, time them, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b", help="size of the model")
    parser.add_argument("--kind", choices=sorted(KINDS), default="chat", help="distribution of the lengths")
    parser.add_argument("--pairs", type=int, default=32, help="pairs per step")
    parser.add_argument("--longest", type=int, default=4096, help="largest length of a prompt or completion, in tokens")
    parser.add_argument("--tokens-per-micro-batch", type=int, help="on sides without padding; default: by shape")
    parser.add_argument("--padded-pairs", type=int, default=4, help="pairs per micro-batch on padded sides")
    parser.add_argument(
        "--recompute", choices=("none", "selective", "full"), help="recomputed activations; default: by shape"
    )
    parser.add_argument("--runs", type=int, default=5, help="timed steps per side")
    parser.add_argument("--seconds", type=float, default=540, help="start no turn that would end later than this")
    parser.add_argument("--compile", action="store_true", help="compile each layer, on all sides")
    parser.add_argument("--tiny", action="store_true", help="a dry run of a few seconds, also on a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file for all results")
    arguments = parser.parse_args()
    arguments.deadline = time.perf_counter() + arguments.seconds
    if arguments.tiny:
        arguments.shape, arguments.pairs, arguments.longest, arguments.runs = "tiny", 2, 24, 2
    recompute, tokens = FITS.get(arguments.shape, ("none", 16384))
    arguments.recompute = arguments.recompute or recompute
    arguments.tokens_per_micro_batch = arguments.tokens_per_micro_batch or tokens
    if arguments.compile and arguments.recompute == "selective":
        raise SystemExit("--compile does not work with --recompute selective; use none or full")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        raise SystemExit("this machine has no GPU; --tiny is a dry run on the CPU")

    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    differences, failed = check(device)
    for name, problem in failed.items():
        print(f"{name} is skipped: {problem}", flush=True)
    measured = matmul_tflops(device)
    stated = next((peak for name, peak in CARDS.items() if name in card), None)
    result: dict[str, Any] = {
        "card": card,
        "torch": torch.__version__,
        "shape": arguments.shape,
        "kind": arguments.kind,
        "recompute": arguments.recompute,
        "compile": arguments.compile,
        "apart": differences,
        "failed": failed,
        "matmul_tflops": measured,
        "peak_tflops": stated or measured,
    }
    write(arguments, result)
    measure(arguments, device, result)
    print(
        f"\n{card}, torch {torch.__version__}, {arguments.shape}, {arguments.kind}, {arguments.pairs} pairs per step, "
        f"recompute: {arguments.recompute}, layers {'compiled' if arguments.compile else 'not compiled'}"
    )
    peak = f"{stated:.0f} by data sheet" if stated else f"{measured:.2f} measured"
    print(f"peak: {peak} TFLOP/s; a large bfloat16 matrix product reaches {measured:.2f}\n")
    print(table(result))
    write(arguments, result)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

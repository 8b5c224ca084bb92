"""One training step on one GPU: prompt-shared rows against a padded rectangle and against two rows without padding.

    python -m benchmarks.gpu --shape 1b --kind chat       writes gpu.json as it goes, and prints a table
    python -m benchmarks.gpu --tiny                       the same on a CPU, to see that it runs

Needs torch and transformers, no Ray and no model: weights and tokens are random, lengths are those of real kinds of
pairs. Before anything is timed, all sides must give the same log-probabilities, and the same gradients where the
weights are float32. Then each side takes the same steps on the same pairs in turn.

What is compared stands in gpu_sides.py. Weights, gradients and AdamW are bfloat16 on every side, 8 bytes a weight: 64
GB of an 80 GB card for 8B, which leaves room for activations only where they are computed again. A side that runs out
of memory tries half the micro-batch; one that fails is named and the others go on.
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
    lengths_of,
    made_tokens,
    said,
    sides,
    use,
)  # fmt: skip
from dpo_ray.types import TokenPair

FITS = {"3b": ("none", 8192), "8b": ("full", 8192)}
"""What an 80 GB card takes where it does not take ("none", 16384): recomputation, and tokens of a micro-batch. What a
layer keeps of a token is about 8 times the hidden and 4 times the intermediate size, in bfloat16: 3.2 MB over the
layers of 3b beside 26 GB of weights, 5.8 MB over those of 8b beside 64 GB."""
CARDS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0,
}  # fmt: skip
"""Dense bfloat16 TFLOP/s that the maker states, by a part of the card's name; the first that fits counts."""
PARTS = ("reference", "forward", "backward", "optimizer")


class Stopwatch:
    """Seconds of named parts, the device waited for at each end."""

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
    """Take one step; with ``parts``, waiting for the device between them, which costs some overlap."""
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
    """``step(size)``, of half the size as often as it runs out of memory, down to ``least``; or what it failed with."""
    while True:
        try:
            return step(size)
        except torch.cuda.OutOfMemoryError as error:
            problem, size = said(error), size // 2
        except Exception as error:
            return said(error)
        # Not before: the traceback held the tensors.
        torch.cuda.empty_cache()
        if size < least:
            return problem


def measure(arguments: argparse.Namespace, device: torch.device, result: dict[str, Any]) -> None:
    """Steps of every side in turn, after two of each that are not timed as such; ``result`` is written as it grows."""
    model = build(arguments.shape, device, torch.bfloat16, compiled=arguments.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    pairs = made_tokens(arguments.kind, arguments.pairs, SHAPES[arguments.shape].vocabulary, arguments.longest)
    ways = {name: side for name, side in sides(device).items() if name not in result["failed"]}
    sizes = {
        name: arguments.padded_pairs if side.in_pairs else arguments.tokens_per_micro_batch
        for name, side in ways.items()
    }
    result |= {"lengths": lengths_of(pairs).tolist(), "runs": {name: [] for name in ways}, "parts": {}}
    longest = 0.0
    for turn in range(arguments.runs + 2):
        began = time.perf_counter()
        if began + longest >= arguments.deadline:
            result["stopped"] = f"after {turn} of {arguments.runs + 2} turns: --seconds {arguments.seconds}"
            print(f"stopped {result['stopped']}", flush=True)
            break
        for name, side in ways.items():
            if name in result["failed"]:
                continue

            def step(size: int, side: Side = side, turn: int = turn) -> dict[str, Any]:
                optimizer.zero_grad(set_to_none=True)
                return one_step(model, side, size, pairs, optimizer, arguments, parts=turn == 1)

            found = attempt(step, sizes[name], 1 if side.in_pairs else SMALLEST)
            if isinstance(found, str):
                result["failed"][name] = found
                print(f"{name} fails: {found}", flush=True)
                continue
            if found["size"] < sizes[name]:
                sizes[name] = found["size"]
                result["runs"][name].clear()  # of another size
            if turn == 1:
                result["parts"][name] = found
            elif turn > 1:
                result["runs"][name].append({"turn": turn, **found})
        write(arguments, result)
        if turn > 0:  # the first compiles
            longest = max(longest, time.perf_counter() - began)
        print(f"turn {turn + 1} of {arguments.runs + 2} done", flush=True)


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Keep what there is."""
    arguments.out.write_text(json.dumps(result, indent=1))


def matmul_tflops(device: torch.device) -> float:
    """What a large bfloat16 matrix product reaches."""
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
    """The figures in Markdown: medians (least to most). Micro-batches are in tokens, those of padded sides in pairs."""
    lines = [
        "| | micro-batch | pairs/s | tokens/s | dpo_ray is faster by | useful FLOPs of peak | peers' count of peak | "
        "peak GiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lengths = np.array(result["lengths"])
    useful, counted = step_flops(SHAPES[result["shape"]], lengths)
    peak = 1e12 * result["peak_tflops"]
    ours = {run["turn"]: run["step"] for run in result["runs"].get("dpo_ray", [])}
    for name, found in result["runs"].items():
        if not found:
            continue
        seconds = {run["turn"]: run["step"] for run in found}
        middle = statistics.median(seconds.values())
        ratios = [seconds[turn] / ours[turn] for turn in seconds if turn in ours]
        faster = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        memory = f"{max(run['peak_gib'] for run in found):.1f}" if found[0]["peak_gib"] is not None else ""
        lines.append(
            f"| {name} | {found[0]['size']:,} | {len(lengths) / middle:.2f} | {lengths.sum() / middle:.0f} | "
            f"{faster} | {useful / middle / peak:.1%} | {counted / middle / peak:.1%} | {memory} |"
        )
    for name, found in result["parts"].items():
        spent = ", ".join(f"{part} {1e3 * found[part]:.0f} ms" for part in PARTS if part in found)
        lines.append(f"\n{name}: {spent}")
    lines += [f"\n{name} failed: {problem}" for name, problem in result["failed"].items()]
    return "\n".join(lines)


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--kind", choices=sorted(KINDS), default="chat")
    parser.add_argument("--pairs", type=int, default=32, help="in a step")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a prompt or completion")
    parser.add_argument("--tokens-per-micro-batch", type=int, help="of the sides without padding; default: by shape")
    parser.add_argument("--padded-pairs", type=int, default=4, help="pairs in a micro-batch of the padded sides")
    parser.add_argument(
        "--recompute", choices=("none", "selective", "full"), help="activations, on all sides; default: by shape"
    )
    parser.add_argument("--runs", type=int, default=5, help="timed steps of each side, in turn")
    parser.add_argument("--seconds", type=float, default=540, help="begin no turn that would end later than this")
    parser.add_argument("--compile", action="store_true", help="compile each layer, for all sides")
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds, on a CPU too")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="every figure, as JSON")
    arguments = parser.parse_args()
    arguments.deadline = time.perf_counter() + arguments.seconds
    if arguments.tiny:
        arguments.shape, arguments.pairs, arguments.longest, arguments.runs = "tiny", 4, 80, 2
    recomputed, tokens = FITS.get(arguments.shape, ("none", 16384))
    arguments.recompute = arguments.recompute or recomputed
    arguments.tokens_per_micro_batch = arguments.tokens_per_micro_batch or tokens
    if arguments.compile and arguments.recompute == "selective":
        raise SystemExit("--compile would compile nothing of a layer of which some is recomputed; take none or full")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        raise SystemExit("no GPU is here; --tiny shows that the script runs")

    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    apart, wrong = check(device)
    for name, problem in wrong.items():
        print(f"{name} is left out: {problem}", flush=True)
    measured = matmul_tflops(device)
    stated = next((peak for name, peak in CARDS.items() if name in card), None)
    result: dict[str, Any] = {
        "card": card,
        "torch": torch.__version__,
        "shape": arguments.shape,
        "kind": arguments.kind,
        "recompute": arguments.recompute,
        "compile": arguments.compile,
        "apart": apart,
        "failed": wrong,
        "matmul_tflops": measured,
        "peak_tflops": stated or measured,
    }
    write(arguments, result)
    measure(arguments, device, result)
    print(
        f"\n{card}, torch {torch.__version__}, {arguments.shape}, {arguments.kind}, {arguments.pairs} pairs a step, "
        f"recomputed: {arguments.recompute}, layers {'compiled' if arguments.compile else 'not compiled'}"
    )
    peak = f"{stated:.0f} stated by the maker" if stated else f"{measured:.2f} measured"
    print(f"peak: {peak} TFLOP/s; a large bfloat16 product reaches {measured:.2f}\n")
    print(table(result))
    write(arguments, result)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""One training step on one GPU: prompt-shared rows against a padded rectangle and against two rows without padding.

    python -m benchmarks.gpu --shape 1b --kind chat --out gpu.json
    python -m benchmarks.gpu --tiny                       the same on a CPU, to see that it runs

Needs torch and transformers, no Ray and no model: weights and tokens are random, lengths are those of real kinds of
pairs. Before anything is timed, all sides must give the same log-probabilities, and the same gradients where the
weights are float32. Then each side takes the same steps on the same pairs in turn. The padded sides do what TRL's
DPOTrainer does, written anew here: chosen and rejected in one rectangle of prompt and completion, logits of every
position; "padded, defaults" also runs a second model as the reference and recomputes activations.

Weights, gradients and AdamW are bfloat16 on every side, so that 8B fits one card. The reference pass of the others is
not in a step: ours is cached, and theirs precomputed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.flops import Shape, step_flops
from dpo_ray.data.packing import Layout, build_row, deal, row_tokens
from dpo_ray.model.attention import use_packed_attention
from dpo_ray.model.flex import use_flex_attention
from dpo_ray.model.scorer import PairLosses, Scorer, pair_losses
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import sigmoid
from dpo_ray.types import TokenPair

SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 512),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "1b": Shape(2048, 16, 32, 8, 8192, 128256),
    "3b": Shape(3072, 28, 24, 8, 8192, 128256),
    "8b": Shape(4096, 32, 32, 8, 14336, 128256),
}
TIED = {"tiny", "0.5b", "1b", "3b"}
"""Shapes whose head is the embedding."""
KINDS = {
    "chat": ((5.0, 0.9), (5.6, 0.6)),
    "summary": ((7.0, 0.4), (4.3, 0.4)),
    "long_prompt": ((8.0, 0.4), (5.3, 0.5)),
}
"""Mean and deviation of the logarithm of the tokens in prompt and completion: about 150 and 270, 1,100 and 74, 3,000
and 200."""
CARDS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16 TFLOP/s that the maker states."""
BETA = 0.1
FLOAT32_TOLERANCE = 1e-3
"""Largest relative difference of gradients, and of log-probabilities in nats a token, between sides in float32."""
BFLOAT16_TOLERANCE = 0.05
"""Largest mean difference of log-probabilities, in nats a token, between sides in bfloat16."""

MicroBatches = Callable[[Any, Sequence[TokenPair], argparse.Namespace], Iterator[tuple[tuple[int, ...], Any]]]
"""(model, pairs, arguments) -> a micro-batch at a time, the positions of its pairs and their PairLosses."""


@dataclass(frozen=True, slots=True)
class Side:
    """One way to take a step."""

    attention: str
    """As transformers calls it."""
    micro_batches: MicroBatches
    recompute: bool = False
    second_model: bool = False


def packed(layout: Layout) -> MicroBatches:
    """Rows without padding, through the scorer."""

    def micro_batches(model: Any, pairs: Sequence[TokenPair], arguments: argparse.Namespace) -> Iterator[Any]:
        scorer, lengths = Scorer(model), lengths_of(pairs)
        tokens = row_tokens(lengths, layout)
        (share,) = deal(
            tokens, tokens.astype(float), ranks=1, tokens_per_micro_batch=arguments.tokens_per_micro_batch
        ).shares
        for items in share:
            row = build_row([pairs[i] for i in items], layout).to(model.device)
            yield items, pair_losses(scorer, row, lambda policy, _: losses_of(policy))

    return micro_batches


def padded(model: Any, pairs: Sequence[TokenPair], arguments: argparse.Namespace) -> Iterator[Any]:
    """Chosen, then rejected completions behind their prompts, padded on the right to the longest of the micro-batch."""
    for start in range(0, len(pairs), arguments.padded_pairs):
        items = tuple(range(start, min(start + arguments.padded_pairs, len(pairs))))
        held = [pairs[i] for i in items]
        rows = [(p.prompt, p.chosen) for p in held] + [(p.prompt, p.rejected) for p in held]
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids, seen, counted = (np.zeros((len(rows), longest), np.int64) for _ in range(3))
        for at, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[at, :end], seen[at, :end], counted[at, len(prompt) : end] = (*prompt, *completion), 1, 1
        on = [torch.from_numpy(x).to(model.device) for x in (ids, seen, counted)]
        logits = model(input_ids=on[0], attention_mask=on[1], use_cache=False).logits[:, :-1].float()
        logps = -F.cross_entropy(logits.flatten(0, 1), on[0][:, 1:].flatten(), reduction="none").view(len(rows), -1)
        sums, tokens = (logps * on[2][:, 1:]).sum(1), on[2].sum(1)
        half = len(held)
        policy = PairLogps(sums[:half], sums[half:], tokens[:half], tokens[half:])
        losses = losses_of(policy)
        yield items, PairLosses(losses.sum(), losses.detach(), policy)


def sides(device: torch.device) -> dict[str, Side]:
    """What is compared, ours first."""
    ours = use_flex_attention() if device.type == "cuda" else use_packed_attention()
    return {
        "dpo_ray": Side(ours, packed("shared")),
        "two rows, no padding": Side(ours, packed("plain")),
        "padded, best": Side("sdpa", padded),
        "padded, defaults": Side("sdpa", padded, recompute=True, second_model=True),
    }


def lengths_of(pairs: Sequence[TokenPair]) -> np.ndarray:
    """(B, 3) tokens of prompt, chosen and rejected."""
    return np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs])


def made_tokens(kind: str, count: int, vocabulary: int, longest: int, seed: int = 0) -> list[TokenPair]:
    """Pairs of random tokens in lengths of ``kind``, each part at most ``longest``."""
    draw = np.random.default_rng(seed)

    def text(mean: float, deviation: float) -> tuple[int, ...]:
        length = int(np.clip(draw.lognormal(mean, deviation), 4, longest))
        return tuple(draw.integers(0, vocabulary, length).tolist())

    prompt, completion = KINDS[kind]
    return [TokenPair(text(*prompt), text(*completion), text(*completion)) for _ in range(count)]


def build(shape: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A Llama of ``shape`` with random weights."""
    hidden, layers, heads, key_heads, between, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=between, vocab_size=vocabulary, tie_word_embeddings=shape in TIED,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def losses_of(logps: PairLogps) -> Tensor:
    """(B,) against a reference that gives every token -1 nat: its value does not change what a step costs."""
    reference = PairLogps(
        -logps.chosen_tokens.float(), -logps.rejected_tokens.float(), logps.chosen_tokens, logps.rejected_tokens
    )
    return sigmoid(logps, reference, beta=BETA)


def gradients(model: Any, side: Side, pairs: Sequence[TokenPair], arguments: argparse.Namespace) -> tuple[Tensor, ...]:
    """(B, 2) log-probabilities a token, and the gradient by all weights in one vector."""
    use(model, side)
    found = torch.zeros(len(pairs), 2)
    for items, losses in side.micro_batches(model, pairs, arguments):
        (losses.total / len(pairs)).backward()
        logps = losses.policy
        per_token = (logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens)
        found[list(items)] = torch.stack(per_token, 1).detach().float().cpu()
    whole = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return found, whole


def check(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """How far the sides are apart.

    Raises:
        SystemExit: further than rounding explains.
    """
    apart = {}
    for name, dtype, bound in (("float32", torch.float32, FLOAT32_TOLERANCE), ("bfloat16", torch.bfloat16, None)):
        model = build("tiny", device, dtype)
        pairs = made_tokens("chat", 6, SHAPES["tiny"].vocabulary, 150)
        found = {label: gradients(model, side, pairs, arguments) for label, side in sides(device).items()}
        oracle_logps, oracle_grad = found.pop("padded, best")
        for label, (logps, grad) in found.items():
            off = float((logps - oracle_logps).abs().mean())
            grad_off = float((grad - oracle_grad).norm() / oracle_grad.norm())
            apart |= {f"{label}, {name}, logps": off, f"{label}, {name}, gradient": grad_off}
            if off > (bound or BFLOAT16_TOLERANCE) or (bound and grad_off > bound):
                raise SystemExit(f"{label} is not what the padded rectangle gives in {name}: {off:.2e}, {grad_off:.2e}")
    return apart


def use(model: Any, side: Side) -> None:
    """Set a model to a side's attention and recomputation."""
    model.set_attn_implementation(side.attention)
    if side.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.train()


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
    model: Any, side: Side, pairs: Sequence[TokenPair], optimizer: Any, arguments: argparse.Namespace, *, parts: bool
) -> dict[str, Any]:
    """Take one step; with ``parts``, waiting for the device between them, which costs some overlap."""
    device = model.device
    use(model, side)
    second = build(arguments.shape, device, torch.bfloat16) if side.second_model else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch(device)
    total = torch.zeros((), device=device)
    reference = None
    if second is not None:
        with torch.no_grad():
            reference = list(side.micro_batches(second, pairs, arguments))
        if parts:
            watch.part("reference")
    for _, losses in side.micro_batches(model, pairs, arguments):
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
    del second, reference
    return watch.seconds | {"peak_gib": peak, "loss": float(total)}


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Steps of every side in turn, after one of each that is not counted."""
    model = build(arguments.shape, device, torch.bfloat16)
    if arguments.compile:
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    pairs = made_tokens(arguments.kind, arguments.pairs, SHAPES[arguments.shape].vocabulary, arguments.longest)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides(device)}
    split: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for turn in range(arguments.runs + 2):
        for name, side in sides(device).items():
            if name in failed:
                continue
            try:
                found = one_step(model, side, pairs, optimizer, arguments, parts=turn == 1)
            except torch.cuda.OutOfMemoryError as error:
                failed[name] = str(error).splitlines()[0]
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            if turn == 1:
                split[name] = found
            elif turn > 1:
                runs[name].append(found)
        print(f"turn {turn + 1} of {arguments.runs + 2} done", flush=True)
    return {"runs": runs, "parts": split, "failed": failed, "lengths": lengths_of(pairs).tolist()}


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
    """The figures in Markdown: medians, and in brackets least and most."""
    lines = [
        "| | pairs/s | tokens/s | dpo_ray is faster by | useful FLOPs of peak | peers' count of peak | peak GiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lengths = np.array(result["lengths"])
    useful, counted = step_flops(SHAPES[result["shape"]], lengths)
    peak = 1e12 * result["peak_tflops"]
    ours = [run["step"] for run in result["runs"]["dpo_ray"]]
    for name, found in result["runs"].items():
        if not found:
            lines.append(f"| {name} | out of memory | | | | | |")
            continue
        seconds = [run["step"] for run in found]
        middle = statistics.median(seconds)
        ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)] if ours else []
        faster = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        memory = f"{max(run['peak_gib'] for run in found):.1f}" if found[0]["peak_gib"] is not None else ""
        lines.append(
            f"| {name} | {len(lengths) / middle:.2f} | {lengths.sum() / middle:.0f} | {faster} | "
            f"{useful / middle / peak:.1%} | {counted / middle / peak:.1%} | {memory} |"
        )
    for name, found in result["parts"].items():
        spent = ", ".join(f"{part} {1e3 * s:.0f} ms" for part, s in found.items() if part not in ("peak_gib", "loss"))
        lines.append(f"\n{name}: {spent}")
    return "\n".join(lines)


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--kind", choices=sorted(KINDS), default="chat")
    parser.add_argument("--pairs", type=int, default=32, help="in a step")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a prompt or completion")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=16384, help="of the sides without padding")
    parser.add_argument("--padded-pairs", type=int, default=4, help="pairs in a micro-batch of the padded sides")
    parser.add_argument("--runs", type=int, default=5, help="timed steps of each side, in turn")
    parser.add_argument("--compile", action="store_true", help="compile each layer, for all sides")
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds, on a CPU too")
    parser.add_argument("--out", type=Path, help="write every figure here, as JSON")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shape, arguments.pairs, arguments.longest, arguments.runs = "tiny", 8, 200, 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        raise SystemExit("no GPU is here; --tiny shows that the script runs")

    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    apart = check(arguments, device)
    measured = matmul_tflops(device)
    stated = next((peak for name, peak in CARDS.items() if name in card), None)
    result = measure(arguments, device) | {
        "card": card,
        "torch": torch.__version__,
        "shape": arguments.shape,
        "kind": arguments.kind,
        "apart": apart,
        "matmul_tflops": measured,
        "peak_tflops": stated or measured,
    }
    print(f"\n{card}, torch {torch.__version__}, {arguments.shape}, {arguments.kind}, {arguments.pairs} pairs a step")
    peak = f"{stated:.0f} stated by the maker" if stated else f"{measured:.2f} measured"
    print(f"peak: {peak} TFLOP/s; a large bfloat16 product reaches {measured:.2f}\n")
    print(table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""One training step on one GPU: prompt-shared rows against a padded rectangle and against two rows without padding.

    python -m benchmarks.gpu --shape 1b --kind chat       writes gpu.json as it goes, and prints a table
    python -m benchmarks.gpu --tiny                       the same on a CPU, to see that it runs

Needs torch and transformers, no Ray and no model: weights and tokens are random, lengths are those of real kinds of
pairs. Before anything is timed, all sides must give the same log-probabilities, and the same gradients where the
weights are float32. Then each side takes the same steps on the same pairs in turn.

The padded sides do what TRL's DPOTrainer (1.16) does, written anew here: chosen and rejected in one rectangle of prompt
and completion, the head at completion tokens; it is given the head of this project, which makes no logits twice.
"padded, defaults" also runs a second model as the reference and recomputes activations. "padded, all logits" is what
TRL did before it had that head. The reference pass of the others is not in a step: ours is cached, theirs precomputed.

Weights, gradients and AdamW are bfloat16 on every side, 8 bytes a weight: 64 GB of an 80 GB card for 8B, which leaves
room for activations only where they are computed again. A side that runs out of memory tries half the micro-batch; one
that fails is named and the others go on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.flops import Shape, step_flops
from dpo_ray.data.packing import Layout, PackedRow, build_row, deal, row_tokens
from dpo_ray.model.activations import recompute
from dpo_ray.model.attention import use_packed_attention
from dpo_ray.model.context_parallel import ALONE
from dpo_ray.model.flex import use_flex_attention
from dpo_ray.model.scorer import PairLosses, ReadOut, Scorer, Scores, pair_losses
from dpo_ray.model.tensor_parallel import local_head
from dpo_ray.objective.head import LogitTransform
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
FITS = {"3b": ("none", 8192), "8b": ("full", 8192)}
"""What an 80 GB card takes where it does not take ("none", 16384): recomputation, and tokens of a micro-batch. What a
layer keeps of a token is about 8 times the hidden and 4 times the intermediate size, in bfloat16: 3.2 MB over the
layers of 3b beside 26 GB of weights, 5.8 MB over those of 8b beside 64 GB."""
SMALLEST = 512
"""Tokens of a micro-batch below which a side that runs out of memory gives up."""
CARDS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0,
}  # fmt: skip
"""Dense bfloat16 TFLOP/s that the maker states, by a part of the card's name; the first that fits counts."""
BETA = 0.1
ORACLE = "padded, best"
PARTS = ("reference", "forward", "backward", "optimizer")
FLOAT32_TOLERANCE = 1e-3
"""Largest relative difference of gradients, and of log-probabilities in nats a token, between sides in float32."""
BFLOAT16_TOLERANCE = 0.05
"""Largest mean difference of log-probabilities, in nats a token, between sides in bfloat16."""

MicroBatches = Callable[[Any, Sequence[TokenPair], int], Iterator[tuple[tuple[int, ...], PairLosses]]]
"""(model, pairs, size) -> a micro-batch at a time, the positions of its pairs and their losses. The size is in tokens
or pairs."""
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Side:
    """One way to take a step."""

    attention: str
    """As transformers calls it."""
    micro_batches: MicroBatches
    in_pairs: bool = False
    """Whether micro-batches are measured in pairs."""
    recompute: Recompute | None = None
    """Where it does not follow ``--recompute``."""
    second_model: bool = False


def packed(layout: Layout) -> MicroBatches:
    """Rows without padding, through the scorer."""

    def micro_batches(model: Any, pairs: Sequence[TokenPair], size: int) -> Iterator[Any]:
        scorer, tokens = Scorer(model), row_tokens(lengths_of(pairs), layout)
        (share,) = deal(tokens, tokens.astype(float), ranks=1, tokens_per_micro_batch=size).shares
        for items in share:
            row = build_row([pairs[i] for i in items], layout).to(model.device)
            yield items, pair_losses(scorer, row, lambda policy, _: losses_of(policy))

    return micro_batches


def padded(losses: Callable[[Any, PackedRow], PairLosses]) -> MicroBatches:
    """So many pairs at a time in their order, each completion behind its prompt."""

    def micro_batches(model: Any, pairs: Sequence[TokenPair], size: int) -> Iterator[Any]:
        for start in range(0, len(pairs), size):
            items = tuple(range(start, min(start + size, len(pairs))))
            yield items, losses(model, build_row([pairs[i] for i in items], "plain").to(model.device))

    return micro_batches


def hidden_of_rectangle(model: Any, row: PackedRow) -> tuple[Tensor, Tensor]:
    """(S, T, D) hidden states of the row's S sequences, padded on the right to the longest, and (S, T) what is real."""
    lengths = torch.tensor([sum(span) for span in row.spans], device=model.device)
    seen = torch.arange(int(lengths.max()), device=model.device) < lengths[:, None]
    ids = torch.zeros(seen.shape, dtype=torch.int64, device=model.device).masked_scatter(seen, row.input_ids)
    decoder = model.get_decoder()
    return decoder(input_ids=ids, attention_mask=seen.long(), use_cache=False).last_hidden_state, seen


def with_head_at_completions(model: Any, row: PackedRow) -> PairLosses:
    """Losses of a rectangle whose completion tokens alone meet the head."""

    def scores(row: PackedRow, read_out: ReadOut) -> Any:
        hidden, seen = hidden_of_rectangle(model, row)
        return read_out(hidden[seen][row.source], local_head(model, LogitTransform()), ALONE.part(row))

    rectangle: Scores = scores
    return pair_losses(rectangle, row, lambda policy, _: losses_of(policy))


def with_all_logits(model: Any, row: PackedRow) -> PairLosses:
    """Losses of a rectangle whose every position meets the head, in float32."""
    hidden, seen = hidden_of_rectangle(model, row)
    logits = model.get_output_embeddings()(hidden).float()  # (S, T, V)
    labels = torch.full_like(row.input_ids[0], -100).index_copy(0, row.source, row.labels)
    rectangle = torch.full(seen.shape, -100, device=model.device).masked_scatter(seen, labels)
    logps = -F.cross_entropy(logits.flatten(0, 1), rectangle.flatten(), reduction="none").view(seen.shape).sum(1)
    policy = PairLogps(logps[0::2], logps[1::2], row.lengths[0::2], row.lengths[1::2])
    losses = losses_of(policy)
    return PairLosses(losses.sum(), losses.detach(), policy)


def sides(device: torch.device) -> dict[str, Side]:
    """What is compared, ours first."""
    ours = use_flex_attention() if device.type == "cuda" else use_packed_attention()
    without_flex = {"dpo_ray, no flex": Side(use_packed_attention(), packed("shared"))}
    at_completions = padded(with_head_at_completions)
    return {
        "dpo_ray": Side(ours, packed("shared")),
        **(without_flex if device.type == "cuda" else {}),
        "two rows, no padding": Side(ours, packed("plain")),
        ORACLE: Side("sdpa", at_completions, in_pairs=True),
        "padded, all logits": Side("sdpa", padded(with_all_logits), in_pairs=True),
        "padded, defaults": Side("sdpa", at_completions, in_pairs=True, recompute="full", second_model=True),
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


def build(shape: str, device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> Any:
    """A Llama of ``shape`` with random weights, the same at each call; its layers keep their forward as ``plain``."""
    hidden, layers, heads, key_heads, between, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=between, vocab_size=vocabulary, tie_word_embeddings=shape in TIED,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers: Sequence[Any] = model.get_decoder().layers
    for layer in layers:
        layer.plain = torch.compile(layer.forward, dynamic=True) if compiled else layer.forward
    return model


def losses_of(logps: PairLogps) -> Tensor:
    """(B,) against a reference that gives every token -1 nat: its value does not change what a step costs."""
    reference = PairLogps(
        -logps.chosen_tokens.float(), -logps.rejected_tokens.float(), logps.chosen_tokens, logps.rejected_tokens
    )
    return sigmoid(logps, reference, beta=BETA)


def gradients(model: Any, side: Side, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """(B, 2) log-probabilities a token, and the gradient by all weights in one vector."""
    use(model, side, "none")
    found = torch.zeros(len(pairs), 2)
    for items, losses in side.micro_batches(model, pairs, 2 if side.in_pairs else SMALLEST):
        (losses.total / len(pairs)).backward()
        logps = losses.policy
        per_token = (logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens)
        found[list(items)] = torch.stack(per_token, 1).detach().float().cpu()
    whole = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return found, whole


def check(device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """How far the sides are from the padded rectangle, and what is wrong with those that are too far, or fail."""
    apart: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for name, dtype, bound in (("float32", torch.float32, FLOAT32_TOLERANCE), ("bfloat16", torch.bfloat16, None)):
        model = build("tiny", device, dtype)
        pairs = made_tokens("chat", 6, SHAPES["tiny"].vocabulary, 150)
        oracle_logps, oracle_grad = gradients(model, sides(device)[ORACLE], pairs)
        for label, side in sides(device).items():
            try:
                logps, grad = gradients(model, side, pairs)
            except Exception as error:
                wrong[label] = said(error)
                model.zero_grad(set_to_none=True)
                continue
            off = float((logps - oracle_logps).abs().mean())
            grad_off = float((grad - oracle_grad).norm() / oracle_grad.norm())
            apart |= {f"{label}, {name}, logps": off, f"{label}, {name}, gradient": grad_off}
            if not off <= (bound or BFLOAT16_TOLERANCE) or (bound and not grad_off <= bound):
                wrong[label] = f"differs from the padded rectangle in {name}: logps {off:.2e}, gradient {grad_off:.2e}"
    return apart, wrong


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def use(model: Any, side: Side, recomputed: Recompute) -> None:
    """Set a model to a side's attention and recomputation."""
    model.set_attn_implementation(side.attention)
    for layer in model.get_decoder().layers:
        layer.forward = layer.plain
        recompute(layer, side.recompute or recomputed)
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
        arguments.shape, arguments.pairs, arguments.longest, arguments.runs = "tiny", 4, 200, 2
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

"""The sides of the GPU benchmark: ways to take the same step, on models and pairs made of random numbers.

The padded sides do what TRL's DPOTrainer (1.16) does, written anew here: chosen and rejected in one rectangle of prompt
and completion, the head at completion tokens; it is given the head of this project, which makes no logits twice.
"padded, defaults" also runs a second model as the reference and recomputes activations. "padded, all logits" is what
TRL did before it had that head. The reference pass of the others is not in a step: ours is cached, theirs precomputed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.flops import Shape
from dpo_ray.data.assignment import balance_micro_batches
from dpo_ray.data.packing import Layout, PackedRow, build_row, row_tokens
from dpo_ray.model.load import register_attention
from dpo_ray.model.scorer import HeadFn, LogpsModel, PairLosses, Scorer, pair_losses
from dpo_ray.objective.head import LogitTransform
from dpo_ray.objective.logps import PairLogps
from dpo_ray.objective.losses import sigmoid
from dpo_ray.ops.attention import PACKED
from dpo_ray.ops.flex import FLEX
from dpo_ray.parallel.activations import apply_activation_checkpointing
from dpo_ray.parallel.context import NO_CONTEXT_PARALLEL
from dpo_ray.parallel.tensor import local_head
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
BETA = 0.1
ORACLE = "padded, best"
SMALLEST = 512
"""Tokens of a micro-batch below which a side that runs out of memory gives up."""
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
        assignment = balance_micro_batches(tokens, tokens.astype(float), ranks=1, tokens_per_micro_batch=size)
        for items in assignment.micro_batches[0]:
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

    def logps_model(row: PackedRow, head_fn: HeadFn) -> Any:
        hidden, seen = hidden_of_rectangle(model, row)
        shard = NO_CONTEXT_PARALLEL.shard(row)
        return head_fn(hidden[seen][row.source], local_head(model, LogitTransform()), shard)

    rectangle: LogpsModel = logps_model
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
    register_attention()
    ours = FLEX if device.type == "cuda" else PACKED
    without_flex = {"dpo_ray, no flex": Side(PACKED, packed("shared"))}
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
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa",  # pyrefly: ignore[unexpected-keyword], an argument of the base class
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in model.get_decoder().layers:
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
        pairs = made_tokens("chat", 6, SHAPES["tiny"].vocabulary, 60)
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
    layers = model.get_decoder().layers
    for layer in layers:
        layer.forward = layer.plain
    apply_activation_checkpointing(layers, side.recompute or recomputed)
    model.train()

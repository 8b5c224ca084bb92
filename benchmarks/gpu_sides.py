"""The sides of the GPU benchmark: implementations of the same step, on random weights and tokens.

The padded sides reimplement TRL's DPOTrainer (1.16): one padded batch of chosen and rejected sequences, and the head at
completion tokens. "TRL's head" calls its own chunked one (``trl.kernels``, in Triton) and exists where trl is
installed; "padded, best" has this project's head instead. "padded, defaults" also runs a reference model and recomputes
activations. "padded, all logits" is an earlier TRL, which computed all logits. On the other sides the reference pass is
not part of the step: its log-probabilities are cached or precomputed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from benchmarks.flops import Shape
from dpo_ray.data.assignment import balance_micro_batches
from dpo_ray.data.packing import Layout, PackedRow, build_row, row_tokens
from dpo_ray.model.scorer import HeadFn, LogpsModel, PairLosses, Scorer, pair_losses
from dpo_ray.objective.head import LogitTransform
from dpo_ray.objective.logps import PairLogps, sequence_sums
from dpo_ray.objective.losses import sigmoid
from dpo_ray.objective.precision import ROUNDED
from dpo_ray.ops.attention import PACKED, packed_attention
from dpo_ray.ops.flex import FLEX, flex_packed_attention
from dpo_ray.parallel.activations import apply_activation_checkpointing
from dpo_ray.parallel.compiled import compile_layers
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
"""Shapes with a tied head."""
KINDS = {
    "chat": ((5.0, 0.9), (5.6, 0.6)),
    "summary": ((7.0, 0.4), (4.3, 0.4)),
    "long_prompt": ((8.0, 0.4), (5.3, 0.5)),
}
"""Mean and standard deviation of the log length of prompt and completion, in tokens: medians of about 150 and 270,
1,100 and 74, 3,000 and 200."""
BETA = 0.1
ORACLE = "padded, best"
SMALLEST = 512
"""Smallest micro-batch, in tokens, that a side retries with after running out of memory."""
FLOAT32_TOLERANCE = 1e-3
"""Largest difference between sides in float32: relative for gradients, nats per token for log-probabilities."""
BFLOAT16_TOLERANCE = 0.05
"""Largest mean difference of log-probabilities between sides in bfloat16, nats per token."""

MicroBatches = Callable[[Any, Sequence[TokenPair], int], Iterator[tuple[tuple[int, ...], PairLosses]]]
"""(model, pairs, size) -> positions and losses of the pairs, per micro-batch of ``size`` tokens or pairs."""
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Side:
    """One implementation of the step."""

    attention: str
    """Attention implementation, as in transformers."""
    micro_batches: MicroBatches
    in_pairs: bool = False
    """True if micro-batches are measured in pairs, False in tokens."""
    recompute: Recompute | None = None
    """Overrides ``--recompute``."""
    second_model: bool = False


def packed(layout: Layout) -> MicroBatches:
    """Micro-batches of rows without padding."""

    def micro_batches(model: Any, pairs: Sequence[TokenPair], size: int) -> Iterator[Any]:
        scorer, tokens = Scorer(model), row_tokens(lengths_of(pairs), layout)
        assignment = balance_micro_batches(tokens, tokens.astype(float), ranks=1, tokens_per_micro_batch=size)
        for items in assignment.micro_batches[0]:
            row = build_row([pairs[i] for i in items], layout).to(model.device)
            yield items, pair_losses(scorer, row, lambda policy, _: losses_of(policy))

    return micro_batches


def padded(losses: Callable[[Any, PackedRow], PairLosses]) -> MicroBatches:
    """Micro-batches of ``size`` pairs in order, each completion after its own copy of the prompt."""

    def micro_batches(model: Any, pairs: Sequence[TokenPair], size: int) -> Iterator[Any]:
        for start in range(0, len(pairs), size):
            items = tuple(range(start, min(start + size, len(pairs))))
            yield items, losses(model, build_row([pairs[i] for i in items], "plain").to(model.device))

    return micro_batches


def padded_hidden_states(model: Any, row: PackedRow) -> tuple[Tensor, Tensor]:
    """(S, T, D) hidden states of the row's S sequences, right-padded to the longest, and their (S, T) mask."""
    lengths = torch.tensor([sum(span) for span in row.spans], device=model.device)
    mask = torch.arange(int(lengths.max()), device=model.device) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64, device=model.device).masked_scatter(mask, row.input_ids)
    decoder = model.get_decoder()
    return decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state, mask


def with_head_at_completions(model: Any, row: PackedRow) -> PairLosses:
    """Losses of a padded batch; the head runs at completion tokens only."""

    def logps_model(row: PackedRow, head_fn: HeadFn) -> Any:
        hidden, mask = padded_hidden_states(model, row)
        shard = NO_CONTEXT_PARALLEL.shard(row)
        return head_fn(hidden[mask][row.source], local_head(model, LogitTransform(), ROUNDED), shard)

    rectangle: LogpsModel = logps_model
    return pair_losses(rectangle, row, lambda policy, _: losses_of(policy))


TRL_VOCABULARY_CHUNK = 32768
"""Logits per token that TRL 1.16 computes at a time."""


def with_trl_head(model: Any, row: PackedRow) -> PairLosses:
    """Losses of a padded batch; TRL's head runs at completion tokens only, with the outputs its trainer asks for."""
    from trl.kernels import ChunkedLogProbFunction

    hidden, mask = padded_hidden_states(model, row)
    arguments = (model.get_output_embeddings().weight, None, row.labels, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0)
    token_logps = ChunkedLogProbFunction.apply(
        hidden[mask][row.source], *arguments, ("entropy", "mean_logits", "is_top1")
    )[0]
    return losses_of_sequences(sequence_sums(token_logps, row.sequence, len(row.lengths)), row)


def with_all_logits(model: Any, row: PackedRow) -> PairLosses:
    """Losses of a padded batch; the head runs at every position, with float32 logits."""
    hidden, mask = padded_hidden_states(model, row)
    logits = model.get_output_embeddings()(hidden).float()  # (S, T, V)
    labels = torch.full_like(row.input_ids[0], -100).index_copy(0, row.source, row.labels)
    rectangle = torch.full(mask.shape, -100, device=model.device).masked_scatter(mask, labels)
    logps = -F.cross_entropy(logits.flatten(0, 1), rectangle.flatten(), reduction="none").view(mask.shape).sum(1)
    return losses_of_sequences(logps, row)


def losses_of_sequences(logps: Tensor, row: PackedRow) -> PairLosses:
    """Losses from the (S,) log-probabilities of a plain row's sequences."""
    policy = PairLogps(logps[0::2], logps[1::2], row.lengths[0::2], row.lengths[1::2])
    losses = losses_of(policy)
    return PairLosses(losses.sum(), losses.detach(), policy)


def sides(device: torch.device) -> dict[str, Side]:
    """The implementations to compare, ours first."""
    AttentionInterface.register(PACKED, packed_attention)  # as model.load does, which needs pydantic
    AttentionInterface.register(FLEX, flex_packed_attention)
    ours = FLEX if device.type == "cuda" else PACKED
    without_flex = {"dpo_ray, no flex": Side(PACKED, packed("shared"))}
    at_completions = padded(with_head_at_completions)
    trl_head = padded(with_trl_head) if find_spec("trl") else None
    of_trl = {"padded, TRL's head": Side("sdpa", trl_head, in_pairs=True)} if trl_head else {}
    return {
        "dpo_ray": Side(ours, packed("shared")),
        **(without_flex if device.type == "cuda" else {}),
        "two rows, no padding": Side(ours, packed("plain")),
        ORACLE: Side("sdpa", at_completions, in_pairs=True),
        **of_trl,
        "padded, all logits": Side("sdpa", padded(with_all_logits), in_pairs=True),
        "padded, defaults": Side(
            "sdpa", trl_head or at_completions, in_pairs=True, recompute="full", second_model=True
        ),
    }


def lengths_of(pairs: Sequence[TokenPair]) -> np.ndarray:
    """(B, 3) tokens of prompt, chosen and rejected."""
    return np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs])


def random_pairs(kind: str, count: int, vocabulary: int, longest: int, seed: int = 0) -> list[TokenPair]:
    """Pairs of random tokens with lengths of ``kind``, each part at most ``longest`` tokens."""
    draw = np.random.default_rng(seed)

    def text(mean: float, deviation: float) -> tuple[int, ...]:
        length = int(np.clip(draw.lognormal(mean, deviation), 4, longest))
        return tuple(draw.integers(0, vocabulary, length).tolist())

    prompt, completion = KINDS[kind]
    return [TokenPair(text(*prompt), text(*completion), text(*completion)) for _ in range(count)]


def build(shape: str, device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> Any:
    """A Llama of ``shape`` with the same random weights in each call; its layers keep their forward as ``plain``."""
    hidden, layers, heads, key_heads, intermediate, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=shape in TIED,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa",  # pyrefly: ignore[unexpected-keyword], an argument of the base class
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers = model.get_decoder().layers
    if compiled:
        compile_layers(layers, device)
    for layer in layers:
        layer.plain = layer.forward
    return model


def losses_of(logps: PairLogps) -> Tensor:
    """(B,) losses with a reference of -1 nat per token; its values do not affect the cost of a step."""
    reference = PairLogps(
        -logps.chosen_tokens.float(), -logps.rejected_tokens.float(), logps.chosen_tokens, logps.rejected_tokens
    )
    return sigmoid(logps, reference, beta=BETA)


def gradients(model: Any, side: Side, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """(B, 2) log-probabilities per token, and the gradient with respect to all weights as one vector."""
    use(model, side, "none")
    all_logps = torch.zeros(len(pairs), 2)
    for items, losses in side.micro_batches(model, pairs, 2 if side.in_pairs else SMALLEST):
        (losses.total / len(pairs)).backward()
        logps = losses.policy
        per_token = (logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens)
        all_logps[list(items)] = torch.stack(per_token, 1).detach().float().cpu()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return all_logps, gradient


def check(device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Differences of all sides from the padded batch, and the problem of each side that differs too much or fails."""
    differences: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, dtype, bound in (("float32", torch.float32, FLOAT32_TOLERANCE), ("bfloat16", torch.bfloat16, None)):
        model = build("tiny", device, dtype)
        pairs = random_pairs("chat", 6, SHAPES["tiny"].vocabulary, 60)
        oracle_logps, oracle_grad = gradients(model, sides(device)[ORACLE], pairs)
        for label, side in sides(device).items():
            try:
                logps, grad = gradients(model, side, pairs)
            except Exception as error:
                failed[label] = error_summary(error)
                model.zero_grad(set_to_none=True)
                continue
            logps_error = float((logps - oracle_logps).abs().mean())
            grad_error = float((grad - oracle_grad).norm() / oracle_grad.norm())
            differences |= {f"{label}, {name}, logps": logps_error, f"{label}, {name}, gradient": grad_error}
            if not logps_error <= (bound or BFLOAT16_TOLERANCE) or (bound and not grad_error <= bound):
                failed[label] = f"differs from padding in {name}: logps {logps_error:.2e}, gradient {grad_error:.2e}"
    return differences, failed


def error_summary(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def use(model: Any, side: Side, recompute: Recompute) -> None:
    """Switch a model to a side's attention and recomputation."""
    model.set_attn_implementation(side.attention)
    layers = model.get_decoder().layers
    for layer in layers:
        layer.forward = layer.plain
    apply_activation_checkpointing(layers, side.recompute or recompute)
    model.train()

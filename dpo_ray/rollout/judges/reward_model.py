"""A judge by a reward model: a Hugging Face sequence classifier with one output, in the judge's process."""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dpo_ray.rollout.judges.arguments import StrictArgs, Text, parse_args
from dpo_ray.rollout.judges.reward_chat import RewardChat
from dpo_ray.storage import error_summary
from dpo_ray.types import CompletionGroup, Judgement

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "reward_model"


class RewardModelArgs(StrictArgs):
    """Arguments of ``reward_model``."""

    model: Text
    """Hub id or directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights and the computation; auto is that of the checkpoint. The scores of a model in bfloat16 have
    three significant digits."""
    tokens_per_batch: int = Field(16384, ge=1)
    """Largest number of tokens, padding included, per forward pass; a longer conversation has a pass of its own."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest conversation in tokens; null is the number of positions of the model."""
    trust_remote_code: bool = False
    """Run the code that the model's repository brings."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id."""


class RewardModel:
    """The logit of a sequence classifier for the prompt and the completion in the classifier's own chat template.

    Equal texts get equal scores. As in TRL, nothing is truncated, because the score of a part is not that of the whole:
    a conversation longer than ``max_tokens`` has no score (NaN) and is counted as ``too_long``. Arguments:
    ``RewardModelArgs``.

    Raises:
        ValueError: an argument is wrong, the model cannot be loaded, has no classification head or not exactly one
            output, or its tokenizer has no chat template.
    """

    def __init__(self, **args: Any) -> None:
        parsed = parse_args(NAME, RewardModelArgs, args)
        source: dict[str, Any] = {"revision": parsed.revision, "trust_remote_code": parsed.trust_remote_code}
        config = _load_config(parsed.model, source)
        self._chat = RewardChat(parsed.model, NAME, **source)
        self._model = _load_classifier(parsed.model, config, parsed.dtype, source)
        self._tokens_per_batch, self._max_tokens = parsed.tokens_per_batch, _longest(config, parsed.max_tokens)
        pad = config.get_text_config().pad_token_id
        self._pad: int | None = None if pad is None or pad < 0 else pad
        self._lock = threading.Lock()

    @staticmethod
    def validate_arguments(**args: Any) -> None:
        parse_args(NAME, RewardModelArgs, args)

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[Judgement]:
        rows = [
            [tuple(self._chat.token_ids(group.prompt, completion.text)) for completion in group.completions]
            for group in groups
        ]
        distinct = {row for group_rows in rows for row in group_rows if 0 < len(row) <= self._max_tokens}
        with self._lock:  # of calls that overlap: one forward pass at a time, and the padding token is its own
            scores = {
                row: score
                for batch in batches_by_tokens(distinct, self._tokens_per_batch)
                for row, score in zip(batch, self._score(batch), strict=True)
            }
        return [
            Judgement(
                tuple(scores.get(row, math.nan) for row in group_rows),
                totals={
                    "too_long": sum(row not in scores for row in group_rows),
                    "tokens": sum(len(row) for row in group_rows if row in scores),
                },
            )
            for group_rows in rows
        ]

    def _score(self, batch: Sequence[tuple[int, ...]]) -> list[float]:
        import torch

        pad = self._pad if self._pad is not None else _unused_token(batch)
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in batch])  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])  # (B, T)
        with torch.inference_mode():
            logits: Tensor = self._classify(ids, mask, pad)  # (B, 1)
        return logits.float().squeeze(-1).tolist()

    def _classify(self, ids: "Tensor", mask: "Tensor", pad: int) -> "Tensor":
        device = self._model.device
        # The classifier reads the last token that differs from the padding token of its configuration.
        self._model.config.get_text_config().pad_token_id = pad
        return self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits


def batches_by_tokens(rows: set[tuple[int, ...]], tokens_per_batch: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Rows of similar length, the longest first, in batches of at most ``tokens_per_batch`` tokens with padding."""
    batch: list[tuple[int, ...]] = []
    for row in sorted(rows, key=lambda row: (-len(row), row)):
        if batch and len(batch[0]) * (len(batch) + 1) > tokens_per_batch:
            yield tuple(batch)
            batch = []
        batch.append(row)
    if batch:
        yield tuple(batch)


def _unused_token(batch: Sequence[tuple[int, ...]]) -> int:
    """A padding token for a model without one: a token that ends no row, so that the last token of each is read."""
    last = {row[-1] for row in batch}
    return next(token for token in itertools.count() if token not in last)


def _load_config(model: str, source: dict[str, Any]) -> "PreTrainedConfig":
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=Path(model).is_dir(), **source)
    except Exception as error:  # the hub client and its HTTP library have own errors
        raise ValueError(
            f"judge {NAME!r}: the configuration of {model} cannot be loaded: {error_summary(error)}; "
            "accepted is a hub id, org/name, or a directory that the judge's process can read"
        ) from None
    if config.num_labels != 1:
        raise ValueError(
            f"judge {NAME!r}: {model} has num_labels {config.num_labels}; a reward model is a sequence classifier with "
            "num_labels 1 in its config.json"
        )
    return config


def _load_classifier(model: str, config: "PreTrainedConfig", dtype: str, source: dict[str, Any]) -> "PreTrainedModel":
    """The classifier in evaluation mode, on a GPU if the process has one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        classifier, loading = AutoModelForSequenceClassification.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=Path(model).is_dir(),
            **source,
        )
    except Exception as error:  # the hub client, the reader of weights and the model each have own errors
        raise ValueError(f"judge {NAME!r}: {model} cannot be loaded: {error_summary(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"judge {NAME!r}: the checkpoint of {model} has no {', '.join(missing[:3])}, and its scores would be "
            "random; accepted is a trained sequence classifier, not a language model"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return classifier.to(device).eval().requires_grad_(False)


def _longest(config: "PreTrainedConfig", max_tokens: int | None) -> float:
    from dpo_ray.data.tokenizer import positions_of

    positions = positions_of(config.get_text_config()) or math.inf
    if max_tokens is not None and max_tokens > positions:
        raise ValueError(
            f"judge {NAME!r}: max_tokens is {max_tokens}; the model has {positions} positions "
            "(online.judge.args.max_tokens)"
        )
    return max_tokens or positions

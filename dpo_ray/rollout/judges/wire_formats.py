"""Requests and responses of reward servers: OpenRLHF, vLLM and SGLang. Pure functions of groups and JSON."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dpo_ray.rollout.judges.columns import Column, label_column
from dpo_ray.rollout.judges.reward_chat import RewardChat, conversation
from dpo_ray.types import CompletionGroup


@dataclass(frozen=True, slots=True)
class Rewards:
    """The response of a reward server."""

    scores: tuple[float, ...]
    """One per completion of the request; NaN where the server has none."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name."""


@dataclass(frozen=True, slots=True)
class WireFormat:
    """A reward server's API.

    Attributes:
        path: path of the URL; empty where each server has its own.
        bodies: the requests for a group, as JSON, which have its completions in order.
        parse: (JSON of the response, completions of the request) -> rewards; raises a ValueError for another form.
    """

    path: str
    bodies: Callable[[CompletionGroup], Sequence[Any]]
    parse: Callable[[Any, int], Rewards]

    def url(self, url: str) -> str:
        """The URL of requests to the server at ``url``, which may have the path already."""
        parts = urlsplit(url)
        base = parts.path.rstrip("/").removesuffix(self.path).removesuffix("/v1")
        return urlunsplit(parts._replace(path=base + self.path)) if self.path else url


def openrlhf(
    decode: Callable[[Sequence[int]], str], column: str | None = None, columns: Collection[str] | None = None
) -> WireFormat:
    """OpenRLHF's remote reward server: ``{query, prompts, labels}`` -> ``{rewards, scores, extra_logs}``.

    Queries are prompt and completion as the policy's tokens spell them, special tokens included; labels are the
    reference answers, or "". ``scores``, which OpenRLHF filters prompts by, is not read.

    Args:
        decode: text of token ids by the policy's tokenizer, with special tokens.
        column: field of the records with the labels; None takes the first of ``GOLD`` that a record has.
        columns: of the prompts' records, see ``columns_of``; None if they are not known.
    """
    labels = label_column("http", columns) if column is None else Column(column, "http")

    def bodies(group: CompletionGroup) -> list[Any]:
        prompt, ids = decode(group.prompt.token_ids), group.prompt.token_ids
        queries = [decode((*ids, *completion.token_ids)) for completion in group.completions]
        (label,) = labels.lookup([group.prompt])
        golds = ["" if label is None else label] * len(queries)
        return [{"query": queries, "prompts": [prompt] * len(queries), "labels": golds}]

    return WireFormat("", bodies, parse_openrlhf)


def vllm(model: str | None) -> WireFormat:
    """``/classify`` of vLLM: a request per completion, as messages, which the server renders by its chat template.

    Without the activation, which would map a single logit to a number between 0 and 1.

    Args:
        model: name by which the server knows the model; None for its only one.
    """
    name = {} if model is None else {"model": model}

    def bodies(group: CompletionGroup) -> list[Any]:
        return [
            {**name, "messages": list(conversation(group.prompt, completion.text)), "use_activation": False}
            for completion in group.completions
        ]

    return WireFormat("/classify", bodies, parse_vllm)


def sglang(model: str, chat: RewardChat) -> WireFormat:
    """``/v1/embeddings`` of SGLang, launched with ``--is-embedding``: a reward is an embedding of one number.

    Args:
        model: name of the model.
        chat: renders conversations, because the server does not.
    """

    def bodies(group: CompletionGroup) -> list[Any]:
        texts = [chat.text_without_bos(group.prompt, completion.text) for completion in group.completions]
        return [{"model": model, "input": texts}]

    return WireFormat("/v1/embeddings", bodies, parse_sglang)


def parse_openrlhf(response: Any, completions: int) -> Rewards:
    """Rewards in a response of OpenRLHF's server; metrics are the numbers and means of lists in ``extra_logs``."""
    rewards = response.get("rewards") if isinstance(response, dict) else None
    rewards = [rewards] if completions == 1 and _is_number(rewards) else rewards
    if not isinstance(rewards, list) or len(rewards) != completions:
        raise ValueError(f"expected an object with {completions} numbers in rewards")
    logs = response.get("extra_logs") or {}
    metrics = {name: _mean(value) for name, value in logs.items()} if isinstance(logs, dict) else {}
    return Rewards(
        tuple(_number(reward, "rewards") for reward in rewards),
        {name: value for name, value in metrics.items() if value is not None},
    )


def parse_vllm(response: Any, completions: int) -> Rewards:
    """Rewards in a response of vLLM."""
    return Rewards(tuple(_single(row, "probs") for row in _rows(response, completions)))


def parse_sglang(response: Any, completions: int) -> Rewards:
    """Rewards in a response of SGLang."""
    return Rewards(tuple(_single(row, "embedding") for row in _rows(response, completions)))


def _rows(response: Any, completions: int) -> list[dict[str, Any]]:
    """The entries of ``data``, in the order of the request."""
    data = response.get("data") if isinstance(response, dict) else None
    if not isinstance(data, list) or len(data) != completions or not all(isinstance(row, dict) for row in data):
        raise ValueError(f"expected an object with {completions} entries in data")
    if sorted(str(row.get("index")) for row in data) != sorted(map(str, range(completions))):
        raise ValueError(f"expected the indices 0 to {completions - 1} in data")
    return sorted(data, key=lambda row: int(row["index"]))


def _single(row: Mapping[str, Any], key: str) -> float:
    values = row.get(key)
    if not isinstance(values, list) or len(values) != 1:
        count = f"{len(values)} numbers" if isinstance(values, list) else "none"
        raise ValueError(f"expected one number in data[].{key} and found {count}; a reward model has num_labels 1")
    return _number(values[0], key)


def _number(value: Any, key: str) -> float:
    if value is None:
        return math.nan
    if not _is_number(value):
        raise ValueError(f"expected numbers in {key} and found {str(value)[:50]!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _mean(value: Any) -> float | None:
    """A number, or the mean of a list of them; None for anything else."""
    values = value if isinstance(value, list) else [value]
    finite = [float(item) for item in values if _is_number(item) and math.isfinite(item)]
    return fmean(finite) if finite and len(finite) == len(values) else None

"""Requests, results and statistics as vLLM has them. vLLM is imported on use."""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dpo_ray.rollout.engine import Request
from dpo_ray.types import Completion, CompletionGroup, Prompt

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams


@contextmanager
def rejections() -> Iterator[None]:
    """Convert vLLM's errors about a request to ValueErrors, which also reach a process without vLLM."""
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (ValueError, VLLMClientError) as error:
        raise ValueError(str(error)) from None


def sampling_params(request: Request) -> "SamplingParams":
    """vLLM's parameters of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    with rejections():
        return SamplingParams(
            n=request.candidates,
            seed=request.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logprobs=0 if request.evaluation else None,  # 0: of the sampled token
            **request.sampling.model_dump(mode="json"),
        )


def completion_group(prompt: Prompt, seed: int, output: "RequestOutput") -> CompletionGroup:
    """The group in vLLM's output of a request."""
    return CompletionGroup(prompt, tuple(_completion(completion) for completion in output.outputs), seed=seed)


def _completion(completion: "CompletionOutput") -> Completion:
    versions: Any = completion.weight_versions  # finished, so they are set
    return Completion(
        completion.text,
        array("i", completion.token_ids),
        finished=completion.finish_reason == "stop",
        first_version=int(versions[0].version),
        last_version=int(versions[-1].version),
        logp=completion.cumulative_logprob,
    )


def prompt_logps(token_ids: Sequence[int], output: "RequestOutput") -> list[float]:
    """Log-probability of each prompt token after the first, nats."""
    prompt_logprobs: Any = output.prompt_logprobs  # requested, so only its first entry is None
    return [logps[token].logprob for token, logps in zip(token_ids[1:], prompt_logprobs[1:], strict=True)]


class Statistics:
    """Stands in for vLLM's loggers and keeps what ``EngineStatus`` reports."""

    def __init__(self) -> None:
        self.running = self.generated_tokens = self.cache_queries = self.cache_hits = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, **others: Any) -> None:
        """Add a step; called by vLLM."""
        self.running = scheduler_stats.num_running_reqs
        if (cache := scheduler_stats.prefix_cache_stats) is not None:
            self.cache_queries += cache.queries
            self.cache_hits += cache.hits
        if iteration_stats is not None:
            self.generated_tokens += iteration_stats.num_generation_tokens

    def log(self) -> None:
        """Called by vLLM at intervals."""

    def record_sleep_state(self, *state: int) -> None:
        """Called by vLLM when it sleeps or wakes."""

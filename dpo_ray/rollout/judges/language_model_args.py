"""The arguments of the judges ``llm`` and ``policy``, checked where a run is described."""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dpo_ray.config.rounds import SamplingConfig
from dpo_ray.config.secrets import holds_secret
from dpo_ray.config.section import Section
from dpo_ray.rollout.judges.arguments import EnvironmentVariable
from dpo_ray.rollout.judges.modes import Mode, Pairwise, Score
from dpo_ray.rollout.judges.prompts import (
    ADDITIVE_RUBRIC,
    PAIRWISE_TEMPLATE,
    PLACEHOLDER,
    PREFERENCE_RUBRIC,
    SCORE_TEMPLATE,
    validate_template,
)

TEMPLATES = {"pairwise": PAIRWISE_TEMPLATE, "score": SCORE_TEMPLATE}
RUBRICS = {"pairwise": PREFERENCE_RUBRIC, "score": ADDITIVE_RUBRIC}
REQUIRED = {"pairwise": ("prompt", "first", "second"), "score": ("prompt", "completion")}
"""Placeholders of each mode's template."""
OWN_FIELDS = {"model", "messages", "n", "stream", "temperature", "max_tokens", "response_format"}
"""Fields of a request that other arguments set."""


class QuestionArgs(Section):
    """Arguments that ``llm`` and ``policy`` share."""

    mode: Literal["pairwise", "score"]
    """pairwise compares completions; score rates each by a rubric."""
    template: str | None = None
    """Prompt of the judge; null is the built-in one of the mode."""
    rubric: str | None = None
    """Text of the placeholder {rubric}; null is the built-in one of the mode."""
    comparisons: int = Field(6, ge=1)
    """Largest number of comparisons per group, each asked in both orders. Pairwise only."""
    scale: tuple[float, float] = (0.0, 5.0)
    """Lowest and highest score of the rubric. Score only."""
    samples: int = Field(1, ge=1)
    """Replies per completion whose scores are averaged. Score only."""
    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature; null leaves it to the endpoint."""
    max_tokens: int | None = Field(512, ge=1)
    """Limit of a reply; null leaves it to the endpoint."""
    concurrency: int = Field(32, ge=1)
    """Requests in progress per judge process."""

    @model_validator(mode="after")
    def _validate_questions(self) -> Self:
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale: found {list(self.scale)}; the first number must be below the second")
        if self.samples > 1 and self.temperature == 0 and self.mode == "score":
            raise ValueError(
                f"samples: {self.samples} equal replies at temperature 0 have the mean of one; "
                "set temperature above 0, or samples: 1"
            )
        if self.template is not None:
            try:
                validate_template(self.template, REQUIRED[self.mode])
            except ValueError as error:
                raise ValueError(f"template: {error}") from None
            if self.rubric is not None and "rubric" not in PLACEHOLDER.findall(self.template):
                raise ValueError("rubric: the template has no {rubric}, where it would be; write it into the template")
        return self

    def build_mode(self) -> Mode:
        template = TEMPLATES[self.mode] if self.template is None else self.template
        rubric = RUBRICS[self.mode] if self.rubric is None else self.rubric
        if self.mode == "pairwise":
            return Pairwise(template, rubric, self.comparisons)
        return Score(template, rubric, *self.scale, samples=self.samples)

    def requests_per_group(self, completions: int) -> int:
        """Requests at a time about a group of distinct completions, and 1 for a group without a question."""
        if self.mode == "pairwise":
            return max(1, 2 * min(self.comparisons, math.comb(completions, 2)))
        return self.samples * completions


class PriceArgs(Section):
    """Prices in US dollars per million tokens."""

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)


class LlmArgs(QuestionArgs):
    """Arguments of ``llm``."""

    mode: Literal["pairwise", "score"] = "pairwise"
    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    base_url: str | None = None
    """Address of the endpoint, such as http://judge:8000/v1; null is OPENAI_BASE_URL, else OpenAI's own."""
    api_key_env: EnvironmentVariable = "OPENAI_API_KEY"
    """Environment variable with the key."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds to wait for a reply."""
    retries: int = Field(3, ge=0)
    """Further attempts of a request that fails, times out or is rejected for its rate, with growing pauses."""
    max_failures: int = Field(10, ge=1)
    """Failed requests in a row, over all groups, that end the run."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """Form in which JSON is requested; dropped if the endpoint rejects it."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, such as {max_completion_tokens: 4096, reasoning_effort: low}."""
    usd_per_million: PriceArgs | None = None
    """Prices, with which judge/cost_usd is logged."""

    @model_validator(mode="after")
    def _validate_request(self) -> Self:
        if own := sorted(OWN_FIELDS & set(self.request)):
            raise ValueError(f"request: {own[0]} is not accepted there, because the judge sets it itself")
        for name in ("base_url", "request"):
            if holds_secret(getattr(self, name)):
                raise ValueError(
                    f"{name}: holds a key or password, which config.yaml would store; api_key_env names an environment "
                    "variable"
                )
        if self.samples > 1 and "seed" in self.request:
            raise ValueError(f"request: seed would make all {self.samples} samples the same reply; leave it out")
        return self


class PolicyArgs(QuestionArgs):
    """Arguments of ``policy``. Defaults as in arXiv:2401.10020, section 3.1: three sampled scores, averaged."""

    mode: Literal["pairwise", "score"] = "score"
    samples: int = Field(3, ge=1)
    temperature: float = Field(0.7, ge=0)  # pyrefly: ignore [bad-override]
    top_p: float = Field(0.9, gt=0, le=1)
    """Cumulative probability of the tokens to sample from."""
    max_tokens: int = Field(512, ge=1)  # pyrefly: ignore [bad-override]

    def sampling(self) -> SamplingConfig:
        return SamplingConfig(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens)

"""The configuration tree: all sections, validated together."""

from typing import Any, Literal, Self

from pydantic import model_validator

from dpo_ray.config import cross_checks, losses, rounds, schema, sweeps
from dpo_ray.config.section import Section, as_tuple
from dpo_ray.types import PAIR_METRICS

POLICY_JUDGE_TOKENS = 1024
"""Tokens of an engine beyond a prompt and two completions if the policy judges: for instructions and its reply."""


class Config(Section):
    """The whole configuration of a run."""

    run: schema.RunConfig = schema.RunConfig()
    model: schema.ModelConfig
    reference: schema.ReferenceConfig = schema.ReferenceConfig()
    data: schema.DataConfig = schema.DataConfig()
    loss: losses.LossConfig = losses.LossConfig()
    optim: schema.OptimConfig = schema.OptimConfig()
    shard: schema.ShardConfig = schema.ShardConfig()
    cluster: schema.ClusterConfig = schema.ClusterConfig()
    online: rounds.OnlineConfig | None = None
    """Online settings; null trains on a fixed preference set."""
    sweep: sweeps.SweepConfig = sweeps.SweepConfig()

    @property
    def max_model_len(self) -> int:
        """Maximum length of prompt and completion in an engine, in tokens."""
        assert self.online is not None
        longest = (self.data.max_prompt_tokens or 1024) + self.online.sampling.max_tokens
        if any(judge.asks("policy") for judge in self.online.judges.values()):
            longest += self.online.sampling.max_tokens + POLICY_JUDGE_TOKENS
        return self.online.engine.max_model_len or longest

    @property
    def kept_rounds(self) -> int | None:
        """``online.keep_rounds``, or more, if a run that resumes may train more rounds again; None keeps all."""
        assert self.online is not None
        keep, save_every = self.online.keep_rounds, self.run.save_every
        return keep if keep is None or save_every is None else max(keep, cross_checks.rounds_to_resume(save_every))

    @property
    def reference_kind(self) -> Literal["cached", "live", "adapters_off", "adapters", "none"]:
        """``reference.kind`` with ``auto`` resolved; ``adapters``: the policy with a refreshed copy of its adapters."""
        if self.reference.kind != "auto":
            return self.reference.kind
        if self.loss.reference_free:
            return "none"
        copied = self.reference.refreshes_copy
        if self.online is None or (self.reference.refresh == "round" and not copied):
            return "cached"
        if self.model.lora is None:
            return "live"
        return "adapters" if copied else "adapters_off"

    @property
    def evaluation_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the evaluations of the run have; those of held-out examples if it has any."""
        kind = self.reference_kind
        if self.online is None:
            pairs = tuple(f"eval/{name}" for name in PAIR_METRICS)
            return pairs if kind == "none" else (*pairs, "eval/drift")
        if kind in ("none", "cached"):
            return tuple(name for name in cross_checks.ONLINE_METRICS if name != "kl")
        return (*cross_checks.ONLINE_METRICS, "kl_stderr")

    @model_validator(mode="before")
    @classmethod
    def _default_to_every_round(cls, tree: Any) -> Any:
        """An online run saves and evaluates every round by default; self-play also refreshes its reference."""
        if not isinstance(tree, dict) or not tree.get("online"):
            return tree
        defaults: dict[str, dict[str, Any]] = {"run": {"save_every": 1, "eval_every": 1}}
        if _plays_against_reference(tree):
            defaults["reference"] = {"refresh": "round"}
        sections = {name: tree.get(name, {}) for name in defaults}
        return tree | {
            name: {**defaults[name], **section} for name, section in sections.items() if isinstance(section, dict)
        }

    @model_validator(mode="after")
    def _validate_across_sections(self) -> Self:
        for check in cross_checks.CROSS_CHECKS:
            check(self)
        return self


def _plays_against_reference(tree: dict[str, Any]) -> bool:
    """True for self-play with a reference that may be refreshed; values are not validated yet."""
    read = lambda section, key: section.get(key) if isinstance(section, dict) else None  # noqa: E731
    names = as_tuple(read(tree.get("loss"), "use"))
    reference_free = isinstance(names, list | tuple) and all(name in losses.REFERENCE_FREE_LOSSES for name in names)
    return (
        read(read(tree["online"], "source"), "use") == "self_play"
        and read(tree.get("reference"), "kind") in (None, "auto", "cached")
        and not reference_free
    )

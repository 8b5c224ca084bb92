"""The settings of a sweep: scheduler, search, constraint, and the arguments that each of them takes."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dpo_ray.config.section import Section, explain


class NoArgs(Section):
    """No arguments."""


class AshaArgs(Section):
    """Asynchronous successive halving (arXiv:1810.05934)."""

    grace_period: int | None = Field(None, ge=1)
    """First rung, in steps (rounds online); null is run.eval_every. A multiple of run.eval_every."""
    reduction_factor: int = Field(3, ge=2)
    """A trial continues from a rung if it is in the best 1/reduction_factor of those that reached it; also the ratio of
    two rungs."""


class MedianArgs(Section):
    """The median stopping rule (Golovin et al., 2017)."""

    grace_period: int | None = Field(None, ge=1)
    """No trial is stopped before, in steps (rounds online); null is run.eval_every."""
    min_samples_required: int = Field(3, ge=1)
    """Other trials that must have come as far."""


class HalvingArgs(Section):
    """Synchronous successive halving (arXiv:1502.07943)."""

    grace_period: int | None = Field(None, ge=1)
    """First rung, in steps (rounds online); null is run.eval_every. A multiple of run.eval_every."""
    reduction_factor: int = Field(3, ge=2)
    """1/reduction_factor of the trials at a rung continue, rounded up; also the ratio of two rungs."""
    keep_ties: bool = True
    """Trials that tie with the last of these continue, too. false: of equal trials the first continue."""


class HyperbandArgs(Section):
    """HyperBand (arXiv:1603.06560), with synchronous brackets."""

    reduction_factor: int = Field(3, ge=2)
    """Ratio of adjacent rungs; 1/reduction_factor of the trials continue from each."""


class PbtArgs(Section):
    """Population-based training (arXiv:1711.09846), with synchronous generations."""

    interval: int | None = Field(None, ge=1)
    """Length of a generation, in steps (rounds online); null is run.eval_every. A multiple of run.eval_every."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Share of the population that continues from the checkpoints of the best as many."""
    resample: float = Field(0.25, ge=0, le=1)
    """Probability that a copied value is drawn again from its domain instead of multiplied by factor or its inverse."""
    factor: float = Field(1.2, gt=1)
    """Factor of a perturbation."""


class RandomArgs(Section):
    """Independent samples of all domains."""


class GridArgs(Section):
    """All combinations of values."""

    points: int = Field(3, ge=2)
    """Values per continuous domain, both bounds included, evenly spaced on the domain's own scale."""


class OptunaArgs(Section):
    """Optuna's tree-structured Parzen estimator (needs optuna: pip install 'dpo-ray[optuna]')."""

    startup_trials: int = Field(10, ge=1)
    """Random trials before the first that is modeled."""


SCHEDULERS: dict[str, type[Section]] = {
    "none": NoArgs, "asha": AshaArgs, "halving": HalvingArgs, "median": MedianArgs, "hyperband": HyperbandArgs,
    "pbt": PbtArgs,
}  # fmt: skip
START_TOGETHER = ("halving", "hyperband", "pbt")
"""Schedulers that compare trials which start together, so that none may be added later."""
SEARCHES: dict[str, type[Section]] = {
    "random": RandomArgs, "grid": GridArgs, "sobol": NoArgs, "optuna": OptunaArgs,
}  # fmt: skip


def _validate_args(section: str, use: str, args: dict[str, Any], accepted: type[Section]) -> None:
    try:
        accepted.model_validate(args)
    except ValidationError as error:
        takes = f"{use} takes {', '.join(accepted.model_fields) or 'no arguments'}"
        raise ValueError(explain(error.errors()[0], lambda _: takes, f"{section}.args.")) from None


class SchedulerConfig(Section):
    """The scheduler, which ends trials early. A space may bring one of its own, which is used with use: none."""

    use: Literal["none", "asha", "halving", "median", "hyperband", "pbt"] = "none"
    """none: every trial runs to its end. asha: successive halving without waiting. halving: successive halving in which
    trials pause at a rung until all have reached it. median: stops trials that are worse than the median of the others.
    hyperband: successive halving in brackets; trials pause. pbt: the worst trials continue from checkpoints of the
    best, with other values. Its time is the optimizer step, online the round."""
    args: dict[str, Any] = Field({})
    """asha {grace_period, reduction_factor: 3}; halving {grace_period, reduction_factor: 3, keep_ties: true}; median
    {grace_period, min_samples_required: 3}; hyperband {reduction_factor: 3}; pbt {interval, quantile: 0.25, resample:
    0.25, factor: 1.2}."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        _validate_args("sweep.scheduler", self.use, self.args, SCHEDULERS[self.use])
        return self


class SearchConfig(Section):
    """The searcher, which picks the values of trials. A space may bring one of its own, used with use: random."""

    use: Literal["random", "grid", "sobol", "optuna"] = "random"
    """random: independent samples. grid: all combinations, with args.points values per continuous domain. sobol: a
    scrambled Sobol sequence, which covers the space more evenly than random samples. optuna: modeled on the results so
    far (pip install 'dpo-ray[optuna]'). run.seed seeds all of them."""
    args: dict[str, Any] = Field({})
    """grid {points: 3}; optuna {startup_trials: 10}."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        _validate_args("sweep.search", self.use, self.args, SEARCHES[self.use])
        return self


class ConstraintConfig(Section):
    """A bound that the best trial must keep."""

    metric: str
    """Metric of the evaluations, such as kl online or eval/drift offline."""
    max: float
    """Largest accepted value; trials above it cannot win."""


class SweepConfig(Section):
    """Size of a sweep, its scheduler and its searcher. Its search space is a module of tune_spaces."""

    samples: int | None = Field(None, ge=1)
    """Number of trials; null is the default of the search space, and with a grid the number of its combinations.
    Raised afterwards, it adds trials to a finished sweep."""
    concurrent: int | None = Field(None, ge=1)
    """Number of concurrent trials, fewer if there are not as many; null runs as many as fit the cluster."""
    scheduler: SchedulerConfig = SchedulerConfig()
    search: SearchConfig = SearchConfig()
    constraint: ConstraintConfig | None = None
    """Bound on another metric, such as {metric: kl, max: 10}; trials that exceed it cannot win."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.search.use == "optuna" and self.scheduler.use in START_TOGETHER:
            raise ValueError(
                f"sweep.search.use: optuna learns from trials that have ended, and with sweep.scheduler.use: "
                f"{self.scheduler.use} all trials start together; use the search sobol or random, or the scheduler asha"
            )
        return self

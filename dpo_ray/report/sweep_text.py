"""The verdict on a sweep in plain sentences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.report.formatting import count_noun, format_number, same_decimals
from dpo_ray.sweep.ranking import Configuration
from dpo_ray.sweep.trials import Objective, Trial
from dpo_ray.sweep.verdict import Lead, Verdict, as_good_region
from dpo_ray.types import finite_float, is_number

DISTANCES = {"kl": "KL to the reference", "eval/drift": "drift from the reference"}
"""Metrics of the distance between policy and reference, in nats per completion; the first that a trial has is named."""
SCALED_BY_LOSS = ("eval/loss", "eval/rewards/margins")
"""Metrics whose scale depends on the loss."""
UNFINISHED = {"stopped": "stopped early by the scheduler", "running": "still running", "waiting": "waiting"}
"""Texts for the status of trials that have not run to the end."""


def verdict_text(verdict: Verdict) -> str:
    """The configuration to pick, the certainty of its lead, others that are as good, and trials without a result."""
    if verdict.best is None:
        return " ".join([_no_pick(verdict), *_exclusions(verdict)])
    sentences = [
        _pick(verdict, verdict.best),
        *_left_out(verdict.best),
        *_cloned(verdict.best),
        *_lead(verdict, verdict.best),
        *[text for lead in verdict.leads[:1] for text in _left_out(lead.other, _name(lead.other, verdict))],
        *_as_good(verdict),
    ]
    return " ".join([*sentences, *_unfinished(verdict), *_scales(verdict), *_exclusions(verdict)])


def _no_pick(verdict: Verdict) -> str:
    """Names the trial that came closest to the constraint, if trials exceed it."""
    constraint = verdict.objective.constraint
    if constraint is not None:
        values = {
            trial.name: value
            for trial, _ in verdict.ranking.excluded
            if trial.status != "failed" and (value := finite_float(trial.metrics.get(constraint.metric))) is not None
        }
        beyond = {name: value for name, value in values.items() if value > constraint.max}
        if beyond and beyond == values:
            name = min(beyond, key=beyond.__getitem__)
            return (
                f"No trial meets {constraint.metric} ≤ {constraint.max:g}; the smallest is "
                f"{format_number(beyond[name])} (trial {name})."
            )
    return "No trial has a result to pick."


def settings_text(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """``loss.beta = 0.1, optim.lr = 1e-5``."""
    return ", ".join(f"{key} = {format_number(values[key])}" for key in keys if key in values)


def _name(configuration: Configuration, verdict: Verdict) -> str:
    settings = settings_text(configuration.values, verdict.keys)
    repeats = [c for c in verdict.configurations if c.values == configuration.values]
    trial = f"trial {configuration.trials[0].name}"
    return f"{settings} ({trial})" if settings and len(repeats) > 1 else settings or trial


def _pick(verdict: Verdict, best: Configuration) -> str:
    metric = verdict.objective.metric
    if best.deviation is None:
        value = f"its {metric} is {format_number(best.mean)}"
    else:
        mean, deviation, low, high = same_decimals(best.mean, best.deviation, min(best.metrics), max(best.metrics))
        value = (
            f"its {metric} is {mean} on average over {count_noun(len(best.metrics), 'seed')}, "
            f"with a standard deviation of {deviation} ({low} to {high})"
        )
    return f"Pick {_name(best, verdict)}: {value}{_distance(best, verdict.objective)}."


def _left_out(configuration: Configuration, name: str = "") -> list[str]:
    """The repeats that the mean of a configuration leaves out: they did not come as far as the others."""
    if not (behind := configuration.behind):
        return []
    seeds = len(behind) + len(configuration.trials)
    of_seeds = f"of the {seeds} seeds of {name}" if name else f"of its {seeds} seeds"
    verb = "is" if len(behind) == 1 else "are"
    return [f"{len(behind)} {of_seeds} {verb} left out: {_by_status(behind)}."]


def _cloned(best: Configuration) -> list[str]:
    """A policy of population-based training has had other values on its way."""
    if (origin := best.trials[0].origin) is None:
        return []
    donor, _, position = origin.partition("@")
    return [
        f"It has these values since it was cloned from trial {donor} after {position} (earlier ones: journal.jsonl): "
        "a run that has them from the start may end elsewhere."
    ]


def _distance(configuration: Configuration, objective: Objective) -> str:
    """The distance from the reference at which the metric was reached."""
    for metric, meaning in DISTANCES.items():
        values = [finite_float(trial.metrics.get(metric)) for trial in configuration.trials]
        present = [value for value in values if value is not None]
        if present and metric != objective.metric:
            return f", at a {meaning} of {format_number(sum(present) / len(present), 3)} nats per completion"
    return ""


def _lead(verdict: Verdict, best: Configuration) -> list[str]:
    if not verdict.leads:
        return _lead_over_stopped(verdict)
    lead = verdict.leads[0]
    other, (difference,) = _name(lead.other, verdict), same_decimals(lead.difference)
    if lead.identical:
        where = f" on each of the {lead.examples:,} held-out {lead.unit}" if lead.examples else ""
        return [f"A tie: {other} has the same result{where}; the two are indistinguishable."]
    noises = _noises(lead)
    if len(verdict.leads) == len(verdict.ties) > 1:
        more = "more seeds" if lead.low is None else "more held-out data"
        others = len(verdict.configurations) > len(verdict.leads) + 1
        finished = " that ran to the end" if best.finished and others else " that came as far" if others else ""
        return [
            f"All {len(verdict.leads) + 1} configurations{finished} tie: the lead of {difference} over the next, "
            f"{other}, is within {' or '.join(noises)}. They may differ on {more}."
        ]
    if lead.level == "unknown":
        cause = ", without results by held-out example and repeats with other seeds"
        if lead.too_few:
            cause = f": {lead.examples} held-out {lead.unit} are too few to tell"
        return [f"Its lead over the next, {other}, is {difference}; how much of that is noise is not known{cause}."]
    if lead.level == "clear":
        seeds = "; seeds were not repeated" if lead.seed_margin is None else ""
        if lead.too_few:
            seeds = f"; {lead.examples} held-out {lead.unit} are too few to estimate theirs"
        return [f"Its lead of {difference} over the next, {other}, is larger than {' and '.join(noises)}{seeds}."]
    return [f"A tie: its lead of {difference} over the next, {other}, is within {' or '.join(noises)}."]


def _lead_over_stopped(verdict: Verdict) -> list[str]:
    """The certainty of a pick that alone ran to the end, by evaluations at which the scheduler decided."""
    lead = verdict.over_stopped
    if lead is None:
        return []
    other, (difference,) = _name(lead.other, verdict), same_decimals(lead.difference)
    start = f"It alone ran to the end. At {lead.where}"
    if lead.identical:
        return [f"{start} {other}, which was stopped there, had the same result on each of the held-out {lead.unit}."]
    if lead.level == "unknown":
        return [f"{start} its lead over {other}, which was stopped there, was {difference}."]
    if lead.high is not None and lead.high < 0:
        return [f"{start} it was behind {other}, which was stopped there, by {difference.lstrip('-')}."]
    relation = "larger than" if lead.level == "clear" else "within"
    noises = " and ".join(_noises(lead))
    return [f"{start} its lead over {other}, which was stopped there, was {difference}, {relation} {noises}."]


def _noises(lead: Lead) -> list[str]:
    """The noises that a clear lead exceeds, or those that hide a tied one."""
    noises = []
    if lead.low is not None and lead.high is not None and (lead.level == "clear" or not lead.exceeds_examples):
        low, high = same_decimals(lead.low, lead.high)
        interval = "the same on each" if lead.low == lead.high else f"95 % interval {low} to {high}"
        noises.append(f"the noise of the {lead.examples:,} held-out {lead.unit} ({interval})")
    if lead.seed_margin is not None and (lead.level == "clear" or not lead.exceeds_seeds):
        noises.append(f"that of seeds (± {same_decimals(lead.seed_margin, digits=2)[0]})")
    return [noise.replace("that of seeds", "the noise of seeds") if i == 0 else noise for i, noise in enumerate(noises)]


def _as_good(verdict: Verdict) -> list[str]:
    """The neighborhood of the best configuration, and the number of ties outside of it."""
    if len(verdict.leads) < 2 or len(verdict.ties) == len(verdict.leads):
        return []
    region = as_good_region(verdict)
    if region is None or not region.spans:
        names = [_name(tie, verdict) for tie in verdict.ties[:3]]
        return [f"As good within the noise: {'; '.join(names)}."] if names else []
    spans = _join([_span(key, values) for key, values in region.spans.items()])
    fixed = settings_text(region.fixed, tuple(region.fixed))
    outside = len(verdict.ties) - len(region.members)
    rest = (
        f" {count_noun(outside, 'further configuration')} elsewhere cannot be told from it either." if outside else ""
    )
    return [f"As good within the noise: {spans}{f' at {fixed}' if fixed else ''}.{rest}"]


def _span(key: str, values: Sequence[Any]) -> str:
    numbers = all(map(is_number, values))
    return f"{key} {(' to ' if numbers else ' or ').join(map(format_number, values))}"


def _unfinished(verdict: Verdict) -> list[str]:
    """Trials that are not compared because their metric is of an earlier step."""
    if verdict.best is None:
        return []
    if not verdict.best.finished:
        best = verdict.best.trials[0]
        return [f"No trial ran to the end: it was stopped at step {best.metrics.get('step')}."] * (
            best.status == "stopped"
        )
    early = [trial for trial in verdict.ranking.ranked if trial.status != "done"]
    return [f"Not compared: {_by_status(early)}."] if early else []


def _by_status(trials: Sequence[Trial]) -> str:
    """``3 stopped early by the scheduler and 1 still running``."""
    counts = Counter(trial.status for trial in trials)
    return _join([f"{count} {UNFINISHED[status]}" for status, count in counts.items()])


def _scales(verdict: Verdict) -> list[str]:
    scaling = [key for key in verdict.keys if key.startswith("loss.")]
    if verdict.objective.metric not in SCALED_BY_LOSS or not scaling:
        return []
    return [
        f"{verdict.objective.metric} is on another scale for each {_join(scaling)}: "
        "eval/rewards/accuracies can be compared between such trials."
    ]


def _exclusions(verdict: Verdict) -> list[str]:
    """Trials that cannot win, by reason."""
    reasons = Counter(reason for _, reason in verdict.ranking.excluded)
    return [f"Excluded: {_join([_excluded(reason, n) for reason, n in reasons.items()])}."] if reasons else []


def _excluded(reason: str, count: int) -> str:
    verb, _, rest = reason.partition(" ")
    plural = {"has": "have", "exceeds": "exceed"}.get(verb, verb)
    return f"{count_noun(count, 'trial')} {plural if count > 1 else verb} {rest}".rstrip()


def _join(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)

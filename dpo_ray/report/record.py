"""What a run directory holds, read from its files alone: of a run that is finished, killed or still going."""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from dpo_ray.config import load_config
from dpo_ray.storage import folder_at
from dpo_ray.types import Messages, Metrics

logger = logging.getLogger(__name__)

Lines = tuple[np.ndarray, np.ndarray]
"""Positions and values of a curve."""

SCORE_NOISE_SE = 2.0
"""Standard errors that a change must exceed to be told from chance (95 %)."""

TIE_NATS = 0.1
"""Mean log-probability ratio, in nats, up to which the policy still equals its reference. Without a reference, the
reward is the log-probability per token, which is larger."""


@dataclass(frozen=True, slots=True)
class HeldOutSample:
    """The completion of one held-out prompt."""

    prompt: Messages
    completion: str
    tokens: int
    score: float | None
    kl: float | None
    """Log-probability of the completion under the policy minus that under the reference, in nats."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out prompts, completed by one version of the policy."""

    version: int
    """Rounds finished when the completions were written; 0 is the untrained policy."""
    samples: tuple[HeldOutSample, ...]

    @property
    def score(self) -> float | None:
        """Mean judge score."""
        return _mean(sample.score for sample in self.samples)

    @property
    def tokens(self) -> float | None:
        """Mean completion length in tokens."""
        return _mean(sample.tokens for sample in self.samples)

    @property
    def kl(self) -> float | None:
        """Mean distance to the reference, nats per sequence."""
        return _mean(sample.kl for sample in self.samples)


@dataclass(frozen=True, slots=True)
class ScoreGain:
    """Judge scores of the same held-out prompts before and after."""

    before: float
    after: float
    mean: float
    error: float
    """Standard error of ``mean`` over prompts; infinite for a single prompt."""
    prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether the change can be told from chance."""
        return abs(self.mean) > SCORE_NOISE_SE * self.error


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds. Series are pairs of arrays, without the values that are missing or not finite."""

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration; empty when the run left none."""
    steps: tuple[Metrics, ...] = ()
    """One line an optimizer step, in order, each step once."""
    evals: tuple[Metrics, ...] = ()
    """Evaluations on held-out pairs: ``step`` and ``eval/*``."""
    rounds: tuple[Metrics, ...] = ()
    """The lines of ``steps`` that end a round, in order of ``round``."""
    evaluations: tuple[Evaluation, ...] = ()
    """Completions of the held-out prompts, by version."""
    samples: tuple[Mapping[str, Any], ...] = ()
    """Groups of the last round on disk: prompt, candidates, scores, what was chosen."""
    samples_round: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    """The data report; empty when the run left none."""
    running: bool = False
    last_step_at: datetime | None = None
    """Local time of the last write to metrics.jsonl."""

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration, or ``default`` where it is absent or null."""
        node: Any = self.config
        for part in dotted.split("."):
            if not isinstance(node, Mapping):
                return default
            node = node.get(part)
        return default if node is None else node

    def over_steps(self, key: str) -> Lines:
        """A metric over optimizer steps."""
        return _series(self.steps, "step", key)

    def over_evals(self, key: str) -> Lines:
        """A metric of held-out pairs over optimizer steps."""
        return _series(self.evals, "step", key)

    @property
    def held_out_accuracy(self) -> Lines:
        """Share of held-out pairs with the higher reward on the chosen completion, over optimizer steps.

        Without step 0 where policy and reference are equal there: every pair ties, so the metric only shows rounding.
        """
        steps, accuracies = self.over_evals("eval/rewards/accuracies")
        if len(steps) and steps[0] == 0 and self._starts_at_reference:
            return steps[1:], accuracies[1:]
        return steps, accuracies

    @property
    def _starts_at_reference(self) -> bool:
        reward = number(self.evals[0].get("eval/rewards/chosen")) or 0.0
        return abs(reward) <= TIE_NATS * self.setting("loss.beta", 1.0)

    def over_rounds(self, key: str) -> Lines:
        """A metric over rounds."""
        return _series(self.rounds, "round", key)

    def over_versions(self, attribute: str) -> Lines:
        """A mean of ``Evaluation`` over policy versions."""
        lines = [{"version": e.version, attribute: getattr(e, attribute)} for e in self.evaluations]
        return _series(lines, "version", attribute)

    @property
    def before(self) -> Evaluation | None:
        """The held-out prompts under the untrained policy."""
        first = self.evaluations[0] if self.evaluations else None
        return first if first and (first.version == 0 or len(self.evaluations) > 1) else None

    @property
    def after(self) -> Evaluation | None:
        """The held-out prompts under the latest policy evaluated."""
        last = self.evaluations[-1] if self.evaluations else None
        return last if last and (last.version > 0 or len(self.evaluations) > 1) else None

    @property
    def held_out(self) -> tuple[tuple[HeldOutSample, HeldOutSample], ...]:
        """Each held-out prompt that was scored before and after, with both completions."""
        if self.before is None or self.after is None:
            return ()
        after = defaultdict(list)
        for sample in self.after.samples:
            after[json.dumps(sample.prompt)].append(sample)
        return tuple(
            (sample, twins.pop(0))
            for sample in self.before.samples
            if (twins := after[json.dumps(sample.prompt)]) and sample.score is not None and twins[0].score is not None
        )

    @property
    def score_gain(self) -> ScoreGain | None:
        """What training did to the held-out score; None without evaluations before and after."""
        if not self.held_out:
            return None
        before = [one.score or 0.0 for one, _ in self.held_out]
        after = [two.score or 0.0 for _, two in self.held_out]
        gains = [b - a for a, b in zip(before, after, strict=True)]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        return ScoreGain(fmean(before), fmean(after), fmean(gains), error, len(gains))

    @property
    def kl(self) -> float | None:
        """Distance to the reference at the end, nats per sequence: on held-out prompts, else on the last round's."""
        if self.after and self.after.kl is not None:
            return self.after.kl
        values = self.over_rounds("kl")[1]
        return float(values[-1]) if len(values) else None

    @property
    def completion_tokens(self) -> tuple[float, float] | None:
        """Mean completion length at the start and at the end: of held-out prompts, else of the rounds' own."""
        if self.before and self.after and self.before.tokens and self.after.tokens:
            return self.before.tokens, self.after.tokens
        values = self.over_rounds("rollout/mean_tokens")[1]
        return (float(values[0]), float(values[-1])) if len(values) > 1 else None

    @property
    def kept_and_dropped(self) -> tuple[float, dict[str, float]]:
        """Prompts that became a pair, and those that did not by reason, over all rounds."""
        prefix = "rollout/dropped_"
        reasons = sorted({key for line in self.rounds for key in line if key.startswith(prefix)})
        dropped = {key.removeprefix(prefix): float(self.over_rounds(key)[1].sum()) for key in reasons}
        return float(self.over_rounds("rollout/kept")[1].sum()), dropped


def read_run(run_dir: str | Path, *, running: bool = False) -> RunRecord:
    """Everything a report needs of a run directory.

    Incomplete lines are skipped; where a resumed run repeats a step or a round, its later line counts.

    Args:
        running: the run is still training, so that files may be missing or incomplete.

    Raises:
        ValueError: the directory is missing, or holds neither metrics nor evaluations and the run is not running.
    """
    path = folder_at(run_dir) if isinstance(run_dir, str) else run_dir
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give a run directory, <run.dir>/<run.name>")
    config = load_config(path / "config.yaml").model_dump(mode="json") if (path / "config.yaml").exists() else {}
    steps, evals = _read_metrics(path / "metrics.jsonl")
    evaluations = tuple(
        Evaluation(int(file.stem), tuple(_held_out_sample(line) for line in _read_jsonl(file)))
        for file in sorted((path / "evaluations").glob("*.jsonl"))
        if file.stem.isdigit()
    )
    evaluations = tuple(evaluation for evaluation in evaluations if evaluation.samples)
    if not (steps or evals or evaluations or running):
        raise ValueError(
            f"{path}: nothing to report: metrics.jsonl holds no step and evaluations/ no completions; "
            "give the directory of a run that has finished at least one step"
        )
    samples_round, samples = _read_last_groups(path / "rounds")
    return RunRecord(
        path=path,
        config=config,
        steps=steps,
        evals=evals,
        rounds=_rounds(steps, path / "rounds"),
        evaluations=evaluations,
        samples=samples,
        samples_round=samples_round,
        data=_read_json(path / "data.json"),
        running=running,
        last_step_at=_modified_at(path / "metrics.jsonl"),
    )


def _read_metrics(path: Path) -> tuple[tuple[Metrics, ...], tuple[Metrics, ...]]:
    """Training lines and evaluation lines, each by step."""
    steps: dict[tuple[int, int], Metrics] = {}  # a round without pairs ends at the step of the one before it
    evals: dict[int, Metrics] = {}
    for line in _read_jsonl(path):
        if not isinstance(line.get("step"), int):
            continue
        training = {key: value for key, value in line.items() if not key.startswith("eval/")}
        if "round" in line:  # follows the line of the step that ended the round
            steps[line["step"], line["round"]] = steps.pop((line["step"], -1), {}) | training
        elif len(training) > 1:
            steps[line["step"], -1] = training
        if len(training) < len(line):
            evals[line["step"]] = {"step": line["step"], **{k: v for k, v in line.items() if k.startswith("eval/")}}
    return tuple(steps[key] for key in sorted(steps)), tuple(evals[step] for step in sorted(evals))


def _rounds(steps: Iterable[Metrics], folder: Path) -> tuple[Metrics, ...]:
    """The lines that end a round, with the counts of its manifest where the line has none."""
    rounds = {line["round"]: line for line in steps if isinstance(line.get("round"), int)}
    for index, line in rounds.items():
        if "rollout/kept" not in line:
            counts = _read_json(folder / f"{index:06d}" / "manifest.json").get("counts") or {}
            dropped = {f"rollout/dropped_{reason}": n for reason, n in (counts.get("dropped") or {}).items()}
            kept = {"rollout/kept": counts["pairs"]} if "pairs" in counts else {}
            rounds[index] = {**kept, **dropped, **line}
    return tuple(rounds[index] for index in sorted(rounds))


def _read_last_groups(folder: Path) -> tuple[int | None, tuple[Metrics, ...]]:
    for file in sorted(folder.glob("*/pairs.jsonl"), reverse=True):
        if file.parent.name.isdigit() and (groups := tuple(_read_jsonl(file))):
            return int(file.parent.name), groups
    return None, ()


def _held_out_sample(line: Mapping[str, Any]) -> HeldOutSample:
    policy, reference = number(line.get("policy_logp")), number(line.get("reference_logp"))
    prompt = line.get("prompt") or ()
    return HeldOutSample(
        prompt=({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt),
        completion=str(line.get("completion") or ""),
        tokens=int(number(line.get("tokens")) or 0),
        score=number(line.get("score")),
        kl=policy - reference if policy is not None and reference is not None else None,
    )


def _read_jsonl(path: Path) -> list[Metrics]:
    """The objects of a JSON lines file, without a last line that is incomplete; none where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    objects = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict):
            objects.append(line)
        elif text.strip() and text.endswith("\n"):
            logger.warning("%s:%d: skipped, not a JSON object", path, number)
    return objects


def _modified_at(path: Path) -> datetime | None:
    """Local time of the last write; None where there is no file, or its store does not tell."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).astimezone()
    except (OSError, AttributeError, TypeError):
        return None


def _read_json(path: Path) -> Metrics:
    """The object in a JSON file; empty where there is none or it was cut off."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        logger.warning("%s: skipped, not valid JSON: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def _series(lines: Iterable[Mapping[str, Any]], x: str, y: str) -> Lines:
    points = [(line[x], value) for line in lines if (value := number(line.get(y))) is not None]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def number(value: Any) -> float | None:
    """``value`` as a float; None unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None

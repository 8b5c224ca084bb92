"""A finished, killed or running run, read from the files of its directory alone."""

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from dpo_ray.config.losses import UNPAIRED_LOSSES
from dpo_ray.config.rounds import IMPLICIT
from dpo_ray.report.formatting import prompt_text
from dpo_ray.storage import folder_at, read_jsonl
from dpo_ray.sweep.held_out import evaluation_files
from dpo_ray.types import Messages, Metrics, finite_float

logger = logging.getLogger(__name__)

Curve = tuple[np.ndarray, np.ndarray]
"""Positions and values, without those that are missing or not finite."""

SCORE_KEY = re.compile(r"judge/(.+)_score")
"""Metrics of rounds that are means of scores."""
SCORES = ("mean", "best", "chosen", "rejected")
"""Names of the means that every judge has; other names are parts of a score."""
SCORE_NOISE_SE = 2.0
"""Standard errors that a significant change exceeds (95 %)."""
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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Completions of the held-out prompts by one version of the policy."""

    version: int
    """Rounds finished before the completions were generated; 0 is the untrained policy."""
    samples: tuple[HeldOutSample, ...]
    kl: float | None = None
    """KL divergence of the policy from the reference, nats per completion."""

    def mean(self, attribute: Literal["score", "tokens"]) -> float | None:
        """Mean over samples, without those that have no value."""
        values = [value for sample in self.samples if (value := getattr(sample, attribute)) is not None]
        return fmean(values) if values else None


class Comparison(NamedTuple):
    """A held-out prompt that has a judge score before and after training."""

    prompt: str
    before: str
    before_score: float
    after: str
    after_score: float

    @property
    def gain(self) -> float:
        """Change of the judge score."""
        return self.after_score - self.before_score


@dataclass(frozen=True, slots=True)
class ScoreGain:
    """Judge scores of the same held-out prompts before and after training."""

    before: float
    after: float
    mean: float
    error: float
    """Standard error of ``mean`` over prompts; infinite for a single prompt."""
    prompts: int

    @property
    def is_significant(self) -> bool:
        """True if the change exceeds chance."""
        return abs(self.mean) > SCORE_NOISE_SE * self.error


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report needs of a run."""

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration; empty if the file is missing."""
    steps: tuple[Metrics, ...] = ()
    """One line per optimizer step, in order."""
    evals: tuple[Metrics, ...] = ()
    """Evaluations on held-out pairs: ``step`` and ``eval/*``."""
    rounds: tuple[Metrics, ...] = ()
    """The lines of ``steps`` that end a round, in order of ``round``."""
    evaluations: tuple[Evaluation, ...] = ()
    """Completions of the held-out prompts, by version."""
    groups: tuple[Mapping[str, Any], ...] = ()
    """Completion groups of the last round: prompt, candidates, scores and pairs."""
    groups_round: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    """The data report; empty if the file is missing."""

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration; ``default`` if it is absent or null."""
        node: Any = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return default if node is None else node

    @property
    def judged_by_workers(self) -> bool:
        """True if the training workers score the completions."""
        candidates = self.setting("online.source.use", "candidates") == "candidates"
        return candidates and self.setting("online.judge.use") == IMPLICIT

    @property
    def labeled(self) -> bool:
        """True if the run trained on completions with a label instead of pairs."""
        return any(name in UNPAIRED_LOSSES for name in self.losses)

    @property
    def losses(self) -> Sequence[str]:
        """Names of the losses whose sum the run minimizes."""
        use = self.setting("loss.use", ())
        return [use] if isinstance(use, str) else use

    @property
    def examples(self) -> str:
        """The training examples, for sentences."""
        return "completions" if self.labeled else "pairs"

    @property
    def roles(self) -> tuple[str, str]:
        """Names of the completions to prefer and to avoid, for sentences."""
        return ("desirable", "undesirable") if self.labeled else ("chosen", "rejected")

    @property
    def learned(self) -> str:
        """Predicate of a sentence on the examples with a reward on the right side."""
        return "got likelier or less likely as labeled" if self.labeled else "are ordered right"

    def over_steps(self, key: str) -> Curve:
        return _curve(self.steps, "step", key)

    def over_evals(self, key: str) -> Curve:
        """A metric of held-out pairs over optimizer steps."""
        return _curve(self.evals, "step", key)

    def over_rounds(self, key: str) -> Curve:
        return _curve(self.rounds, "round", key)

    def over_versions(self, attribute: Literal["score", "tokens", "kl"]) -> Curve:
        """A mean over the held-out prompts, over policy versions."""
        mean = lambda e: e.kl if attribute == "kl" else e.mean(attribute)  # noqa: E731
        lines = [{"version": e.version, attribute: mean(e)} for e in self.evaluations]
        return _curve(lines, "version", attribute)

    def accuracies(self, prefix: Literal["", "eval/"] = "") -> Curve:
        """Share of training (``""``) or held-out (``"eval/"``) pairs with the higher reward on the chosen completion.

        Leaves out the point before the first update if policy and reference are equal there: every pair ties.
        """
        lines, untrained = (self.evals, 0) if prefix else (self.steps, 1)
        if lines and lines[0]["step"] == untrained:
            reward = finite_float(lines[0].get(f"{prefix}rewards/chosen")) or 0.0
            if abs(reward) <= TIE_NATS * self.setting("loss.beta", 1.0):
                lines = lines[1:]
        return _curve(lines, "step", f"{prefix}rewards/accuracies")

    @property
    def judge_parts(self) -> list[str]:
        """Names of the parts that the judge's scores consist of, such as the judges of a weighted one."""
        keys = dict.fromkeys(key for line in self.rounds for key in line)
        return [found[1] for key in keys if (found := SCORE_KEY.fullmatch(key)) and found[1] not in SCORES]

    @property
    def before(self) -> Evaluation | None:
        """The held-out prompts under the untrained policy."""
        return self.evaluations[0] if self.evaluations and self.evaluations[0].version == 0 else None

    @property
    def after(self) -> Evaluation | None:
        """The held-out prompts under the latest policy evaluated."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1].version > 0 else None

    @property
    def comparisons(self) -> list[Comparison]:
        """The held-out prompts that have a score before and after training."""
        if self.before is None or self.after is None:
            return []
        after = defaultdict(list)
        for sample in self.after.samples:
            after[json.dumps(sample.prompt)].append(sample)
        pairs = [(s, after[json.dumps(s.prompt)].pop(0)) for s in self.before.samples if after[json.dumps(s.prompt)]]
        return [
            Comparison(prompt_text(old.prompt), old.completion, old.score, new.completion, new.score)
            for old, new in pairs
            if old.score is not None and new.score is not None
        ]

    @property
    def score_gain(self) -> ScoreGain | None:
        """Effect of training on the held-out judge score; None without evaluations before and after."""
        rows = self.comparisons
        if not rows:
            return None
        before, after = fmean(row.before_score for row in rows), fmean(row.after_score for row in rows)
        gains = [row.gain for row in rows]
        error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        return ScoreGain(before, after, fmean(gains), error, len(gains))

    @property
    def kl(self) -> float | None:
        """Final distance to the reference, nats per completion: on held-out prompts, else on the last round's."""
        if self.after and self.after.kl is not None:
            return self.after.kl
        values = self.over_rounds("kl")[1]
        return float(values[-1]) if len(values) else None

    @property
    def completion_tokens(self) -> tuple[float, float] | None:
        """Mean completion length at the start and at the end: on held-out prompts, else over rounds."""
        if self.before and self.after:
            before, after = self.before.mean("tokens"), self.after.mean("tokens")
            if before and after:
                return before, after
        values = self.over_rounds("rollout/mean_tokens")[1]
        return (float(values[0]), float(values[-1])) if len(values) > 1 else None

    @property
    def dropped(self) -> dict[str, float]:
        """Prompts without a pair, by reason, over all rounds."""
        prefix = "rollout/dropped_"
        reasons = sorted({key for line in self.rounds for key in line if key.startswith(prefix)})
        return {key.removeprefix(prefix): float(self.over_rounds(key)[1].sum()) for key in reasons}

    @property
    def prompts(self) -> float:
        """Prompts of all rounds, with and without a pair."""
        return float(self.over_rounds("rollout/kept")[1].sum()) + sum(self.dropped.values())


def read_run(run_dir: str | Path, *, running: bool = False) -> RunRecord:
    """Read a run directory.

    Skips incomplete lines; where a resumed run repeats a step or a round, its later line counts.

    Raises:
        ValueError: the directory is missing, or has neither metrics nor evaluations and the run is not ``running``.
    """
    path = folder_at(run_dir) if isinstance(run_dir, str) else run_dir
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give a run directory, <run.dir>/<run.name>")
    steps, evals = _read_metrics(path / "metrics.jsonl")
    rounds = {line["round"]: line for line in steps if isinstance(line.get("round"), int)}
    evaluations = tuple(
        evaluation
        for version, file in evaluation_files(path).items()
        if (evaluation := _read_evaluation(version, file)).samples or evaluation.kl is not None
    )
    if not (steps or evals or evaluations or running):
        raise ValueError(
            f"{path}: nothing to report: no step in metrics.jsonl and no completions in evaluations/; "
            "give the directory of a run that has finished at least one step"
        )
    groups_round, groups = _read_last_groups(path / "rounds")
    return RunRecord(
        path=path,
        config=_read_mapping(path / "config.yaml", yaml.safe_load),
        steps=steps,
        evals=evals,
        rounds=tuple(rounds[index] for index in sorted(rounds)),
        evaluations=evaluations,
        groups=groups,
        groups_round=groups_round,
        data=_read_mapping(path / "data.json", json.loads),
    )


def _read_metrics(path: Path) -> tuple[tuple[Metrics, ...], tuple[Metrics, ...]]:
    """Training lines and evaluation lines, each by step."""
    steps: dict[tuple[int, int], Metrics] = {}  # a round without pairs ends at the step of the round before it
    evals: dict[int, Metrics] = {}
    for line in read_jsonl(path):
        if not isinstance(line.get("step"), int):
            continue
        training = {key: value for key, value in line.items() if not key.startswith("eval/")}
        if len(training) > 1:
            steps[line["step"], line.get("round", -1)] = training
        if len(training) < len(line):
            evals[line["step"]] = {"step": line["step"], **{k: v for k, v in line.items() if k.startswith("eval/")}}
    return tuple(steps[key] for key in sorted(steps)), tuple(evals[step] for step in sorted(evals))


def _read_last_groups(folder: Path) -> tuple[int | None, tuple[Metrics, ...]]:
    for file in sorted(folder.glob("*/pairs.jsonl"), reverse=True):
        if file.parent.name.isdigit() and (groups := tuple(read_jsonl(file))):
            return int(file.parent.name), groups
    return None, ()


def _read_evaluation(version: int, file: Path) -> Evaluation:
    samples = tuple(map(_held_out_sample, read_jsonl(file)))
    kl = _read_mapping(file.with_suffix(".kl.json"), json.loads).get("kl")
    return Evaluation(version, samples, finite_float(kl))


def _held_out_sample(line: Mapping[str, Any]) -> HeldOutSample:
    return HeldOutSample(
        prompt=tuple(line.get("prompt") or ()),
        completion=str(line.get("completion") or ""),
        tokens=int(finite_float(line.get("tokens")) or 0),
        score=finite_float(line.get("score")),
    )


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> Metrics:
    """The mapping in a JSON or YAML file; empty if the file is missing or invalid."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s: skipped, not valid: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def _curve(lines: Iterable[Mapping[str, Any]], x: str, y: str) -> Curve:
    points = [(line[x], value) for line in lines if (value := finite_float(line.get(y))) is not None]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)

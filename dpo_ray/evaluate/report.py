"""Reading a run directory, its key figures, and the page that shows them.

Works from the files alone, of a run that is finished, killed or still going. Knows nothing of how they came to be: no
torch, no Ray.
"""

import json
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from dpo_ray.config import load_config
from dpo_ray.evaluate.health import SCORE_NOISE_SE, Finding, alike, diagnose
from dpo_ray.evaluate.pictures import PALETTE, Lines, Picture, run_pictures, sweep_picture
from dpo_ray.types import Messages, Metrics

logger = logging.getLogger(__name__)

PAGE_COMPARISONS = 7
"""Held-out prompts on the page, from the largest gain to the largest loss; odd, so that the median is among them."""
PAGE_PAIRS = 4
"""Groups of the last round on the page."""
PAGE_CHARACTERS = 4000
"""Of one text on the page; the run directory holds the rest."""
SECRET = re.compile(r"(api_?key|secret|password|credential|token)$", re.IGNORECASE)
"""Names of settings whose values a page that is passed around must not show."""


# -------------------------------------------------------------------------------------------------------- the record


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


def read_run(run_dir: str | Path) -> RunRecord:
    """Everything a report needs of a run directory.

    Lines that a kill cut off are skipped; where a resumed run repeats a step or a round, its later line counts.

    Raises:
        ValueError: the directory is missing, or holds neither metrics nor evaluations.
    """
    path = Path(run_dir)
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
    if not steps and not evals and not evaluations:
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
    )


def _read_metrics(path: Path) -> tuple[tuple[Metrics, ...], tuple[Metrics, ...]]:
    """Training lines and evaluation lines, each by step."""
    steps: dict[int, Metrics] = {}
    evals: dict[int, Metrics] = {}
    for line in _read_jsonl(path):
        if not isinstance(line.get("step"), int):
            continue
        training = {key: value for key, value in line.items() if not key.startswith("eval/")}
        if len(training) > 1:
            steps[line["step"]] = training
        if len(training) < len(line):
            evals[line["step"]] = {"step": line["step"], **{k: v for k, v in line.items() if k.startswith("eval/")}}
    return tuple(steps[step] for step in sorted(steps)), tuple(evals[step] for step in sorted(evals))


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
    policy, reference = _number(line.get("policy_logp")), _number(line.get("reference_logp"))
    prompt = line.get("prompt") or ()
    return HeldOutSample(
        prompt=({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt),
        completion=str(line.get("completion") or ""),
        tokens=int(_number(line.get("tokens")) or 0),
        score=_number(line.get("score")),
        kl=policy - reference if policy is not None and reference is not None else None,
    )


def _read_jsonl(path: Path) -> list[Metrics]:
    """The objects of a JSON lines file; none where there is no file."""
    if not path.exists():
        return []
    objects = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict):
            objects.append(line)
        else:
            logger.warning("%s:%d: skipped, not a JSON object (a killed run cuts its last line)", path, number)
    return objects


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
    points = [(line[x], value) for line in lines if (value := _number(line.get(y))) is not None]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def _number(value: Any) -> float | None:
    """``value`` as a float; None unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


# ------------------------------------------------------------------------------------------------------- key figures


@dataclass(frozen=True, slots=True)
class Summary:
    """The key figures of a run; None where the run holds no data for one."""

    score_before: float | None
    """Mean judge score of the held-out prompts under the untrained policy."""
    score_after: float | None
    kl: float | None
    """Nats per sequence between policy and reference at the end."""
    tokens_before: float | None
    """Mean completion length in tokens."""
    tokens_after: float | None
    pairs_per_s: float | None
    """Median over steps."""
    tokens_per_s: float | None
    """Training tokens, median over steps."""
    generate_tokens_per_s: float | None
    """Generated tokens, median over rounds."""
    rounds: int
    steps: int
    wall_s: float | None
    """Time of training, syncing, generating and judging; start-up, evaluation and saving are not in the metrics."""


class Comparison(NamedTuple):
    """One held-out prompt before and after training."""

    prompt: str
    before: str
    before_score: float
    after: str
    after_score: float

    @property
    def gain(self) -> float:
        """Change of the judge score."""
        return self.after_score - self.before_score


def summary(record: RunRecord) -> Summary:
    """The figures of a run that fit into a terminal table."""
    lengths = record.completion_tokens or (None, None)
    return Summary(
        score_before=record.before.score if record.before else None,
        score_after=record.after.score if record.after else None,
        kl=record.kl,
        tokens_before=lengths[0],
        tokens_after=lengths[1],
        pairs_per_s=_median(record.over_steps("perf/pairs_per_s")),
        tokens_per_s=_median(record.over_steps("perf/tokens_per_s")),
        generate_tokens_per_s=_median(record.over_rounds("rollout/tokens_per_s")),
        rounds=len(record.rounds),
        steps=len(record.steps),
        wall_s=_wall_s(record),
    )


def comparisons(record: RunRecord, n: int = 3) -> list[Comparison]:
    """Held-out prompts before and after, evenly spaced from the largest gain to the largest loss.

    With 3: the largest gain, the median, the largest loss (or the smallest gain). Fewer where fewer prompts were scored
    both before and after.
    """
    found = [
        Comparison(prompt_text(one.prompt), one.completion, one.score or 0.0, two.completion, two.score or 0.0)
        for one, two in record.held_out
    ]
    found.sort(key=lambda comparison: -comparison.gain)
    places = np.unique(np.linspace(0, len(found) - 1, min(n, len(found))).round().astype(int)) if found else []
    return [found[place] for place in places]


def prompt_text(prompt: Sequence[Mapping[str, str]] | str) -> str:
    """A conversation as plain text: a single user turn alone, several turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role", "user") == "user":
        return prompt[0].get("content", "")
    return "\n".join(f"{message.get('role', 'user')}: {message.get('content', '')}" for message in prompt)


def verdict(record: RunRecord, findings: Sequence[Finding]) -> str:
    """The run in one or two sentences."""
    warnings = sum(finding.level == "warning" for finding in findings)
    attention = {0: "", 1: " There is one warning below."}.get(warnings, f" There are {warnings} warnings below.")
    return _outcome(record) + attention


def _outcome(record: RunRecord) -> str:
    gain = record.score_gain
    if gain is not None:
        before, after = alike(gain.before, gain.after)
        figures = f"from {before} to {after}"
        over = f" over {_plural(len(record.rounds), 'round')}" if record.rounds else ""
        moved = f", {record.kl:.1f} nats per completion away from the reference" if record.kl is not None else ""
        if not gain.is_clear:
            return (
                f"The held-out judge score did not change beyond chance: {figures}{over} "
                f"({gain.mean:+.2g} ± {gain.error:.2g}){moved}."
            )
        return f"The held-out judge score {'rose' if gain.mean > 0 else 'fell'} {figures}{over}{moved}."
    scores = record.over_rounds("judge/mean_score")[1]
    if len(scores) > 1:
        before, after = alike(scores[0], scores[-1])
        return f"The judge's mean score went from {before} to {after} over {len(scores)} rounds."
    eval_steps, accuracies = record.over_evals("eval/rewards/accuracies")
    if len(accuracies) and eval_steps[-1] > 0:
        return (
            f"After {_plural(int(eval_steps[-1]), 'step')} the policy prefers the chosen completion in "
            f"{accuracies[-1]:.0%} of held-out pairs."
        )
    accuracies, margins = record.over_steps("rewards/accuracies")[1], record.over_steps("rewards/margins")[1]
    if len(accuracies) and len(margins):
        tail = max(1, len(accuracies) // 10)
        return (
            f"After {_plural(len(record.steps), 'step')} the policy prefers the chosen completion in "
            f"{accuracies[-tail:].mean():.0%} of training pairs, by a mean margin of {margins[-tail:].mean():.2f}."
        )
    return f"The run has made {_plural(len(record.steps), 'step')}."


def _median(line: Lines) -> float | None:
    return float(np.median(line[1])) if len(line[1]) else None


def _wall_s(record: RunRecord) -> float | None:
    """Seconds of all rounds, offline of all steps.

    A round lasts as long as its training workers train, send and wait. Where generation does not run ahead of training,
    it lasts at least as long as generating and judging besides.
    """
    if not record.rounds:
        seconds = record.over_steps("perf/step_s")[1]
        return float(seconds.sum()) if len(seconds) else None
    total = 0.0
    for line in record.rounds:
        phase = {
            name: _number(line.get(f"perf/{name}_s")) or 0.0 for name in ("generate", "judge", "train", "sync", "wait")
        }
        made = 0.0 if line.get("policy_lag") else phase["generate"] + phase["judge"]
        total += phase["train"] + phase["sync"] + max(phase["wait"], made)
    return total or None


# ----------------------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure."""

    label: str
    value: str
    detail: str = ""
    before: str = ""
    """What the value was at the start; shown with an arrow."""


@dataclass(frozen=True, slots=True)
class Text:
    """A completion with its judge score."""

    heading: str
    text: str
    score: str = ""
    tone: str = ""
    """chosen | rejected | empty."""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with completions side by side."""

    heading: str
    prompt: str
    texts: tuple[Text, ...]
    badge: str = ""
    tone: str = ""
    """up | down | empty; colours the badge."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; the first column is aligned left, the others right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: int | None = None
    """Row to highlight."""


@dataclass(frozen=True, slots=True)
class Page:
    """What the template shows; empty parts are left out."""

    kind: str
    title: str
    verdict: str
    facts: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()
    findings: tuple[Finding, ...] = ()
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    held_out: tuple[Example, ...] = ()
    pairs_heading: str = ""
    pairs: tuple[Example, ...] = ()
    data: Table | None = None
    config: str = ""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` of a run: one file that needs no network.

    Raises:
        ValueError: the directory holds no run.
    """
    record = read_run(run_dir)
    findings = diagnose(record)
    name = record.setting("run.name") or record.path.resolve().name
    page = Page(
        kind="Online DPO" if record.rounds or record.config.get("online") else "DPO",
        title=name,
        verdict=verdict(record, findings),
        facts=_facts(record),
        tiles=_tiles(record),
        findings=tuple(findings),
        pictures=tuple(run_pictures(record)),
        held_out=_held_out_examples(record),
        pairs_heading=f"Candidates of round {record.samples_round}" if record.samples else "",
        pairs=_pair_examples(record),
        data=_data_table(record.data),
        config=yaml.safe_dump(_without_secrets(dict(record.config)), sort_keys=False) if record.config else "",
    )
    return _write_page(page, record.path)


def write_sweep_report(run_dir: str | Path, rows: Sequence[Mapping[str, Any]], metric: str, mode: str) -> Path:
    """Write ``report.html`` of a sweep: its trials from best to worst, and the metric over the swept values.

    Args:
        rows: a mapping a trial: ``trial``, the swept dotted keys, metrics, times. A trial without a finite ``metric``
            counts as failed and comes last.
        metric: the key of ``rows`` that ranks the trials.
        mode: min | max, which end of the metric is good.

    Raises:
        ValueError: no rows, an unknown mode, or a metric that no row has.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode is {mode!r}; it is min or max")
    if not any(metric in row for row in rows):
        found = ", ".join(sorted({key for row in rows for key in row})) or "no trials at all"
        raise ValueError(f"no trial of the sweep has the metric {metric!r}; found: {found}")
    finished = [row for row in rows if _number(row.get(metric)) is not None]
    failed = [row for row in rows if _number(row.get(metric)) is None]
    finished.sort(key=lambda row: row[metric], reverse=mode == "max")
    ranked = (*finished, *failed)
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    swept = tuple(key for key in columns if "." in key and "/" not in key)
    columns = tuple(dict.fromkeys((*(("trial",) if "trial" in columns else ()), *swept, metric, *columns)))
    numeric = [key for key in swept if finished and _varies(finished, key)]
    if "optim.lr" in numeric[:2]:
        numeric.sort(key=lambda key: key != "optim.lr")
    picture = sweep_picture(finished, numeric[:2], metric, mode)
    page = Page(
        kind="Sweep",
        title=Path(run_dir).resolve().name,
        verdict=_sweep_verdict(finished, swept, metric, mode),
        facts=(
            _plural(len(rows), "trial"),
            *((f"{len(failed)} without a result",) if failed else ()),
            f"{mode} of {metric}",
        ),
        pictures=(picture,) if picture else (),
        table=Table(
            columns,
            tuple(zip(*(_column([row.get(key) for row in ranked], key in swept) for key in columns), strict=True)),
            best=0 if finished else None,
        ),
    )
    return _write_page(page, Path(run_dir))


def _write_page(page: Page, folder: Path) -> Path:
    """Render and write in one move: a reader sees the old page or the new one."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup
    html = environment.get_template("report.html.j2").render(page=page, palette=PALETTE)
    target = folder / "report.html"
    temporary = folder / f".report.html.{os.getpid()}"
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(target)
    return target


def _facts(record: RunRecord) -> tuple[str, ...]:
    """The settings that tell runs apart."""
    settings = (
        ("", record.setting("model.path")),
        ("loss ", record.setting("loss.use")),
        ("beta ", record.setting("loss.beta")),
        ("lr ", record.setting("optim.lr")),
        ("judge ", record.setting("online.judge.use")),
        ("max lag ", record.setting("online.max_lag")),
        ("seed ", record.setting("run.seed")),
    )
    return tuple(f"{name}{_cell(value)}" for name, value in settings if value is not None)


def _tiles(record: RunRecord) -> tuple[Tile, ...]:
    figures, gain = summary(record), record.score_gain
    tiles = []
    if figures.score_after is not None or figures.score_before is not None:
        detail = f"{gain.mean:+.2g} ± {gain.error:.1g}, {_plural(gain.prompts, 'prompt')}" if gain else ""
        tiles.append(_before_after("Held-out judge score", figures.score_before, figures.score_after, detail))
    tiles += _eval_tiles(record)
    if figures.kl is not None:
        tiles.append(Tile("KL to the reference", f"{figures.kl:.1f}", "nats per completion"))
    if figures.tokens_after is not None and figures.tokens_before is not None:
        change = f", {figures.tokens_after / figures.tokens_before - 1:+.0%}" if figures.tokens_before else ""
        tiles.append(
            Tile("Completion length", f"{figures.tokens_after:.0f}", f"tokens{change}", f"{figures.tokens_before:.0f}")
        )
    if figures.pairs_per_s is not None:
        tokens = f"{_short(figures.tokens_per_s)} tokens/s" if figures.tokens_per_s is not None else ""
        tiles.append(Tile("Training", f"{_short(figures.pairs_per_s)} pairs/s", tokens))
    if figures.generate_tokens_per_s is not None:
        tiles.append(Tile("Generation", f"{_short(figures.generate_tokens_per_s)} tokens/s", "median of rounds"))
    steps = _plural(figures.steps, "optimizer step")
    if figures.rounds:
        tiles.append(Tile("Done", _plural(figures.rounds, "round"), steps))
    elif figures.steps:
        epoch = _number(record.steps[-1].get("epoch"))
        tiles.append(Tile("Done", f"{figures.steps:,} steps", f"{epoch:.3g} epochs" if epoch is not None else ""))
    if figures.wall_s is not None:
        tiles.append(Tile("Time", _duration(figures.wall_s), "without start-up and evaluation"))
    return tuple(tiles)


def _eval_tiles(record: RunRecord) -> list[Tile]:
    """Held-out pairs: accuracy and loss, first and last."""
    tiles = []
    for label, key, form, detail in (
        ("Held-out accuracy", "eval/rewards/accuracies", ".0%", "of pairs ordered right"),
        ("Held-out loss", "eval/loss", ".3f", "mean over pairs"),
    ):
        values = record.over_evals(key)[1]
        if len(values):
            # Before the first step all margins are 0, and which side of 0 rounding puts them on says nothing.
            known = len(values) > 1 and not (key.endswith("accuracies") and record.evals[0]["step"] == 0)
            tiles.append(Tile(label, f"{values[-1]:{form}}", detail, f"{values[0]:{form}}" if known else ""))
    return tiles


def _before_after(label: str, before: float | None, after: float | None, detail: str) -> Tile:
    if before is None or after is None:
        value = after if after is not None else before
        return Tile(
            label, "" if value is None else _short(value), detail or ("before training" if after is None else "")
        )
    first, last = alike(before, after)
    return Tile(label, last, detail, first)


def _held_out_examples(record: RunRecord) -> tuple[Example, ...]:
    found = comparisons(record, PAGE_COMPARISONS)
    examples = []
    for place, one in enumerate(found):
        heading = ""
        if len(found) > 1 and place in (0, len(found) - 1):
            size = ("Largest", "Smallest") if place == 0 else ("Smallest", "Largest")
            heading = f"{size[0]} gain" if one.gain > 0 else f"{size[1]} loss" if one.gain < 0 else "No change"
        elif place * 2 == len(found) - 1:
            heading = "Median"
        before, after = alike(one.before_score, one.after_score)
        texts = (
            Text("before", _shortened(one.before), before),
            Text("after", _shortened(one.after), after),
        )
        tone = "up" if one.gain > 0 else "down" if one.gain < 0 else ""
        examples.append(Example(heading, _shortened(one.prompt), texts, f"{one.gain:+.2g}", tone))
    return tuple(examples)


def _pair_examples(record: RunRecord) -> tuple[Example, ...]:
    """Groups evenly spaced over those that gave a pair, and the first that did not."""
    paired = [group for group in record.samples if group.get("chosen") is not None]
    dropped = [group for group in record.samples if group.get("chosen") is None]
    wanted = PAGE_PAIRS - bool(dropped)
    places = np.unique(np.linspace(0, len(paired) - 1, min(wanted, len(paired))).astype(int)) if paired else []
    return tuple(_pair_example(group) for group in (*(paired[place] for place in places), *dropped[:1]))


def _pair_example(group: Mapping[str, Any]) -> Example:
    """A group with all its candidates, best first; those without a score last."""
    candidates = group.get("candidates") or ()
    scores = [_number(score) for score in (group.get("scores") or [])[: len(candidates)]]
    scores += [None] * (len(candidates) - len(scores))
    figures = iter(alike(*(score for score in scores if score is not None)))
    shown = ["" if score is None else next(figures) for score in scores]
    ranking = sorted(range(len(candidates)), key=lambda i: math.inf if (score := scores[i]) is None else -score)
    reason = group.get("dropped")
    return Example(
        heading="No pair" if reason else "",
        prompt=_shortened(prompt_text(group.get("prompt") or ())),
        texts=tuple(_candidate_text(group, i, shown[i]) for i in ranking),
        badge=str(reason).replace("_", " ") if reason else "",
    )


def _candidate_text(group: Mapping[str, Any], i: int, score: str) -> Text:
    candidate = group["candidates"][i]
    role = "chosen" if i == group.get("chosen") else "rejected" if i == group.get("rejected") else ""
    tokens = len(candidate.get("token_ids") or ())
    remarks = ((f"{tokens} tokens", tokens > 0), ("cut off", not candidate.get("finished", True)))
    return Text(
        heading=role or f"candidate {i}",
        text=_shortened(candidate.get("text", "")),
        score=score,
        tone=role,
        remark=", ".join(remark for remark, applies in remarks if applies),
    )


def _data_table(data: Mapping[str, Any]) -> Table | None:
    """The numbers of the data report, nested names joined by dots."""
    rows: list[tuple[str, str]] = []

    def visit(node: Any, name: str) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                visit(value, f"{name}.{key}" if name else str(key))
        elif isinstance(node, list | tuple):
            if node and all(isinstance(item, Mapping) for item in node):
                for i, item in enumerate(node):
                    visit(item, f"{name}.{i}")
            else:
                rows.append((name, _shortened(", ".join(map(str, node)), 300)))
        else:
            rows.append((name, _cell(node)))

    visit(data, "")
    return Table(("count", "value"), tuple(rows)) if rows else None


def _without_secrets(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {
            key: "(hidden)" if SECRET.search(str(key)) and isinstance(value, str) else _without_secrets(value)
            for key, value in node.items()
        }
    return [_without_secrets(item) for item in node] if isinstance(node, list) else node


def _sweep_verdict(finished: Sequence[Mapping[str, Any]], swept: Sequence[str], metric: str, mode: str) -> str:
    if not finished:
        return "No trial finished with a result."
    best, worst = finished[0], finished[-1]
    settings = ", ".join(f"{key} = {_cell(best.get(key))}" for key in swept) or f"trial {_cell(best.get('trial'))}"
    extreme = "lowest" if mode == "min" else "highest"
    span = f"; the worst trial has {_cell(worst[metric])}" if len(finished) > 1 else ""
    return f"The {extreme} {metric} is {_cell(best[metric])}, at {settings}{span}."


def _varies(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a swept key is a number in every row, and not the same one."""
    values = [_number(row.get(key)) for row in rows]
    return None not in values and (len(set(values)) > 1 or len(rows) == 1)


# --------------------------------------------------------------------------------------------------------- wording


def _short(value: float) -> str:
    """A figure to three digits; thousands with a separator."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _column(values: Sequence[Any], swept: bool) -> list[str]:
    """Cells of a column; measured floats all with the same decimals, swept ones as they were given."""
    measured = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if swept or not measured:
        return [_cell(value) for value in values]
    texts = iter(alike(*measured, digits=4))
    return [next(texts) if isinstance(value, float) and math.isfinite(value) else _cell(value) for value in values]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if not math.isfinite(value) else re.sub(r"e-0+", "e-", f"{value:.4g}")  # noqa: RUF001
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return "–" if value is None else str(value)  # noqa: RUF001


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _shortened(text: str, characters: int = PAGE_CHARACTERS) -> str:
    return text if len(text) <= characters else f"{text[:characters]} … ({len(text) - characters:,} more characters)"

"""The page that shows a run or a sweep: key figures, findings, pictures, samples."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from dpo_ray.report.drawing import PALETTE
from dpo_ray.report.figures import Summary, comparisons, prompt_text, summary, verdict
from dpo_ray.report.formatting import count_noun, format_duration, indistinguishable
from dpo_ray.report.health import Finding, diagnose
from dpo_ray.report.plots import Picture, run_pictures, sweep_picture
from dpo_ray.report.record import RunRecord, number, read_run
from dpo_ray.storage import write_atomically

logger = logging.getLogger(__name__)

PAGE_COMPARISONS = 7
"""Held-out prompts on the page, from the largest gain to the largest loss; odd, so that the median is among them."""
PAGE_PAIRS = 4
"""Groups of the last round on the page."""
PAGE_CHARACTERS = 4000
"""Of one text on the page; the run directory holds the rest."""
SECRET = re.compile(r"(api_?key|secret|password|credential|token)$", re.IGNORECASE)
"""Names of settings whose values a page that is passed around must not show."""


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
    running: str = ""
    """The state of a run that is still training; the page then reloads every minute."""


def write_report(run_dir: str | Path, *, running: bool = False) -> Path:
    """Write ``report.html`` of a run: one file that needs no network.

    Args:
        running: the run is still training; the page shows that and reloads every minute.

    Raises:
        ValueError: the directory holds no run.
    """
    record = read_run(run_dir, running=running)
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
        running=_running_line(record),
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
    finished = [row for row in rows if number(row.get(metric)) is not None]
    failed = [row for row in rows if number(row.get(metric)) is None]
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
            count_noun(len(rows), "trial"),
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
    write_atomically(target, html)
    return target


def _running_line(record: RunRecord) -> str:
    if not record.running:
        return ""
    step = f"step {record.steps[-1]['step']:,}" if record.steps else "no step yet"
    return f"Running: {step}" + (f" at {record.last_step_at:%Y-%m-%d %H:%M:%S %Z}" if record.last_step_at else "")


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
        detail = f"{gain.mean:+.2g} ± {gain.error:.1g}, {count_noun(gain.prompts, 'prompt')}" if gain else ""
        tiles.append(_before_after("Held-out judge score", figures.score_before, figures.score_after, detail))
    tiles += _eval_tiles(record, figures)
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
    steps = count_noun(figures.steps, "optimizer step")
    if figures.rounds:
        tiles.append(Tile("Done", count_noun(figures.rounds, "round"), steps))
    elif figures.steps:
        epoch = number(record.steps[-1].get("epoch"))
        tiles.append(
            Tile("Done", count_noun(figures.steps, "step"), f"{epoch:.3g} epochs" if epoch is not None else "")
        )
    if figures.wall_s is not None:
        tiles.append(Tile("Time", format_duration(figures.wall_s), "without start-up and evaluation"))
    return tuple(tiles)


def _eval_tiles(record: RunRecord, figures: Summary) -> list[Tile]:
    """Held-out pairs: accuracy and loss, first and last."""
    tiles = []
    evaluated_twice = len(record.evals) > 1
    if figures.accuracy_after is not None:
        tied = evaluated_twice and figures.accuracy_before is None
        detail = "of pairs ordered right" + (" (all tie at step 0)" if tied else "")
        before = "-" if tied else "" if figures.accuracy_before is None else f"{figures.accuracy_before:.0%}"
        tiles.append(Tile("Held-out accuracy", f"{figures.accuracy_after:.0%}", detail, before))
    losses = record.over_evals("eval/loss")[1]
    if len(losses):
        before = f"{losses[0]:.3f}" if evaluated_twice else ""
        tiles.append(Tile("Held-out loss", f"{losses[-1]:.3f}", "mean over pairs", before))
    return tiles


def _before_after(label: str, before: float | None, after: float | None, detail: str) -> Tile:
    if before is None or after is None:
        value = after if after is not None else before
        return Tile(
            label, "" if value is None else _short(value), detail or ("before training" if after is None else "")
        )
    first, last = indistinguishable(before, after)
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
        before, after = indistinguishable(one.before_score, one.after_score)
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
    scores = [number(score) for score in (group.get("scores") or [])[: len(candidates)]]
    scores += [None] * (len(candidates) - len(scores))
    figures = iter(indistinguishable(*(score for score in scores if score is not None)))
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
    values = [number(row.get(key)) for row in rows]
    return None not in values and (len(set(values)) > 1 or len(rows) == 1)


def _short(value: float) -> str:
    """A figure to three digits; thousands with a separator."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _column(values: Sequence[Any], swept: bool) -> list[str]:
    """Cells of a column; measured floats all with the same decimals, swept ones as they were given."""
    measured = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if swept or not measured:
        return [_cell(value) for value in values]
    texts = iter(indistinguishable(*measured, digits=4))
    return [next(texts) if isinstance(value, float) and math.isfinite(value) else _cell(value) for value in values]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if not math.isfinite(value) else re.sub(r"e-0+", "e-", f"{value:.4g}")  # noqa: RUF001
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return "–" if value is None else str(value)  # noqa: RUF001


def _shortened(text: str, characters: int = PAGE_CHARACTERS) -> str:
    return text if len(text) <= characters else f"{text[:characters]} … ({len(text) - characters:,} more characters)"

"""``report.html`` of a run: key figures, findings, plots and samples in one file that needs no network."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader

from dpo_ray.config.secrets import mask_secrets
from dpo_ray.report.figures import comparisons, evenly_spaced, key_figures, verdict
from dpo_ray.report.formatting import format_number, prompt_text, same_decimals, shorten
from dpo_ray.report.health import diagnose
from dpo_ray.report.plots import PALETTE, render, run_plots
from dpo_ray.report.record import RunRecord
from dpo_ray.storage import write_atomically
from dpo_ray.types import finite_float

MAX_COMPARISONS = 7  # held-out prompts on the page; odd, so that the median gain is among them
MAX_GROUPS = 4  # completion groups of the last round on the page


class Text(NamedTuple):
    """A completion with its judge score."""

    heading: str
    text: str
    score: str
    remark: str = ""


class Example(NamedTuple):
    """A prompt with completions side by side."""

    prompt: str
    texts: Sequence[Text]
    badge: str = ""
    tone: str = ""
    """up | down | empty; colors the badge."""


def write_report(record: RunRecord, *, running: bool = False) -> Path:
    """Write ``report.html`` of a run.

    Args:
        running: the run is still training; the page shows that and reloads every minute.
    """
    findings, online = diagnose(record), record.rounds or record.config.get("online")
    return write_page(
        record.path,
        kind=" + ".join(record.losses).upper() if record.labeled else "Online DPO" if online else "DPO",
        title=record.setting("run.name") or record.path.resolve().name,
        running=_progress(record) if running else "",
        verdict=verdict(record, findings),
        facts=_facts(record),
        tiles=key_figures(record),
        findings=findings,
        pictures=render(run_plots(record)),
        comparisons=_comparison_examples(record),
        groups=_group_examples(record),
        groups_round=record.groups_round,
        data=_yaml(record.data),
        config=_yaml(mask_secrets(record.config)),
    )


def write_page(folder: Path, **content: Any) -> Path:
    """Writes ``report.html`` with the variables of the template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shorten"] = shorten
    page = folder / "report.html"
    write_atomically(page, environment.get_template("report.html.j2").render(palette=PALETTE, **content))
    return page


def _progress(record: RunRecord) -> str:
    if not record.steps:
        return "Running: no step yet"
    return f"Running: step {record.steps[-1]['step']:,} at {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"


def _facts(record: RunRecord) -> list[str]:
    """Settings in which runs often differ."""
    labels = {
        "model.path": "",
        "loss.use": "loss ",
        "loss.beta": "beta ",
        "optim.lr": "lr ",
        "online.judge.use": "judge ",
        "online.max_lag": "max lag ",
        "run.seed": "seed ",
    }
    settings = {label: record.setting(key) for key, label in labels.items()}
    return [f"{label}{format_number(value)}" for label, value in settings.items() if value is not None]


def _comparison_examples(record: RunRecord) -> list[Example]:
    examples = []
    for row in comparisons(record, MAX_COMPARISONS):
        before, after = same_decimals(row.before_score, row.after_score)
        texts = [Text("before", row.before, before), Text("after", row.after, after)]
        tone = "up" if row.gain > 0 else "down" if row.gain < 0 else ""
        examples.append(Example(row.prompt, texts, f"{row.gain:+.2g}", tone))
    return examples


def _group_examples(record: RunRecord) -> list[Example]:
    """Groups evenly spaced over those with a pair, and the first dropped group."""
    paired = [group for group in record.groups if group.get("pairs")]
    dropped = [group for group in record.groups if not group.get("pairs") and group.get("candidates")][:1]
    paired = [paired[i] for i in evenly_spaced(len(paired), MAX_GROUPS - len(dropped))]
    return [_group_example(group) for group in paired + dropped]


def _group_example(group: Mapping[str, Any]) -> Example:
    """All candidates of a group, best first; those without a score last."""
    candidates = group.get("candidates") or ()
    scores = [finite_float(score) for score in group.get("scores") or (None,) * len(candidates)]
    score_texts = same_decimals(*scores)
    ranking = sorted(range(len(candidates)), key=lambda i: math.inf if (score := scores[i]) is None else -score)
    reason = group.get("dropped")
    return Example(
        prompt=prompt_text(group.get("prompt") or ()),
        texts=[_candidate_text(group, i, score_texts[i]) for i in ranking],
        badge=f"no pair: {str(reason).replace('_', ' ')}" if reason else "",
    )


def _candidate_text(group: Mapping[str, Any], i: int, score: str) -> Text:
    candidate = group["candidates"][i]
    role = next((side for pair in group.get("pairs") or () for side in ("chosen", "rejected") if pair[side] == i), "")
    tokens = len(candidate.get("token_ids") or ())
    remarks = ((f"{tokens} tokens", tokens > 0), ("truncated", not candidate.get("finished", True)))
    remark = ", ".join(remark for remark, applies in remarks if applies)
    return Text(role or f"candidate {i}", candidate.get("text", ""), score, remark)


def _yaml(node: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(node), sort_keys=False, allow_unicode=True) if node else ""

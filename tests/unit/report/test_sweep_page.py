"""The page of a sweep: its sentence, plots and table, on sweeps with known numbers."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from dpo_ray.report.plots import draw, legend
from dpo_ray.report.sweep_page import write_sweep_report
from dpo_ray.report.sweep_plots import key_importance, sweep_plots
from dpo_ray.report.sweep_record import SweepRecord, read_sweep
from dpo_ray.report.sweep_text import verdict_text
from dpo_ray.sweep.held_out import write_pair_results
from dpo_ray.sweep.trials import Constraint, Key, Objective, SweepDefinition, Trial, write_definition, write_trials
from jobs.picture import write_picture

ACCURACY = Objective("eval/rewards/accuracies")
LAST = 16


def sweep(folder: Path, rights: dict[tuple[float, float], int], *, pairs: int = 40) -> list[Trial]:
    """Trials by beta and lr that end with so many pairs right; their accuracy rises linearly from half."""
    trials = []
    for number, ((beta, lr), right) in enumerate(rights.items()):
        name = f"{number:05d}"
        margins = np.where(np.arange(pairs) < right, 1.0, -1.0)
        run = folder / "trials" / name
        write_pair_results(run, np.column_stack((0.7 - margins / 10, margins, margins, -margins)), step=LAST, pairs="p")
        lines = [
            {"step": step, "eval/rewards/accuracies": 0.0 if step == 0 else 0.5 + (right / pairs - 0.5) * step / LAST,
             "eval/loss": 0.69 - 0.01 * right * step / LAST, "eval/drift": lr * 1e5 * step / LAST}
            for step in (0, 8, LAST)
        ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        trials.append(Trial(name, {"loss.beta": beta, "optim.lr": lr}, "done", lines[-1], 60.0 + number))
    return trials


GRID = {
    (0.05, 1e-6): 22, (0.05, 1e-5): 35, (0.1, 1e-6): 23, (0.1, 1e-5): 36, (0.2, 1e-6): 21, (0.2, 1e-5): 34,
    (0.5, 1e-6): 20, (0.5, 1e-5): 24,
}  # fmt: skip


def with_stopped_and_failed(folder: Path) -> list[Trial]:
    trials = sweep(folder, GRID)
    trials[6] = replace(trials[6], status="stopped", metrics={**trials[6].metrics, "step": 8})
    stopped = folder / "trials" / trials[6].name / "metrics.jsonl"
    stopped.write_text("".join(stopped.read_text().splitlines(keepends=True)[:2]))
    failed = replace(trials[7], status="failed", metrics={}, error="<CUDA> out of memory")
    return [*trials[:7], failed]


def titles(record: SweepRecord) -> list[str]:
    return [plot.title for plot in sweep_plots(record)]


def test_the_page_has_the_sentence_the_plots_and_every_trial_best_first(tmp_path: Path) -> None:
    record = read_sweep(tmp_path, with_stopped_and_failed(tmp_path), ACCURACY)
    html = write_sweep_report(record).read_text(encoding="utf-8")
    assert "Pick loss.beta = 0.1, optim.lr = 1e-5: its eval/rewards/accuracies is 0.9, at a drift" in html
    assert "As good within the noise: loss.beta 0.05 to 0.2 at optim.lr = 1e-5." in html
    assert re.findall(r"<tr[^>]*><td>(\d+)</td><td>(\w+)</td>", html) == [
        ("00003", "done"), ("00001", "done"), ("00005", "done"), ("00002", "done"), ("00000", "done"),
        ("00004", "done"), ("00006", "stopped"), ("00007", "failed"),
    ]  # fmt: skip
    assert '<tr class="best"><td>00003</td>' in html
    assert "failed: &lt;CUDA&gt; out of memory" in html
    assert html.count("<svg") == len(sweep_plots(record))
    assert not re.search(r'(?:src|href)="(?:https?:)?//', html), "the page needs no network"
    assert "Running" not in html


def test_a_running_sweep_says_so_and_reloads(tmp_path: Path) -> None:
    html = write_sweep_report(read_sweep(tmp_path, sweep(tmp_path, GRID), ACCURACY), running=True).read_text()
    assert "Running: 8 of 8 trials ended" in html
    assert "So far: Pick loss.beta = 0.1" in html
    assert 'http-equiv="refresh"' in html


def test_curves_end_where_a_trial_was_stopped_and_leave_out_the_tie_at_step_0(tmp_path: Path) -> None:
    record = read_sweep(tmp_path, with_stopped_and_failed(tmp_path), ACCURACY)
    assert record.curves["00003"][0].tolist() == [8, 16]
    assert record.curves["00003"][1].tolist() == pytest.approx([0.7, 0.9])
    assert record.curves["00006"][0].tolist() == [8]
    curves = sweep_plots(record)[0]
    assert [swatch.label for swatch in curves.legend] == ["best trial", "other trials", "stopped early", "failed"]


def test_plots_follow_from_the_keys_that_vary(tmp_path: Path) -> None:
    over = "eval/rewards/accuracies over"
    record = read_sweep(tmp_path, sweep(tmp_path, GRID), ACCURACY)
    assert titles(record) == [
        "Learning curves", "loss.beta and optim.lr", "Result against distance", "Parallel coordinates",
        "Importance of each key", f"{over} optim.lr", f"{over} loss.beta",
    ]  # fmt: skip
    one = [replace(trial, values={**trial.values, "loss.beta": 0.1}) for trial in record.trials[:2]]
    assert titles(read_sweep(tmp_path, one, ACCURACY)) == [
        "Learning curves", "Result against distance", f"{over} optim.lr",
    ]  # fmt: skip
    words = [replace(t, values={"loss.use": name}) for t, name in zip(record.trials, ("ipo", "hinge"), strict=False)]
    assert titles(read_sweep(tmp_path, words, ACCURACY)) == ["Learning curves", "Result against distance"]
    waiting = [Trial("new", {"loss.beta": 0.1}, "waiting")]
    assert titles(read_sweep(tmp_path, waiting, ACCURACY)) == []
    assert verdict_text(read_sweep(tmp_path, waiting, ACCURACY).verdict) == (
        "No trial has a result to pick. Excluded: 1 trial has no evaluation."
    )
    shutil.rmtree(tmp_path / "trials")
    assert titles(read_sweep(tmp_path, sweep(tmp_path, {(0.1, 1e-5): 30}), ACCURACY))[0] == "Learning curves"


@pytest.mark.parametrize("objective", [ACCURACY, Objective("eval/loss", "min", Constraint("eval/drift", 0.5))])
def test_every_plot_can_be_drawn_for_few_trials_and_equal_results(tmp_path: Path, objective: Objective) -> None:
    for number, rights in enumerate(({(0.1, 1e-5): 30}, {(0.1, 1e-5): 30, (0.2, 1e-6): 30}, GRID)):
        folder = tmp_path / str(number)
        for plot in sweep_plots(read_sweep(folder, sweep(folder, rights), objective)):
            figure = Figure(layout="constrained")
            draw(plot, figure)
            figure.savefig(tmp_path / "plot.svg")
            assert figure.axes
            assert len({swatch.label for swatch in legend(plot)}) == len(legend(plot))


def test_the_frontier_is_drawn_through_the_trials_that_no_other_beats(tmp_path: Path) -> None:
    trials = sweep(tmp_path, {(0.1, 1e-6): 20, (0.2, 2e-6): 30, (0.3, 3e-6): 25, (0.4, 4e-6): 36})
    plot = next(p for p in sweep_plots(read_sweep(tmp_path, trials, ACCURACY)) if p.title == "Result against distance")
    figure = Figure()
    draw(plot, figure)
    line: Any = figure.axes[0].lines[0]
    assert line.get_xydata().tolist() == pytest.approx(np.array([[0.1, 0.5], [0.2, 0.75], [0.4, 0.9]]))


def test_importance_compares_trials_at_the_last_step_that_all_have_reached(tmp_path: Path) -> None:
    trials = sweep(tmp_path, GRID)
    shares = key_importance(read_sweep(tmp_path, trials, ACCURACY))
    assert shares is not None
    # Means of lr: 21.5 and 32.25 of 40; within: 5 and 91.  1 - (96 / (96 + 2 * 4 * 5.375 ** 2)) * 7 / 6
    between = 2 * 4 * 5.375**2
    within = sum((x - 21.5) ** 2 for x in (22, 23, 21, 20)) + sum((x - 32.25) ** 2 for x in (35, 36, 34, 24))
    assert shares["optim.lr"].share == pytest.approx(1 - within / (within + between) * 7 / 6)
    assert shares["optim.lr"].exceeds_chance
    assert not shares["loss.beta"].exceeds_chance
    fewer = read_sweep(tmp_path, with_stopped_and_failed(tmp_path), ACCURACY)
    assert key_importance(fewer) is None
    html = write_sweep_report(fewer).read_text()
    assert "importance of keys: needs 8 trials with different results" in html


def test_an_online_sweep_has_scores_over_rounds_and_the_kl_divergence(tmp_path: Path) -> None:
    trials = []
    for name, kl in (("a", 2.0), ("b", 4.0)):
        folder = tmp_path / "trials" / name / "evaluations"
        folder.mkdir(parents=True)
        for version in (0, 2):
            lines = [{"prompt_index": i, "prompt": [{"content": str(i)}], "score": kl * version} for i in range(4)]
            (folder / f"{version:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = {"round": 2, "heldout/score": 2 * kl, "kl": kl}
        trials.append(Trial(name, {"loss.beta": kl}, "done", metrics, 9.0))
    record = read_sweep(tmp_path, trials, Objective("heldout/score"))
    assert record.unit == "round"
    assert [column.tolist() for column in record.curves["b"]] == [[0, 2], [0, 8]]
    assert record.distance == "kl"
    assert "Result against distance" in titles(record)
    assert "at a KL to the reference of 4 nats per completion" in write_sweep_report(record).read_text()


def test_the_main_plots_of_a_sweep_are_one_picture(tmp_path: Path) -> None:
    trials = sweep(tmp_path, GRID)
    write_trials(tmp_path / "sweep.csv", trials)
    keys = {"loss.beta": Key("log", 0.01, 0.5), "optim.lr": Key("log", 1e-6, 1e-5)}
    none = {"use": "none", "args": {}}
    write_definition(tmp_path / "sweep.json", SweepDefinition(keys, ACCURACY, none, none, len(trials), 0))
    write_picture(str(tmp_path), tmp_path / "plots.png")
    assert 20_000 < (tmp_path / "plots.png").stat().st_size < 200_000

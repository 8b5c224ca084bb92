"""``jobs.sweep`` as a command: schedulers, failures, kills, and nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.sweep.trials import Trial, read_trials
from tests.ray.commands import ROOT, Commands, SharedCluster, clean_environment, lines, wait_until, write_yaml
from tests.ray.sweep_parts import DIED
from tests.ray.test_offline_job import short_run
from tests.ray.test_online_job import tiny_rounds

STEPS = 4


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """Trials of one worker and four steps on the tiny model, each evaluated after every step."""
    tree = short_run(tmp_path, tiny_model)
    tree["run"] |= {"name": "sweep", "eval_every": 1, "save_every": 2}
    return tree | {"cluster": {"train_workers": 1}, "sweep": {"samples": 4, "concurrent": 2}}


def events(run: Path) -> list[dict[str, Any]]:
    """The journal."""
    return lines(run / "journal.jsonl") if (run / "journal.jsonl").exists() else []


def reports(run: Path) -> int:
    return sum("metrics" in event for event in events(run))


def outcome(run: Path) -> list[Any]:
    """All that two sweeps must have in common: values, status, metrics and steps of every trial."""
    return [(trial.name, trial.values, trial.status, trial.metrics, trial.error) for trial in read_trials(csv(run))]


def csv(run: Path) -> Path:
    return run / "sweep.csv"


def by_name(run: Path) -> dict[str, Trial]:
    return {trial.name: trial for trial in read_trials(csv(run))}


def placement_groups(cluster: SharedCluster) -> list[Any]:
    """Placement groups of the cluster that hold resources, as the state API lists them."""
    script = (
        "import json, ray; ray.init(log_to_driver=False, configure_logging=False)\n"
        "from ray.util.state import list_placement_groups\n"
        "print(json.dumps([group.state for group in list_placement_groups() if group.state != 'REMOVED']))"
    )
    environment = clean_environment() | dict(cluster.environment)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout.splitlines()[-1])


def run_sweep(commands: Commands, config: dict[str, Any], folder: Path, space: str) -> tuple[Path, str]:
    """Run a sweep to its end; returns its directory and what it printed."""
    done = commands.run("sweep", write_yaml(folder / "run.yaml", config), space)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/sweep", done.stdout


def test_asha_stops_trials_at_rungs_and_leaves_nothing_behind(
    joining: Commands, shared_cluster: SharedCluster, config: dict[str, Any], tmp_path: Path
) -> None:
    config["sweep"] |= {
        "samples": 6,
        "scheduler": {"use": "asha", "args": {"reduction_factor": 2}},
        "search": {"use": "grid"},
    }
    run, _ = run_sweep(joining, config, tmp_path, "tests.ray.sweep_one_learns")
    trials = read_trials(csv(run))
    assert len(trials) == 6
    assert trials[0].status == "done", "it leads at each rung"
    assert "stopped" in {trial.status for trial in trials[1:3]}, "both are far worse, and one reports after the first"
    assert {trial.status for trial in trials} == {"done", "stopped"}
    for trial in trials:
        metrics = lines(run / "trials" / trial.name / "metrics.jsonl")
        evaluated = [line["step"] for line in metrics if "eval/loss" in line]
        last = trial.metrics["step"]
        assert evaluated == [step for step in (1, 2, 4) if step <= last], "at rungs and at the end only"
        assert max(line["step"] for line in metrics) == last, "no step after the decision"
    workers = {
        re.findall(r"pid (\d+)", (run / "trials" / trial.name / "logs/worker-0.log").read_text())[0] for trial in trials
    }
    assert len(workers) <= 2, "two slots, whose workers stay"
    computed = [log for log in run.glob("trials/*/logs/worker-0.log") if " 16 computed" in log.read_text()]
    assert len(computed) == 1, "one reference pass"
    assert not list(run.glob("trials/*/checkpoints")), "nothing continues from them"
    assert not joining.left_over()
    assert placement_groups(shared_cluster) == []


@pytest.mark.slow
def test_a_sweep_killed_twice_ends_like_an_undisturbed_one_and_takes_more_samples(
    joining: Commands, starting: Commands, config: dict[str, Any], tmp_path: Path
) -> None:
    config["sweep"] |= {"concurrent": 1, "scheduler": {"use": "asha", "args": {"reduction_factor": 2}}}
    file = write_yaml(tmp_path / "run.yaml", config)
    done = joining.run("sweep", file, "beta_lr", "run.name=whole")
    assert done.returncode == 0, done.stdout + done.stderr
    whole, run = tmp_path / "runs/whole", tmp_path / "runs/sweep"
    total = reports(whole)

    for part in (1 / 3, 2 / 3):
        starting.kill_when("sweep", file, "beta_lr", ready=lambda: reports(run) >= part * total)  # noqa: B023
        assert not starting.left_over()
    finished = {event["trial"] for event in events(run) if event["event"] == "finish"}
    untouched = {
        path: path.stat().st_mtime_ns for name in finished for path in run.glob(f"trials/{name}/metrics.jsonl")
    }
    done = joining.run("sweep", file, "beta_lr", "sweep.samples=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcome(run)[:4] == outcome(whole), "values, decisions and metrics"
    assert len(outcome(run)) == 5
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched, "no finished trial is repeated"
    assert not joining.left_over()


@pytest.mark.slow
def test_a_sweep_that_is_told_to_stop_leaves_no_process(
    starting: Commands, config: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "runs/sweep"
    ready = lambda: reports(run) >= 2  # noqa: E731
    file = write_yaml(tmp_path / "run.yaml", config)
    assert starting.kill_when("sweep", file, "beta_lr", ready=ready, signal_number=signal.SIGTERM) == 130
    assert not starting.left_over()


@pytest.mark.slow
def test_an_exploited_trial_starts_from_the_weights_of_its_donor(
    joining: Commands, config: dict[str, Any], tmp_path: Path
) -> None:
    config["sweep"] |= {
        "samples": 2,
        "scheduler": {"use": "pbt", "args": {"interval": 2, "quantile": 0.5, "resample": 0.0}},
    }
    run, _ = run_sweep(joining, config, tmp_path, "tests.ray.sweep_lr")
    (cloned,) = [event for event in events(run) if event["event"] == "cloned"]
    donor, _, step = cloned["origin"].partition("@")
    assert step == "2"
    trials = by_name(run)
    assert trials[cloned["trial"]].origin == cloned["origin"]
    clone, original = (
        {line["step"]: line for line in lines(run / "trials" / name / "metrics.jsonl") if "loss" in line}
        for name in (cloned["trial"], donor)
    )
    assert clone[2]["loss"] != original[2]["loss"], "before the exploit they differ"
    for metric in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "optim/grad_norm"):
        assert clone[3][metric] == original[3][metric], (
            "the same weights, on the same pairs, against the same reference"
        )
    assert clone[3]["optim/lr"] / original[3]["optim/lr"] in (pytest.approx(1.2), pytest.approx(1 / 1.2))
    assert clone[4]["loss"] != original[4]["loss"], "after a step with another learning rate"
    assert [trial.status for trial in trials.values()] == ["done", "done"]
    assert not joining.left_over()


@pytest.mark.slow
def test_trials_pause_at_a_rung_and_the_better_half_continues_where_it_was(
    joining: Commands, config: dict[str, Any], tmp_path: Path
) -> None:
    config["run"] |= {"save_every": None}
    config["sweep"] |= {"scheduler": {"use": "halving", "args": {"reduction_factor": 2}}, "search": {"use": "grid"}}
    run, _ = run_sweep(joining, config, tmp_path, "tests.ray.sweep_one_learns")
    trials = read_trials(csv(run))
    assert [trial.status for trial in trials] == ["done", "stopped", "stopped", "stopped"]
    assert sorted(trial.metrics["step"] for trial in trials[1:]) == [1, 1, 2]
    for trial in trials:
        metrics = lines(run / "trials" / trial.name / "metrics.jsonl")
        assert [line["step"] for line in metrics if "loss" in line] == list(range(1, trial.metrics["step"] + 1))
    log = (run / "trials/00000/logs/worker-0.log").read_text()
    assert re.findall(r"resuming after step (\d) of 4", log) == ["1", "2"], "from the checkpoints of its pauses"
    assert not list(run.glob("trials/*/checkpoints")), "nothing continues from them"
    assert not joining.left_over()


@pytest.mark.slow
def test_trials_of_hyperband_pause_at_a_rung_and_the_better_ones_continue_where_they_were(
    joining: Commands, config: dict[str, Any], tmp_path: Path
) -> None:
    config["sweep"] |= {
        "samples": 6,
        "scheduler": {"use": "hyperband", "args": {"reduction_factor": 2}},
        "search": {"use": "grid"},
    }
    run, _ = run_sweep(joining, config, tmp_path, "tests.ray.sweep_one_learns")
    trials = read_trials(csv(run))
    assert [trial.status for trial in trials[:3]] == ["done"] * 3, "the first bracket has no rung: 3 trials of 4 steps"
    halved = {trial.name: trial for trial in trials[3:]}  # the second bracket: 3 trials of 2 steps, then fewer of 4
    assert {trial.status for trial in halved.values()} == {"done", "stopped"}
    paused = {event["trial"] for event in events(run) if event["event"] == "pause"}
    assert paused
    assert paused <= set(halved), "they wait for the others of their bracket"
    for trial in trials:
        metrics = lines(run / "trials" / trial.name / "metrics.jsonl")
        steps = [line["step"] for line in metrics if "loss" in line]
        assert steps == list(range(1, (2 if trial.status == "stopped" else STEPS) + 1)), "each step once"
        if trial.name in paused and trial.status == "done":
            log = (run / "trials" / trial.name / "logs/worker-0.log").read_text()
            assert "resuming after step 2 of 4" in log, "from the checkpoint of its pause"
    assert not list(run.glob("trials/*/checkpoints")), "nothing continues from them"
    assert not joining.left_over()


@pytest.mark.slow
def test_trials_that_raise_diverge_or_die_are_listed_with_their_cause_and_the_best_is_among_the_rest(
    starting: Commands, config: dict[str, Any], tmp_path: Path
) -> None:
    config["cluster"] |= {"max_restarts": 1}
    config["optim"] |= {"max_skipped_steps": 1, "lr": 1e-2}
    config["run"] |= {"save_every": 1}
    config["sweep"] = {"concurrent": 2}
    starting.environment[DIED] = str(tmp_path / "died")
    run, output = run_sweep(starting, config, tmp_path, "tests.ray.sweep_parts")
    trials = {trial.values["loss.use"].rpartition(":")[2]: trial for trial in read_trials(csv(run))}
    assert {name: trial.status for name, trial in trials.items()} == {
        "sigmoid": "done", "raises": "failed", "gives_nan": "failed", "dies": "failed", "dies_once": "done",
    }  # fmt: skip
    causes = {name: trial.error or "" for name, trial in trials.items()}
    assert causes["raises"] == "RuntimeError: the loss's own words"
    assert causes["gives_nan"].startswith("NotFinite: step 2: loss or gradient is not finite")
    assert causes["dies"] == "its worker died: killed, or out of memory"
    assert (tmp_path / "died").exists()
    resumed = (run / "trials" / trials["dies_once"].name / "logs/worker-0.log").read_text()
    assert "resuming after step" in resumed, "from its checkpoint"
    same = ("eval/loss", "eval/rewards/margins", "step")
    assert [trials["dies_once"].metrics[key] for key in same] == [trials["sigmoid"].metrics[key] for key in same]
    for cause in filter(None, causes.values()):
        assert cause.splitlines()[0][:60] in output
    best = yaml.safe_load((run / "best.yaml").read_text())
    assert best["loss"]["use"] in ("sigmoid", trials["dies_once"].values["loss.use"])
    assert not starting.left_over()


def processes(log: Path) -> list[str]:
    """The ids of the processes that have written a log."""
    return re.findall(r"pid (\d+), started", log.read_text())


def run_of_two_online_trials(
    commands: Commands, model: Path, folder: Path, *, rounds: int, space: str = "tests.ray.sweep_online", **sweep: Any
) -> Path:
    """The directory of a finished sweep."""
    config = tiny_rounds(folder, model)
    config["run"] |= {"name": "sweep", "eval_every": 1}
    config["online"] |= {"rounds": rounds}
    config["cluster"] = {"train_workers": 1, "rollout_engines": 1}
    config["sweep"] = {"samples": 2, "concurrent": 1, **sweep}
    return run_sweep(commands, config, folder, space)[0]


@pytest.mark.slow
@pytest.mark.vllm
def test_a_sweep_of_online_runs_compares_their_held_out_scores(
    starting: Commands, tiny_model: Path, tmp_path: Path
) -> None:
    constraint = {"metric": "kl", "max": 1000.0}
    run = run_of_two_online_trials(starting, tiny_model, tmp_path, rounds=1, constraint=constraint)
    trials = read_trials(csv(run))
    assert [trial.status for trial in trials] == ["done", "done"]
    for trial in trials:
        assert trial.metrics["round"] == 1
        assert {"heldout/score", "kl"} <= trial.metrics.keys()
    rounds = [event["metrics"]["round"] for event in events(run) if "metrics" in event]
    assert rounds == [0, 1, 0, 1]
    begun = [event["at"] for event in events(run) if event["event"] == "begin"]
    evaluated = [(run / "trials" / trial.name / "evaluations/000000.jsonl").stat().st_mtime for trial in trials]
    assert evaluated[0] > begun[0]
    assert evaluated[1] < begun[1], "the second trial has the first one's evaluation of the untrained policy"
    assert len(processes(run / "slots/0/logs/engine-0.log")) == 1, "the engine has served both trials"
    assert processes(run / "trials/00000/logs/worker-0.log") == processes(run / "trials/00001/logs/worker-0.log")
    assert (run / "best.yaml").exists()
    assert not starting.left_over()


@pytest.mark.slow
@pytest.mark.vllm
def test_an_online_trial_that_needs_other_engines_gets_them_and_keeps_the_workers(
    starting: Commands, tiny_model: Path, tmp_path: Path
) -> None:
    run = run_of_two_online_trials(starting, tiny_model, tmp_path, rounds=1, space="tests.ray.sweep_lag")
    assert [trial.status for trial in read_trials(csv(run))] == ["done", "done"]
    assert len(processes(run / "slots/0/logs/engine-0.log")) == 2
    assert processes(run / "trials/00000/logs/worker-0.log") == processes(run / "trials/00001/logs/worker-0.log")
    assert not starting.left_over()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_online_trials_whose_worker_and_fleet_are_killed_end_with_each_prompt_once(
    joining: Commands, tiny_model: Path, tmp_path: Path
) -> None:
    config = tiny_rounds(tmp_path, tiny_model)
    config["run"] |= {"name": "sweep", "eval_every": 1, "save_every": 1}
    config["online"] |= {"rounds": 3, "sync_timeout_s": 60, "engine_timeout_s": 20}
    config["cluster"] = {"train_workers": 2, "rollout_engines": 1, "max_restarts": 3, "worker_timeout_s": 20}
    config["sweep"] = {"samples": 2, "concurrent": 1}
    run = tmp_path / "runs/sweep"

    def kill(log: Path) -> None:
        os.kill(int(processes(log)[-1]), signal.SIGKILL)

    def rounds_of(trial: str) -> int:
        return len(list(run.glob(f"trials/{trial}/rounds/*/manifest.json")))

    with joining.start("sweep", write_yaml(tmp_path / "run.yaml", config), "tests.ray.sweep_online") as process:
        wait_until(lambda: rounds_of("00000") >= 2, process)
        kill(run / "trials/00000/logs/worker-1.log")
        wait_until(lambda: rounds_of("00001") >= 1, process)
        kill(run / "slots/0/logs/fleet.log")
        assert process.wait(timeout=400) == 0
    trials = read_trials(csv(run))
    assert [(trial.status, trial.metrics["round"]) for trial in trials] == [("done", 3)] * 2
    for trial in trials:
        for index in range(3):
            rows = lines(run / f"trials/{trial.name}/rounds/{index:06d}/pairs.jsonl")
            assert len({row["prompt_index"] for row in rows}) == len(rows) == config["online"]["prompts_per_round"]
            assert not [row["error"] for row in rows if row["error"]]
    assert len(processes(run / "trials/00000/logs/worker-1.log")) == 2, "restarted once"
    assert not joining.left_over()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_online_trials_of_a_population_pause_after_a_round_and_are_cloned(
    starting: Commands, tiny_model: Path, tmp_path: Path
) -> None:
    scheduler = {"use": "pbt", "args": {"quantile": 0.5, "resample": 0.0}}
    run = run_of_two_online_trials(starting, tiny_model, tmp_path, rounds=2, scheduler=scheduler)
    trials = {trial.name: trial for trial in read_trials(csv(run))}
    paused = {event["trial"] for event in events(run) if event["event"] == "pause"}
    assert paused == set(trials), "both after the first round"
    assert [(trial.status, trial.metrics["round"]) for trial in trials.values()] == [("done", 2)] * 2
    for event in events(run):
        if event["event"] == "cloned":
            donor, _, version = event["origin"].partition("@")
            assert version == "1"
            assert trials[event["trial"]].values["optim.lr"] != trials[donor].values["optim.lr"]
    assert not starting.left_over()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_submitted_sweep_that_is_stopped_and_submitted_again_continues(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """The head started by ``ray start``, the sweep submitted by ``ray job submit``, as on a cluster."""
    ray = str(Path(sys.executable).parent / "ray")
    environment = clean_environment() | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    address = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8267"}

    def call(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ray, *arguments], env=environment | address, capture_output=True, text=True, timeout=timeout, cwd=tmp_path
        )

    def start_head(folder: str) -> subprocess.Popen[bytes]:
        # In a folder of its own: other clusters of this machine must not be taken for it, nor it for one of them.
        options = ["--port=6399", "--dashboard-port=8267", "--num-cpus=4", f"--temp-dir={folder}"]
        log = (tmp_path / "head.log").open("wb")
        return subprocess.Popen(
            [ray, "start", "--head", "--block", *options], env=environment, stdout=log, stderr=log, process_group=0
        )

    config["sweep"] |= {"samples": 6, "concurrent": 1}
    file, run = write_yaml(tmp_path / "run.yaml", config), tmp_path / "runs/sweep"
    command = [sys.executable, "-m", "jobs.sweep", str(file), "beta_lr"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, start_head(folder) as head:
        try:
            submit = ("job", "submit", "--no-wait", "--submission-id=first", "--", *command)
            wait_until(lambda: call(*submit).returncode == 0, head)  # the head takes a while until it accepts jobs
            wait_until(lambda: reports(run) >= 6, head)
            assert call("job", "stop", "first").returncode == 0
            before = events(run)
            again = call("job", "submit", "--submission-id=second", "--", *command)
            assert again.returncode == 0, again.stdout + again.stderr
        finally:
            head.terminate()
            head.wait(timeout=60)
    assert [trial.status for trial in read_trials(csv(run))] == ["done"] * 6
    assert events(run)[: len(before)] == before
    started = [event["trial"] for event in events(run) if event["event"] == "start"]
    assert len(started) <= 7, "only the trial that was running starts again"
    assert os.path.exists(run / "best.yaml")

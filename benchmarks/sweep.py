"""A sweep of T trials against T separate runs of ``jobs.offline`` that each compute their own reference.

    python -m benchmarks.sweep --trials 8 --out full.json
    python -m benchmarks.sweep --trials 8 --separate full.json sweep.scheduler.use=asha run.eval_every=1
    python -m benchmarks.sweep --tiny                  a dry run on a tiny random model

The separate runs have the values of the sweep's trials, in the same order, one after another; each starts its own Ray
cluster and has a cache of its own. Both sides include start-up, tokenization, the reference pass, training and
evaluation. Arguments of the form key=value apply to the sweep only.

The idle share is the time in which the cores of this machine do nothing for the command: 1 minus the CPU time of all of
its processes, divided by cores times wall time.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from benchmarks.pairs import generate_pairs
from dpo_ray.sweep.trials import Trial, read_trials

ROOT = Path(__file__).parents[1]
POLL_S, PROGRESS_S, SHUTDOWN_S = 1.0, 30.0, 60.0
COMPUTED = re.compile(r"(\d+) pairs cached, (\d+) computed")
"""The note of a worker on the reference log-probabilities of a set of pairs."""


class Cost(NamedTuple):
    """The cost of one or more commands."""

    wall_s: float
    cpu_s: float
    passes: int
    """Runs or trials that computed reference log-probabilities, of the pairs to train on and of those held out."""
    pairs: int
    """Pairs for which they were computed."""

    def idle(self, cores: int) -> float:
        """Share of the cores' time that no process of the commands used."""
        return max(0.0, 1 - self.cpu_s / (self.wall_s * cores))


def main() -> None:
    """Run both sides and print a Markdown table."""
    arguments = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the command in progress, too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(arguments, folder)
        sweep, trials = run_sweep(arguments, config, folder)
        separate = (
            read_separate(arguments.separate, len(trials))
            if arguments.separate
            else run_separately(arguments, config, trials, folder)
        )
    cores = len(os.sched_getaffinity(0))
    ended = ", ".join(f"{count} {status}" for status, count in statuses(trials).items())
    print(f"\n{len(trials)} trials ({ended}), {cores} cores, model {arguments.model}\n")
    print(table(sweep, separate, len(trials), cores))
    if arguments.out:
        rows = [{"name": t.name, "status": t.status, "values": dict(t.values), "seconds": t.seconds} for t in trials]
        result = {"sweep": sweep._asdict(), "separate": separate._asdict(), "trials": rows, "cores": cores}
        arguments.out.write_text(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="a model directory")
    parser.add_argument("--pairs", type=Path, help="a JSONL file of pairs, instead of generated ones")
    parser.add_argument("--train", type=int, default=24, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=16, help="pairs to compare trials on")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--space", default="beta_lr", help="search space")
    parser.add_argument("--trials", type=int, default=8, help="trials of the sweep")
    parser.add_argument("--concurrent", type=int, default=1, help="trials of the sweep at a time; they share the cores")
    parser.add_argument("--timeout-s", type=float, default=7200.0, help="longest time of one command")
    parser.add_argument("--tiny", action="store_true", help="a dry run: a tiny random model, two trials")
    parser.add_argument("--separate", type=Path, help="an earlier --out file, whose separate runs are compared with")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the sweep")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.trials, arguments.train, arguments.held_out = 2, 16, 8
    return arguments


def write_config(arguments: argparse.Namespace, folder: Path) -> Path:
    """Pairs, model and configuration of both sides."""
    if arguments.tiny:
        from tests.conftest import save_tiny_model

        arguments.model = str(save_tiny_model(folder / "model"))
    texts = read_pairs(arguments)
    files = {"train": texts[: arguments.train], "eval": texts[arguments.train :]}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(lines))
    cores = len(os.sched_getaffinity(0))
    config = {
        "run": {"dir": str(folder / "runs"), "name": "sweep", "export": False, "save_every": None, "eval_every": None},
        "model": {"path": str(Path(arguments.model).absolute())},
        "data": {name: str(folder / f"{name}.jsonl") for name in files},
        "reference": {"cache_dir": str(folder / "cache")},
        "optim": {"lr": 1e-5, "pairs_per_step": arguments.pairs_per_step},
        "cluster": {"train_workers": 1, "cpus_per_worker": max(1, cores // arguments.concurrent)},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def read_pairs(arguments: argparse.Namespace) -> list[str]:
    """As many lines of a file, or generated ones, as both sets have pairs."""
    count = arguments.train + arguments.held_out
    if arguments.pairs is None:
        return [json.dumps(pair) + "\n" for pair in generate_pairs("answers", count)]
    lines = [line + "\n" for line in arguments.pairs.read_text(encoding="utf-8").splitlines() if line][:count]
    if len(lines) < count:
        raise SystemExit(f"{arguments.pairs} has {len(lines)} pairs; --train and --held-out need {count}")
    return lines


def run_sweep(arguments: argparse.Namespace, config: Path, folder: Path) -> tuple[Cost, list[Trial]]:
    """The sweep's cost, and its trials."""
    run = folder / "runs" / "sweep"

    def progress() -> str:
        with contextlib.suppress(OSError):
            counts = statuses(read_trials(run / "sweep.csv"))
            return ", ".join(f"{count} {status}" for status, count in counts.items()) or "starting"
        return "starting"

    settings = [f"sweep.samples={arguments.trials}", f"sweep.concurrent={arguments.concurrent}", *arguments.overrides]
    wall_s, cpu_s = measured(["sweep", str(config), arguments.space, *settings], "sweep", progress, arguments.timeout_s)
    trials = read_trials(run / "sweep.csv")
    if len(trials) != arguments.trials:
        raise SystemExit(f"the sweep has {len(trials)} trials instead of {arguments.trials}")
    return Cost(wall_s, cpu_s, *computed(run)), trials


def run_separately(arguments: argparse.Namespace, config: Path, trials: Sequence[Trial], folder: Path) -> Cost:
    """The cost of a run per trial, each with its own cache and all cores."""
    costs = []
    cores = len(os.sched_getaffinity(0))
    for number, trial in enumerate(trials, 1):
        name = f"separate-{trial.name}"
        settings = {
            **trial.values,
            "run.name": name,
            "reference.cache_dir": str(folder / name),
            "cluster.cpus_per_worker": cores,
        }
        command = ["offline", str(config), *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
        label = f"separate run {number} of {len(trials)}"
        wall_s, cpu_s = measured(command, label, lambda: "running", arguments.timeout_s)
        costs.append(Cost(wall_s, cpu_s, *computed(folder / "runs" / name)))
    return Cost(*map(sum, zip(*costs, strict=True)))  # type: ignore[arg-type]


def read_separate(file: Path, trials: int) -> Cost:
    """The cost of the separate runs of an earlier comparison."""
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if len(earlier["trials"]) != trials:
        raise SystemExit(f"{file} has {len(earlier['trials'])} separate runs, and the sweep {trials} trials")
    return Cost(**earlier["separate"])


def computed(run: Path) -> tuple[int, int]:
    """Reference passes of a run or of all trials of a sweep, and the pairs that they computed."""
    logs = [log.read_text(errors="replace") for log in run.rglob("worker-0.log")]
    counts = [sum(int(match[2]) for match in COMPUTED.finditer(log)) for log in logs]
    return sum(count > 0 for count in counts), sum(counts)


def measured(command: Sequence[str], label: str, progress: Callable[[], str], timeout_s: float) -> tuple[float, float]:
    """Wall time and CPU time, in seconds, of ``python -m jobs.COMMAND`` with all processes that it starts."""
    started, printed, cpu = time.monotonic(), 0.0, {}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"jobs.{command[0]}", *command[1:]],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                cpu |= cpu_times(process.pid)
                elapsed = time.monotonic() - started
                if elapsed > timeout_s:
                    raise SystemExit(f"{label} did not end in {timeout_s:g} s (--timeout-s)")
                if elapsed - printed > PROGRESS_S:
                    printed = elapsed
                    print(f"{label}: {elapsed:.0f} s, {progress()}", flush=True)
                time.sleep(POLL_S)
        finally:
            shut_down(process)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{label} failed with exit code {process.returncode}:\n{output.read()[-4000:]}")
    wall_s = time.monotonic() - started
    print(f"{label}: {wall_s:.1f} s", flush=True)
    return wall_s, sum(cpu.values())


def cpu_times(pid: int) -> dict[tuple[int, float], float]:
    """CPU seconds so far of each process of a tree."""
    seconds = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds[process.pid, process.create_time()] = times.user + times.system
    return seconds


def shut_down(process: subprocess.Popen[Any]) -> None:
    """Ends a command that still runs: by a request, then with all of its processes."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SHUTDOWN_S)
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.kill()
    process.wait()


def statuses(trials: Sequence[Trial]) -> dict[str, int]:
    """Number of trials by status."""
    names = [trial.status for trial in trials]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def table(sweep: Cost, separate: Cost, trials: int, cores: int) -> str:
    """The result as Markdown."""
    lines = ["| | total, s | per trial, s | reference passes | pairs scored | idle |", "|---|--:|--:|--:|--:|--:|"]
    for name, cost in ((f"one sweep of {trials} trials", sweep), (f"{trials} separate runs", separate)):
        lines.append(
            f"| {name} | {cost.wall_s:.0f} | {cost.wall_s / trials:.1f} | {cost.passes} | {cost.pairs} | "
            f"{cost.idle(cores):.0%} |"
        )
    ratio = sweep.wall_s / separate.wall_s
    return "\n".join([*lines, f"| ratio | {ratio:.2f} | | | | |"])


if __name__ == "__main__":
    main()

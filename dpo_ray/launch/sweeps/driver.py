"""The driver of a sweep: answers the slots as the conductor decides, and keeps sweep.csv up to date."""

import contextlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml
from rich.console import Console

from dpo_ray.config import Config, override
from dpo_ray.config.sweeps import START_TOGETHER
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.command import TrainingFailed
from dpo_ray.launch.run_dir import make_run_dir
from dpo_ray.launch.status import start_status_actor
from dpo_ray.launch.sweeps.mailbox import NO_MORE, Channel, Message, Task, start_mailbox
from dpo_ray.launch.sweeps.schedulers import build_scheduler, continuing_share, rungs, validate_length
from dpo_ray.launch.sweeps.search import build_searcher
from dpo_ray.launch.sweeps.slots import Slot, run_slot
from dpo_ray.launch.sweeps.space import Space
from dpo_ray.launch.sweeps.trial_rollouts import TrialRollouts
from dpo_ray.report.live.follower import follow_run
from dpo_ray.report.live.trial_table import Scope, live_trials
from dpo_ray.report.sweep_summary import live_sweep_report
from dpo_ray.rollout.evaluation import EvaluationStore
from dpo_ray.storage import atomic_folder, error_summary
from dpo_ray.sweep.conductor import Conductor, Progress
from dpo_ray.sweep.journal import Journal
from dpo_ray.sweep.trials import ENDED, SweepDefinition, Trial, as_read, read_definition, write_definition, write_trials
from dpo_ray.train.checkpoint_files import finished_checkpoints
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

POLL_S = 0.5
MAILBOX_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 120.0
"""Longest wait at the end for the workers of all slots to shut down."""
FREE_KEYS = (
    "run.trackers", "run.tracker_args", "run.dir", "run.keep_checkpoints", "run.save_every", "cluster", "sweep",
)  # fmt: skip
"""Keys in which a sweep may be continued with another configuration; ``sweep`` is compared by its definition."""
ABSENT = "no such key"


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides the course of a sweep."""

    config: Config
    space: Space
    scheduler: Any
    search: Any
    """Scheduler and searcher that the space brings; None for those of the configuration."""
    definition: SweepDefinition
    pairs: int
    """Training pairs of the configuration; 0 online."""
    concurrent: int
    """Slots."""

    def length(self, config: Config) -> int:
        """Length of a trial, in steps or rounds."""
        if config.online is not None:
            return config.online.rounds
        steps = math.ceil(self.pairs / config.optim.pairs_per_step)
        return config.run.steps or max(1, round(config.run.epochs * steps))


def open_sweep_dir(config: Config, definition: SweepDefinition) -> tuple[Path, SweepDefinition]:
    """Creates the run directory, or opens that of a sweep to continue.

    Returns:
        the directory, and the definition with at least the trials and with the data that the sweep had.

    Raises:
        ValueError: it belongs to another sweep, or to a run; the message names the difference.
    """
    run_dir = config.run.path
    file, journal = run_dir / "sweep.json", run_dir / "journal.jsonl"
    if journal.exists() and file.exists():
        if difference := _difference(read_definition(file), as_read(definition), run_dir, config):
            raise ValueError(
                f"{run_dir} holds a sweep with {difference}; set another run.name, or remove the directory"
            )
        earlier = read_definition(file)
        if definition.samples > earlier.samples and definition.scheduler["use"] in START_TOGETHER:
            raise ValueError(
                f"sweep.samples is {definition.samples}, and {run_dir} was started with {earlier.samples}: "
                f"sweep.scheduler.use: {definition.scheduler['use']} compares trials that start together; set another "
                "run.name"
            )
        definition = replace(definition, samples=max(definition.samples, earlier.samples), data=earlier.data)
    make_run_dir(config)
    write_definition(file, definition)
    return run_dir, definition


def _difference(earlier: SweepDefinition, current: SweepDefinition, run_dir: Path, config: Config) -> str | None:
    """The first part in which a sweep differs from the one that it would continue, as a clause."""
    if earlier.keys != current.keys:
        for name in {**earlier.keys, **current.keys}:
            before, after = earlier.keys.get(name), current.keys.get(name)
            if before != after:
                return f"another space, {name}: {before or 'no such key'}; this one has {after or 'no such key'}"
    for part in ("objective", "scheduler", "search", "seed", "time"):
        before, after = getattr(earlier, part), getattr(current, part)
        if before != after:
            return f"another {part}: {before}, this one has {after}"
    saved = Config.model_validate(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")))
    before, after = (dict(_leaves(tree.model_dump(mode="json"))) for tree in (saved, config))
    for key in {**after, **before}:
        if before.get(key, ABSENT) != after.get(key, ABSENT) and not _is_free(key):
            return f"{key}: {before.get(key, ABSENT)!r}, this one has {after.get(key, ABSENT)!r}"
    return None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _untrained(config: Config) -> tuple[Any, ...]:
    """All that decides how the untrained policy is evaluated online."""
    return config.model, config.data, config.online, config.reference_kind, config.run.seed


class Driver:
    """Runs a sweep to its end in the driver's process."""

    def __init__(self, plan: Plan, cluster: Cluster, run_dir: Path, console: Console) -> None:
        self.plan, self.cluster, self.run_dir, self.console = plan, cluster, run_dir, console
        definition = plan.definition
        searcher = build_searcher(
            plan.config.sweep.search, plan.space, plan.search, definition.objective, definition.seed
        )
        time, length = definition.time, plan.length(plan.config)
        validate_length(plan.config, plan.scheduler, time, length)
        self.scheduler = build_scheduler(
            plan.config, plan.space, definition.keys, plan.scheduler, definition.objective, time=time, length=length
        )
        self.conductor = Conductor(
            Journal(run_dir / "journal.jsonl"),
            searcher,
            self.scheduler,
            definition.objective,
            samples=definition.samples,
            time=definition.time,
            max_deaths=plan.config.cluster.max_restarts,
            clone=self._clone,
            saved=self._saved,
        )
        self.mailbox: Any = None
        self.idle: dict[int, Message] = {}
        """Slots that wait for a trial."""
        self.on_slot: dict[int, str] = {}
        """Trial of each slot that has one."""
        self.followers: dict[str, contextlib.ExitStack] = {}
        self.trials: list[Trial] = []
        """The latest state of the trials, for the display."""
        self.slots: list[Slot] = []
        self.rollouts: dict[int, TrialRollouts] = {}
        """Engines, judges and collector by slot; online only."""
        self.held_out = 0
        """Held-out prompts; online only."""
        self.serving: set[int] = set()
        """Slots that may get another trial."""
        self.cleaned: set[str] = set()
        """Ended trials whose checkpoints are deleted."""

    def run(self, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[Trial]:
        """Runs all trials; returns them.

        Raises:
            TrainingFailed: no slot could start.
        """
        self.held_out = len(held_out)
        if self.conductor.resume():
            ended = sum(trial.status in ENDED for trial in self.conductor.trials)
            self.console.print(f"continuing: {ended} trials have ended, {len(self.conductor.trials) - ended} are open")
        self._write()
        self._clean()
        if not self.conductor.finished:
            definition = self.plan.definition
            title = f"{self.plan.config.run.name}: sweep of {definition.samples} trials"
            size = (definition.samples, self.plan.concurrent, self.plan.length(self.plan.config))
            share = continuing_share(self.plan.config)
            scope = Scope(definition.objective, *size, unit=definition.time, continues=share)
            with (
                live_sweep_report(lambda: self.trials, self.run_dir, definition.objective),
                live_trials(
                    lambda: self.trials, scope, title=title, console=self.console, folder=self.run_dir / "trials"
                ),
            ):
                self._run_slots(prompts, held_out)
        return self.conductor.trials

    def _run_slots(self, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
        self.mailbox = start_mailbox()
        config, status_actor = self.plan.config, start_status_actor()
        # All failures that the trials of the sweep may have; also bounds those that no trial is blamed for.
        failures = self.plan.definition.samples * (config.cluster.max_restarts + 1)
        for number in range(min(self.plan.concurrent, self.conductor.open)):
            channel = Channel(self.mailbox, number)
            self.slots.append(Slot(number, partial(run_slot, config, self.cluster, channel, self.run_dir, failures)))
            self.serving.add(number)
            if config.online is not None:
                logs = self.run_dir / "slots" / str(number)
                self.rollouts[number] = TrialRollouts(self.cluster, logs, prompts, held_out, status_actor)
        try:
            while not self.conductor.finished:
                self._take_messages()
                self._check_slots()
                self._give_trials()
                self._release_slots()
            self._close()
        finally:
            for trial in list(self.followers):
                self._unfollow(trial)
            for rollouts in self.rollouts.values():
                rollouts.close()
            ray.kill(self.mailbox)
            ray.kill(status_actor)

    def _take_messages(self) -> None:
        messages = ray.get(self.mailbox.receive.remote(POLL_S), timeout=MAILBOX_TIMEOUT_S)
        for message in map(Message._make, messages):
            self._take(message)
        if messages:
            self._write()
            self._clean()

    def _take(self, message: Message) -> None:
        trial, answer = message.trial, "continue"
        if message.kind == "idle":
            # A slot that asks again while it has a trial has lost the workers that ran it.
            if lost := self.on_slot.get(message.slot):
                self._leave(message.slot)
                self.conductor.failed(lost, "its worker died: killed, or out of memory", retryable=True)
            self.idle[message.slot] = message
            return
        if trial is not None and self.on_slot.get(message.slot) == trial:
            if message.kind == "begun":
                self.conductor.begin(trial)
            elif message.kind == "report":
                metrics, final = message.body
                answer = self.conductor.report(trial, metrics, final=final)
            elif message.kind == "failed":
                error, retryable = message.body
                self._leave(message.slot)
                self.conductor.failed(trial, error, retryable=retryable)
            else:
                self._leave(message.slot)
                (self.conductor.paused if message.kind == "paused" else self.conductor.finished_trial)(trial)
        self._answer(message, answer)

    def _leave(self, slot: int) -> None:
        self._unfollow(self.on_slot.pop(slot))
        if slot in self.rollouts:
            self.rollouts[slot].end_trial()

    def _answer(self, message: Message, value: Any) -> None:
        ray.get(self.mailbox.answer.remote(message, value), timeout=MAILBOX_TIMEOUT_S)

    def _give_trials(self) -> None:
        """Gives trials to idle slots, as long as there are any."""
        for slot in sorted(self.idle):
            while (progress := self.conductor.next()) is not None:
                try:
                    config = self._trial_config(progress)
                    make_run_dir(config)
                    self._share_evaluation(config)
                    rollouts = self.rollouts[slot].begin(config) if slot in self.rollouts else None
                except ValueError as error:
                    self.conductor.failed(progress.name, error_summary(error))
                    self._write()
                    continue
                self._follow(progress.name, config)
                self.on_slot[slot] = progress.name
                self._answer(self.idle.pop(slot), Task(progress.name, config.model_dump(mode="json"), rollouts))
                self._write()
                break

    def _release_slots(self) -> None:
        """Ends idle slots that no trial is left for, which frees their workers."""
        for slot in sorted(self.idle, reverse=True):
            if len(self.serving) > self.conductor.open:
                self._answer(self.idle.pop(slot), NO_MORE)
                self.serving.remove(slot)
                if slot in self.rollouts:
                    self.rollouts[slot].close()

    def _trial_config(self, progress: Progress) -> Config:
        """The configuration of a trial: evaluated where the scheduler decides, saved where it pauses."""
        config = override(self.plan.config, progress.values)
        of_trial: dict[str, Any] = {
            "run.dir": str(self.run_dir / "trials"),
            "run.name": progress.name,
            "run.export": False,
            "run.save_last": False,
            "run.keep_checkpoints": 1,
            "run.best_metric": None,
            "run.eval_at": list(rungs(config, self.plan.length(config))),
            "sweep": {},
        }
        if config.online is not None:
            of_trial["run.eval_at"] = [0, *of_trial["run.eval_at"]]
        if self.scheduler.pauses:
            of_trial["run.save_last"] = True  # also where it pauses
            if config.online is not None and not config.cluster.colocate:
                # Training then waits for the evaluation of a round, and pauses right after it.
                of_trial["run.best_metric"] = self.plan.definition.objective.metric
        return override(config, of_trial)

    def _share_evaluation(self, config: Config) -> None:
        """Gives an online trial the evaluation of the untrained policy by an earlier trial, if it would repeat that."""
        evaluations = EvaluationStore(config.run.path)
        if config.online is None or evaluations.recorded(0):
            return
        for progress in self.conductor.progress.values():
            earlier = EvaluationStore(self.run_dir / "trials" / progress.name)
            of_earlier = override(self.plan.config, progress.values)
            if earlier.complete(0, self.held_out) and _untrained(of_earlier) == _untrained(config):
                evaluations.copy(earlier, 0)
                return

    def _check_slots(self) -> None:
        """Raises if no slot is left; the trials of those that ended early go to others."""
        for slot in self.slots:
            if slot.alive:
                continue
            self.serving.discard(slot.number)
            self.idle.pop(slot.number, None)
            if slot.number in self.on_slot:
                trial = self.on_slot[slot.number]
                self._leave(slot.number)
                self.conductor.failed(trial, f"its slot ended: {slot.error}", retryable=True)
            if slot.number in self.rollouts:
                self.rollouts[slot.number].close()
        if not self.serving and not self.conductor.finished:
            error = next((slot.error for slot in self.slots if slot.error is not None), None)
            raise TrainingFailed(f"no worker of the sweep is left: {error}")

    def _close(self) -> None:
        """Ends the slots, each as soon as it asks."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while any(slot.alive for slot in self.slots) and time.monotonic() < deadline:
            self._take_messages()
            self._release_slots()
        self._clean()

    def _clone(self, trial: str, donor: str) -> int:
        """Copies the newest checkpoint of ``donor``; the optimizer's state comes with it. Returns its step."""
        trials = self.run_dir / "trials"
        newest = finished_checkpoints(trials / donor / "checkpoints")[-1]
        folder = trials / trial / "checkpoints"
        # It has values of the donor, with which the trial's own work could not be continued.
        (trials / trial / "config.yaml").unlink(missing_ok=True)
        with atomic_folder(folder, replace=True) as draft:
            shutil.copytree(newest, draft / newest.name)
        return int(newest.name)

    def _saved(self, trial: str) -> int:
        finished = finished_checkpoints(self.run_dir / "trials" / trial / "checkpoints")
        return int(finished[-1].name) if finished else -1

    def _clean(self) -> None:
        """Deletes the checkpoints of trials that have ended and left their slots: nothing continues from them."""
        on_slots = set(self.on_slot.values())
        for name, progress in self.conductor.progress.items():
            if progress.phase in ENDED and name not in self.cleaned | on_slots:
                checkpoints = self.run_dir / "trials" / name / "checkpoints"
                shutil.rmtree(checkpoints, ignore_errors=True)
                if not checkpoints.exists():
                    self.cleaned.add(name)

    def _follow(self, trial: str, config: Config) -> None:
        """Feeds the trackers of a trial."""
        if config.run.trackers:
            self.followers[trial] = contextlib.ExitStack()
            self.followers[trial].enter_context(follow_run(config, logger.warning, group=self.plan.config.run.name))

    def _unfollow(self, trial: str) -> None:
        if (stack := self.followers.pop(trial, None)) is not None:
            threading.Thread(target=stack.close, name=f"trackers-{trial}").start()

    def _write(self) -> None:
        self.trials = self.conductor.trials
        write_trials(self.run_dir / "sweep.csv", self.trials)

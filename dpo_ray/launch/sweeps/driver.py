"""The driver of a sweep: answers the slots as the conductor decides, and keeps sweep.csv up to date."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from dpo_ray.config import Config, override
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.command import TrainingFailed
from dpo_ray.launch.rollouts.actors import write_prompts
from dpo_ray.launch.status import start_status_actor
from dpo_ray.launch.sweeps.mailbox import NO_MORE, Channel, Message, Task, start_mailbox
from dpo_ray.launch.sweeps.schedulers import build_scheduler, continuing_share, validate_length
from dpo_ray.launch.sweeps.search import build_searcher
from dpo_ray.launch.sweeps.slots import Slot, run_slot
from dpo_ray.launch.sweeps.space import previews
from dpo_ray.launch.sweeps.trial_dirs import Plan, TrialDirs
from dpo_ray.launch.sweeps.trial_rollouts import TrialRollouts, engine_settings
from dpo_ray.report.live.follower import follow_run
from dpo_ray.report.live.trial_table import Scope, live_trials
from dpo_ray.report.sweep_summary import live_sweep_report
from dpo_ray.storage import error_summary
from dpo_ray.sweep.conductor import Conductor
from dpo_ray.sweep.journal import Journal
from dpo_ray.sweep.trials import ENDED, Trial, write_trials
from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

POLL_S = 0.5
MAILBOX_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 120.0
"""Longest wait at the end for the workers of all slots to shut down."""


class Driver:
    """Runs a sweep to its end in the driver's process.

    Args:
        prompts, held_out: of online trials.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: Cluster,
        run_dir: Path,
        console: Console,
        *,
        prompts: Sequence[Prompt] = (),
        held_out: Sequence[Prompt] = (),
    ) -> None:
        self.plan, self.cluster, self.run_dir, self.console = plan, cluster, run_dir, console
        self.prompts, self.held_out = prompts, held_out
        definition = plan.definition
        searcher = build_searcher(
            plan.config.sweep.search, plan.space, plan.search, definition.objective, definition.seed
        )
        time, length = definition.time, plan.length(plan.config)
        validate_length(plan.config, plan.scheduler, time, length)
        self.scheduler = build_scheduler(
            plan.config, plan.space, definition.keys, plan.scheduler, definition.objective, time=time, length=length
        )
        self.dirs = TrialDirs(plan, run_dir, pauses=self.scheduler.pauses, held_out=len(held_out))
        self.conductor = Conductor(
            Journal(run_dir / "journal.jsonl"),
            searcher,
            self.scheduler,
            definition.objective,
            samples=definition.samples,
            time=definition.time,
            max_deaths=plan.config.cluster.max_restarts,
            clone=self.dirs.clone,
            saved=self.dirs.saved,
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
        self.closing: list[threading.Thread] = []
        """Shut down the engines of slots that have ended."""
        self.serving: set[int] = set()
        """Slots that may get another trial."""

    def run(self) -> list[Trial]:
        """Runs all trials; returns them.

        Raises:
            TrainingFailed: no slot could start.
        """
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
                self._run_slots()
        return self.conductor.trials

    def _run_slots(self) -> None:
        self.mailbox = start_mailbox()
        config = self.plan.config
        # All failures that the trials of the sweep may have; also bounds those that no trial is blamed for.
        failures = self.plan.definition.samples * (config.cluster.max_restarts + 1)
        try:
            start_rollouts = self._prepare_rollouts()
            for number in range(min(self.plan.concurrent, self.conductor.open)):
                channel = Channel(self.mailbox, number)
                run = partial(run_slot, config, self.cluster, channel, self.run_dir, failures)
                self.slots.append(Slot(number, run))
                self.serving.add(number)
                if start_rollouts is not None:
                    self.rollouts[number] = start_rollouts(number)
            while not self.conductor.finished:
                self._take_messages()
                self._check_slots()
                self._give_trials()
                self._release_slots()
            self._close()
        finally:
            for trial in list(self.followers):
                self._unfollow(trial)
            for slot in list(self.rollouts):
                self._close_rollouts(slot)
            for thread in self.closing:
                thread.join()
            ray.kill(self.mailbox)

    def _prepare_rollouts(self) -> Callable[[int], TrialRollouts] | None:
        """A function of the slot that starts its engines with its workers; None offline."""
        config = self.plan.config
        if config.online is None:
            return None
        prompts, status_actor = write_prompts(self.run_dir / "ray", self.prompts, self.held_out), start_status_actor()
        first = override(config, next(previews(config, self.plan.space)))

        def start(slot: int) -> TrialRollouts:
            rollouts = TrialRollouts(self.cluster, self.run_dir / "slots" / str(slot), prompts, status_actor)
            if engine_settings(first) == engine_settings(config):  # else the first trial probably needs others
                rollouts.start_engines(config)
            return rollouts

        return start

    def _close_rollouts(self, slot: int) -> None:
        """Shuts down the actors of a slot, in a thread."""
        if (rollouts := self.rollouts.pop(slot, None)) is not None:
            self.closing.append(threading.Thread(target=rollouts.close, name=f"close-{slot}", daemon=True))
            self.closing[-1].start()

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
        for slot in sorted(self.idle.keys() - self.serving):  # released, and its workers have been started again
            self._answer(self.idle.pop(slot), NO_MORE)
        for slot in sorted(self.idle):
            while (progress := self.conductor.next()) is not None:
                try:
                    config = self.dirs.make(progress, list(self.conductor.progress.values()))
                    rollouts = self.rollouts[slot].begin(config) if slot in self.rollouts else None
                except (
                    ValueError
                ) as error:  # others, as of a disk, would fail every trial: the command ends, and continues
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
                self._close_rollouts(slot)

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
            self._close_rollouts(slot.number)
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

    def _clean(self) -> None:
        """Deletes the checkpoints of trials that have ended and left their slots."""
        on_slots = set(self.on_slot.values())
        self.dirs.clean([progress for name, progress in self.conductor.progress.items() if name not in on_slots])

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

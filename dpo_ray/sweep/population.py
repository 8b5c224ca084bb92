"""Population-based training (arXiv:1711.09846) with synchronous generations.

All trials train to the end of a generation and pause. Then the worst continue from the checkpoints of the best, with
perturbed values. Decisions depend on the results of a generation only, not on the order in which they arrived.
"""

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from dpo_ray.config.sweeps import PbtArgs
from dpo_ray.sweep.ranking import preference
from dpo_ray.sweep.scheduling import Decision, StartsTogether, Update
from dpo_ray.sweep.trials import Key, Objective
from dpo_ray.types import Metrics

Draw = Callable[[str, Random], Any]
"""Draws a value of a key from its domain."""


class Population(StartsTogether):
    """The scheduler ``pbt``.

    Args:
        interval: length of a generation, in ``time``.
        keys: domains of the keys that may change during a run. A clone has the donor's values of all others.
        draw: draws a value from the domain of a key.
        time: ``step`` or ``round``.
    """

    def __init__(
        self, args: PbtArgs, objective: Objective, keys: Mapping[str, Key], draw: Draw, *, interval: int, time: str,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.args, self.objective, self.keys, self.draw = args, objective, keys, draw
        self.interval, self.time, self.seed = interval, time, seed
        self.values: dict[str, Mapping[str, Any]] = {}
        """Values of the trials that have not ended."""
        self.scores: dict[str, float] = {}
        """Larger is better; -inf for one that cannot win."""
        self.waiting: dict[str, int] = {}
        """Generation at whose end each paused trial waits."""

    def add(self, trial: str, values: Mapping[str, Any]) -> None:
        self.values[trial] = values

    def report(self, trial: str, metrics: Metrics) -> Decision:
        self.scores[trial] = -preference(metrics, self.objective)[1]
        position = metrics[self.time]
        if position == 0 or position % self.interval:
            return "continue"
        self.generation = position // self.interval
        return "pause"

    def paused(self, trial: str) -> None:
        self.waiting[trial] = self.generation
        self._maybe_exploit()

    def ended(self, trial: str, metrics: Metrics, *, failed: bool) -> None:
        self.values.pop(trial, None)
        self.waiting.pop(trial, None)
        self._maybe_exploit()

    def _maybe_exploit(self) -> None:
        if not self.waiting or self.waiting.keys() < self.values.keys():
            return
        generation = max(self.waiting.values())
        ranked = sorted(self.waiting, key=lambda trial: (-self.scores[trial], trial))
        size = min(max(1, int(self.args.quantile * len(ranked))), len(ranked) // 2)
        best, worst = ranked[:size], ranked[len(ranked) - size :]
        for trial in sorted(self.waiting):
            if trial in worst and self.scores[trial] < self.scores[best[-1]]:
                # One generator per decision, which is then independent of earlier ones.
                random = Random(f"{self.seed}/{generation}/{trial}")
                donor = random.choice(best)
                values = self._perturbed(self.values[donor], random)
                self.values[trial] = values
                self.decided.append(Update(trial, "clone", donor, values))
            else:
                self.decided.append(Update(trial, "resume"))
        self.waiting.clear()

    def _perturbed(self, values: Mapping[str, Any], random: Random) -> dict[str, Any]:
        perturbed = dict(values)
        for name, key in self.keys.items():
            if name in values:
                perturbed[name] = self._perturb(name, key, values[name], random)
        return perturbed

    def _perturb(self, name: str, key: Key, value: Any, random: Random) -> Any:
        resample, up = random.random() < self.args.resample, random.random() < 0.5
        if resample:
            return self.draw(name, random)
        if key.values:
            position = key.values.index(value) + (1 if up else -1)
            return key.values[min(max(position, 0), len(key.values) - 1)]
        changed = value * self.args.factor if up else value / self.args.factor
        grid = key.step or (1 if key.integer else None)
        if grid is not None:  # at least one step, also where the factor is less than that
            changed = round(changed / grid) * grid
            changed = value + (grid if up else -grid) if changed == value else changed
        if key.lower is not None and key.upper is not None:
            changed = min(max(changed, key.lower), key.upper)
        return int(changed) if key.integer else changed

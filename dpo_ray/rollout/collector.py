"""The collector: keeps every admitted round in work, and evaluations before them. Independent of Ray.

Its state is the ledger and the arguments of each ``poll``, so it can be restarted at any moment.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dpo_ray.config.rounds import OnlineConfig
from dpo_ray.rollout.dispatch import Dispatcher, EngineError, VersionGone
from dpo_ray.rollout.engine import EngineStatus, Request, RequestTimedOut
from dpo_ray.rollout.evaluation import Evaluation, EvaluationStore, evaluation_requests
from dpo_ray.rollout.judges.answer_cache import CACHE, forget_replies
from dpo_ray.rollout.judging import JudgeFailed
from dpo_ray.rollout.ledger import Ledger
from dpo_ray.rollout.open_round import OpenRound, Outcome
from dpo_ray.rollout.pipeline import FailureLimit, Generate, Pipeline, Score, Select
from dpo_ray.rollout.rounds import admitted, oldest_version, prompts_of_round, seed_of
from dpo_ray.rollout.sources import choose_answer, unjudged, with_answer
from dpo_ray.rollout.tally import judge_metrics
from dpo_ray.types import CompletionGroup, Judgement, Prompt

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""Seconds between two attempts of an evaluation whose version no engine serves yet."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The answer to a poll."""

    finished: bool = False
    """True if the round asked for is complete on disk."""
    evaluations: tuple[Evaluation, ...] = ()
    """The complete evaluations among those asked for."""
    needs_weights: bool = False
    """True if engines are up and none has weights: the trainer must publish them again."""
    unplaced: bool = False
    """``Membership.unplaced``: the training workers must start again."""
    error: str | None = None
    """Why the run cannot continue."""


class Collector:
    """Collects rounds and evaluations. Belongs to one event loop.

    Args:
        prompts, held_out: all training prompts, and the held-out prompts.
        judge: scores the candidates of rounds.
        eval_judge: scores held-out completions.
        seed: ``run.seed``.
        keep_rounds: ``Config.kept_rounds``.
        in_flight: groups of a round that wait for an engine, are generated, or wait for the judge.
        statuses: ``Fleet.statuses``.
        progress: called with the phase, and the number of finished and of all groups.
    """

    def __init__(
        self,
        online: OnlineConfig,
        *,
        seed: int,
        keep_rounds: int | None,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        ledger: Ledger,
        engines: Dispatcher,
        judge: Score,
        eval_judge: Score,
        select: Select,
        in_flight: int,
        statuses: Callable[[], Awaitable[Mapping[str, EngineStatus]]],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.online, self.seed, self.prompts, self.held_out = online, seed, prompts, held_out
        self.ledger, self.engines, self.judge, self.eval_judge = ledger, engines, judge, eval_judge
        self.select, self.keep_rounds = select, keep_rounds
        self.in_flight, self.statuses, self.progress = in_flight, statuses, progress
        self._version = 0
        """Version of the last poll."""
        self._tasks: dict[tuple[str, int], asyncio.Task[Any]] = {}
        self._evaluated_instead: dict[int, int] = {}
        """Version evaluated instead, by requested version, where the engines have moved past the requested one."""

    async def poll(self, version: int, *, round: int | None, evaluations: Sequence[int], wait_s: float) -> Progress:
        """Collect what the trainer may need; answer when something that it asks for is complete, or after ``wait_s``.

        Args:
            version: policy version that the trainer has published, its number of finished rounds.
            round: the round that the trainer waits for, if any.
            evaluations: the versions whose evaluations it waits for.
        """
        self._forget(version, evaluations)
        if version != self._version:
            self._version = version
            await asyncio.to_thread(self._forget_rounds, version, evaluations)
        for asked in evaluations:
            if ("evaluation", asked) not in self._tasks:
                self._start("evaluation", asked, self._evaluate)
        for ahead in admitted(version, max_lag=self.online.max_lag, rounds=self.online.rounds):
            if not self._complete(ahead):
                self._start("round", ahead, self._collect)
        wanted = [("round", round), *(("evaluation", asked) for asked in evaluations)]
        waited_for = [self._tasks[key] for key in wanted if key in self._tasks]
        # Also without a wait the tasks get their turn: a caller that polls in a loop would starve them.
        pause_s = 0.0 if round is not None and self._complete(round) else wait_s
        await asyncio.wait([*waited_for, self._nap(pause_s)], return_when=asyncio.FIRST_COMPLETED)
        return self._progress(round, evaluations)

    def _nap(self, seconds: float) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(asyncio.sleep(seconds))

    def _progress(self, round: int | None, evaluations: Sequence[int]) -> Progress:
        for task in self._tasks.values():
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                return Progress(error=f"{type(error).__name__}: {error}")
        tasks = [task for asked in evaluations if (task := self._tasks.get(("evaluation", asked))) is not None]
        return Progress(
            finished=round is not None and self._complete(round),
            evaluations=tuple(task.result() for task in tasks if task.done()),
            needs_weights=self.engines.current.needs_weights,
            unplaced=self.engines.current.unplaced,
            error=self.engines.current.error,
        )

    def _complete(self, round: int) -> bool:
        """True if the round is finished and none of its tokens is too old."""
        task = self._tasks.get(("round", round))
        if task is not None and not task.done():
            return False  # its files are being rewritten if it was too old
        oldest = oldest_version(round, max_lag=self.online.max_lag)
        return self.ledger.finished(round) and not self.ledger.stale(round, oldest=oldest)

    def _start(self, kind: str, number: int, run: Callable[[int], Any]) -> None:
        """Start a task unless it is in progress or has failed."""
        task = self._tasks.get((kind, number))
        if task is None or (task.done() and not task.cancelled() and task.exception() is None):
            self._tasks[kind, number] = asyncio.get_running_loop().create_task(run(number), name=f"{kind} {number}")

    def _forget(self, version: int, evaluations: Sequence[int]) -> None:
        """Forget results that the trainer has."""
        for kind, number in [key for key, task in self._tasks.items() if task.done()]:
            received = number not in evaluations if kind == "evaluation" else number < version
            if received and self._tasks[kind, number].exception() is None:
                del self._tasks[kind, number]
                if kind == "evaluation":
                    self._evaluated_instead.pop(number, None)

    def _forget_rounds(self, version: int, evaluations: Sequence[int]) -> None:
        """Delete the files of rounds that are not kept, and the replies about policy versions of the past."""
        if (keep := self.keep_rounds) is None:
            return
        self.ledger.forget(before=version, keep=keep)
        oldest = oldest_version(max(0, version - keep), max_lag=self.online.max_lag)
        forget_replies(self.ledger.folder.parent / CACHE, before=min((oldest, *evaluations)))

    async def _collect(self, round: int) -> None:
        """Collect the groups that a round lacks."""
        online, oldest = self.online, oldest_version(round, max_lag=self.online.max_lag)
        prompts = prompts_of_round(self.prompts, seed=self.seed, round=round, per_round=online.prompts_per_round)
        ledger = await asyncio.to_thread(self.ledger.open, round, oldest=oldest)  # a large round takes a while
        if ledger.done or ledger.stale:
            logger.info("round %d: %d groups are on disk, %d were too old", round, len(ledger.done), ledger.stale)
        limit = FailureLimit(round, len(prompts), online.max_failed_share)

        async def generate(request: Request) -> CompletionGroup:
            ledger.note_digests(self._digests())
            # An engine may load an older policy while a request waits in it, if the trainer has restarted.
            while (group := await self.engines.generate(request, oldest=oldest)).policy_version < oldest:
                pass
            ledger.note_digests(self._digests())
            return group

        def append(outcome: Outcome) -> None:
            ledger.append(outcome)
            self.progress("generating", len(ledger.done), len(prompts))
            limit.count(outcome)

        pipeline = self._pipeline(generate)
        try:
            await pipeline.run(self._requests(round, prompts, ledger), append)
        except BaseException:
            ledger.close()
            raise
        held_out = await asyncio.to_thread(self._scores_before, round)
        await asyncio.to_thread(
            ledger.finish,
            held_out=held_out,
            timings={"generate_s": pipeline.generating.seconds, "judge_s": pipeline.judging.seconds},
            metrics=dict(self.engines.current.metrics or {}) | engine_metrics((await self.statuses()).values()),
            seed=self.seed,
            sampling=online.sampling.model_dump(mode="json"),
            judged=not online.judged_by_trainer,
        )

    def _scores_before(self, round: int) -> list[float]:
        """Scores of the held-out completions of an earlier policy; none if those of rounds cannot be compared."""
        store = EvaluationStore(self.ledger.folder.parent)
        return store.scores_before(round) if self.online.same_scale else []

    def _digests(self) -> dict[int, str]:
        """Digests of the weights that engines have, by version."""
        return {m.version: m.digest for m in self.engines.current.members if m.version is not None and m.digest}

    def _pipeline(self, generate: Generate) -> Pipeline:
        """The steps of a group for the source of the round's pairs."""
        if self.online.source.use == "self_play":

            async def played(request: Request) -> CompletionGroup:
                return with_answer(await generate(request))

            return Pipeline(played, unjudged, choose_answer, self.in_flight)
        if self.online.judged_by_trainer:
            return Pipeline(generate, unjudged, lambda group, scores: (), self.in_flight)
        return Pipeline(generate, self.judge, self.select, self.in_flight)

    def _requests(self, round: int, prompts: Sequence[Prompt], ledger: OpenRound) -> Iterator[tuple[int, Request]]:
        online = self.online
        for position, prompt in enumerate(prompts):
            if prompt.index not in ledger.done:
                seed = seed_of(self.seed, round, prompt.index)
                deadline_s = online.generate_timeout_s
                yield position, Request(prompt, online.sampling, online.candidates, seed, deadline_s, round)

    async def _evaluate(self, version: int) -> Evaluation:
        """Complete and judge the held-out prompts by the engines of one version.

        Training may be faster than engines load its weights. Where they went beyond the version, the one that they have
        is evaluated in its place, unless it is evaluated anyway; then the evaluation is empty.
        """
        judged, samples = evaluation_requests(self.online, self.prompts, self.held_out, seed=self.seed)
        served = version
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    scored = [tasks.create_task(self._judged(request, served)) for request in judged]
                    plain = [tasks.create_task(self._completed(request, served)) for request in samples]
                break
            except BaseExceptionGroup as errors:
                _, others = errors.split(VersionGone)
                if others is not None:
                    raise others.exceptions[0] from None
            newest = max((member.version for member in self.engines.current.members), default=served)
            if version < self._version and newest > served:
                if newest in self._evaluated_instead.values() or ("evaluation", newest) in self._tasks:
                    return Evaluation(version)
                logger.warning("the engines have gone beyond version %d; version %d is evaluated", version, newest)
                served = self._evaluated_instead[version] = newest
            else:
                await asyncio.sleep(RETRY_S)  # a trainer that restarted has published it, and engines are loading it
        results = [pair for task in scored if (pair := task.result()) is not None]
        groups = (
            [group for task in plain if (group := task.result()) is not None] if samples else [g for g, _ in results]
        )
        return Evaluation(
            served,
            tuple((group, judgement.scores[0]) for group, judgement in results),
            tuple(group for group in groups if group.completions[0].token_ids),
            judge_metrics(judgement for _, judgement in results),
            len(judged) - len(results),
            instead_of=None if served == version else version,
        )

    async def _completed(self, request: Request, version: int) -> CompletionGroup | None:
        """A completion; None if it failed, which leaves a gap in the evaluation."""
        try:
            group = await self.engines.generate(request, oldest=version, newest=version)
            if {group.completions[0].first_version, group.completions[0].last_version} != {version}:
                raise VersionGone(f"prompt {request.prompt.index} was completed by another version than {version}")
            return group
        except (ValueError, RequestTimedOut, EngineError) as error:
            logger.warning("evaluation of prompt %d failed: %s", request.prompt.index, error)
            return None

    async def _judged(self, request: Request, version: int) -> tuple[CompletionGroup, Judgement] | None:
        if (group := await self._completed(request, version)) is None:
            return None
        try:
            return group, await self.eval_judge(group)
        except JudgeFailed as error:
            logger.warning("held-out prompt %d has no score: %s", request.prompt.index, error)
            return group, Judgement((math.nan,))


def engine_metrics(statuses: Collection[EngineStatus]) -> dict[str, float]:
    """Sequences in all engines, their speed while they step, and the mean hit rate of their prefix caches."""
    if not statuses:
        return {}
    busy_s = sum(status.busy_s for status in statuses)
    return {
        "engine/running": sum(status.running for status in statuses),
        "engine/waiting": sum(status.waiting for status in statuses),
        "engine/tokens_per_busy_s": sum(status.generated_tokens for status in statuses) / busy_s if busy_s else 0.0,
        "engine/cache_hit_rate": fmean(status.cache_hit_rate for status in statuses),
    }

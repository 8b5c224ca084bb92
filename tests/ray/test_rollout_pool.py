"""The pool's dealing of work when engines die, on real actors that write numbers instead of text."""

from collections.abc import Iterator

import pytest
import ray

from dpo_ray.config import Config
from dpo_ray.launch.cluster import Cluster
from dpo_ray.launch.rollouts.pool import EngineFailed, EnginesLost, RolloutPool
from dpo_ray.types import CompletionGroup, Prompt
from tests.ray.commands import SharedCluster
from tests.ray.fakes import Engine

PROMPTS = [Prompt(index, ({"role": "user", "content": str(index)},), (index,)) for index in range(600)]
NOT_AGAIN: tuple[int, None, str] = (3, None, "digest")
"""The weights of a push that cannot be given to an engine that joins, as with nccl and ipc."""


@pytest.fixture(scope="module", autouse=True)
def cluster(shared_cluster: SharedCluster) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in shared_cluster.environment.items():
            patch.setenv(key, value)
        ray.init(log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()


def pool_of(*deadly: tuple[int, ...]) -> RolloutPool:
    """As many engines as are given, each with the prompts that kill it; none can be given the weights again."""
    config = {"model": {"path": "tiny"}, "cluster": {"rollout_engines": len(deadly)}, "online": {"prompts": "p.jsonl"}}
    pool = RolloutPool(Config.model_validate(config), Cluster(gpus=0, cpus=8), "none")
    pool.engines = [ray.remote(num_cpus=0)(Engine).remote(index, of) for index, of in enumerate(deadly)]
    pool.weights = NOT_AGAIN
    return pool


def generate(pool: RolloutPool, timeout_s: float = 60) -> tuple[list[CompletionGroup], list[tuple[int, int]]]:
    said: list[tuple[int, int]] = []
    seeds = [7 * prompt.index for prompt in PROMPTS]

    def progress(done: int, total: int) -> None:
        said.append((done, total))

    return pool.generate(PROMPTS, seeds, candidates=2, timeout_s=timeout_s, progress=progress), said


def test_other_engines_generate_the_prompts_of_a_dead_one_which_is_left_out_until_a_push() -> None:
    pool = pool_of((), tuple(range(600)), ())
    groups, said = generate(pool)
    assert [(group.prompt.index, group.seed) for group in groups] == [(index, 7 * index) for index in range(600)]
    assert {group.completions[0].token_ids for group in groups} <= {(0,), (2,)}
    assert pool.lost == {1}
    assert said == sorted(said)
    assert said[-1] == (600, 600)
    generate(pool)  # does not ask the dead one: it would be the second death of its prompts
    assert pool.lost == {1}
    pool.close()
    assert pool.lost == set()


def test_prompts_that_kill_two_engines_end_the_run_naming_them() -> None:
    pool = pool_of((599,), (599,), (599,))
    with pytest.raises(Exception, match=r"prompts \d+ to 600 killed two engines"):
        generate(pool)
    pool.close()


def test_without_an_engine_left_the_collection_ends_at_once() -> None:
    pool = pool_of(tuple(range(600)))
    with pytest.raises(EnginesLost, match="all 1 engines died before they had written all candidates"):
        generate(pool)
    pool.close()


@pytest.mark.parametrize("others", [0, 1])
def test_an_engine_that_can_be_given_the_weights_joins_in_where_one_died(
    monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    pool = pool_of((599,), *[()] * others)
    pool.weights = (3, ["all ", "weights"], "weights")
    monkeypatch.setattr(pool, "_start_engine", lambda index: ray.remote(num_cpus=0)(Engine).remote(7, ()))
    groups, said = generate(pool)
    assert [group.prompt.index for group in groups] == list(range(600))
    assert said[-1] == (600, 600)
    if not others:
        assert groups[-1].completions[0].token_ids == (7,)
        assert pool.lost == set()
    pool.close()


@pytest.mark.parametrize(
    ("digest", "error", "said"),
    [("other", EngineFailed, "received weights of digest weights; version 3 has other"), (None, EnginesLost, "all 1 ")],
)
def test_one_that_has_other_weights_ends_the_run_and_one_that_does_not_come_up_is_lost(
    monkeypatch: pytest.MonkeyPatch, digest: str | None, error: type[Exception], said: str
) -> None:
    pool = pool_of((599,))
    pool.weights = (3, ["weights"], digest or "weights")
    deadly = () if digest else (1,)  # dies as an update begins
    monkeypatch.setattr(pool, "_start_engine", lambda index: ray.remote(num_cpus=0)(Engine).remote(7, deadly))
    with pytest.raises(error, match=said):
        generate(pool)
    pool.close()

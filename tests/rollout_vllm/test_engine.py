"""A real vLLM engine on the CPU: requests that come and go at any time, also across a weight update."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from dpo_ray.config.rounds import SamplingConfig
from dpo_ray.rollout.engine import EngineStatus, Request, RequestTimedOut
from dpo_ray.sync.object_store import ObjectStoreSync
from dpo_ray.types import Completion, CompletionGroup, Prompt
from tests.rollout_vllm.test_weight_push import (
    ENGINE,
    GREEDY,
    MAX_MODEL_LEN,
    TOKENIZER,
    Policy,
    environment,
    generate,
    pack,
    policy_a,
    policy_b,
    prompts,
    push,
    request,
    start_engine,
)

if TYPE_CHECKING:
    from dpo_ray.rollout.vllm_engine import VLLMEngine

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

__all__ = ["environment", "policy_a", "policy_b"]  # fixtures

SEQUENCES = 8
"""vLLM's limit of sequences per step."""
EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def engine(policy_a: Policy, environment: None) -> Iterator["VLLMEngine"]:
    """Updates happen in flight. A test that needs particular weights pushes them."""
    engine = start_engine(
        policy_a,
        worker_extension=ObjectStoreSync.worker_extension,
        drain_updates=False,
        settings=ENGINE.model_copy(update={"args": {"max_num_seqs": SEQUENCES}}),
    )
    yield engine
    engine.close()


def exactly(tokens: int, **settings: Any) -> SamplingConfig:
    return SamplingConfig(max_tokens=tokens, min_tokens=tokens, **settings)


def complete(engine: "VLLMEngine", sampling: SamplingConfig, seed: int = 5) -> Completion:
    (group,) = generate(engine, request(prompts(3)[0], sampling, seed=seed))
    return group.completions[0]


async def until_generated(engine: "VLLMEngine", tokens: int) -> EngineStatus:
    while (status := await engine.status()).generated_tokens < tokens:
        await asyncio.sleep(0.001)
    return status


async def load(engine: "VLLMEngine", policy: Policy, version: int) -> None:
    for bucket in pack(policy.weights(), bucket_bytes=2**18):
        await engine.load(bucket)
    await engine.finish_update(version)
    tokens = (await engine.status()).generated_tokens
    await engine.token_logps([1, 2, 3])
    assert (await engine.status()).generated_tokens - tokens < 20, "requests in flight do not run to their end"
    await engine.serve()


def test_tokens_after_an_update_in_flight_are_those_of_the_new_weights_given_the_tokens_before(
    engine: "VLLMEngine", policy_a: Policy, policy_b: Policy
):
    """With keys and values of the old weights, the continuation would be that of neither policy."""
    (prompt,) = prompts(150)

    async def updated() -> tuple[CompletionGroup, int]:
        before = (await engine.status()).generated_tokens
        running = asyncio.create_task(engine.generate(request(prompt, exactly(200, temperature=0))))
        await until_generated(engine, before + 60)
        await engine.start_update()
        switch = (await engine.status()).generated_tokens - before
        await load(engine, policy_b, 8)
        return await running, switch

    push(engine, policy_a, version=7)
    (undisturbed,) = generate(engine, request(prompt, exactly(200, temperature=0)))
    group, switch = asyncio.run(updated())
    (completion,) = group.completions
    assert 60 <= switch < 150
    assert (completion.first_version, completion.last_version) == (7, 8)
    assert completion.token_ids[:switch] == undisturbed.completions[0].token_ids[:switch]
    prefix = replace(prompt, token_ids=(*prompt.token_ids, *completion.token_ids[:switch]))
    (continued,) = generate(engine, request(prefix, exactly(200 - switch, temperature=0)))
    assert completion.token_ids[switch:] == continued.completions[0].token_ids
    assert continued.policy_version == 8


def test_requests_in_flight_are_complete_after_an_update_and_later_ones_are_of_the_new_version(
    engine: "VLLMEngine", policy_a: Policy, policy_b: Policy
):
    batch = [request(prompt, exactly(60), candidates=4, seed=index) for index, prompt in enumerate(prompts(3, 9, 40))]

    async def updated() -> tuple[list[CompletionGroup], CompletionGroup, CompletionGroup]:
        before = (await engine.status()).generated_tokens
        running = [asyncio.create_task(engine.generate(request)) for request in batch]
        evaluation = asyncio.create_task(engine.generate(replace(batch[0], sampling=exactly(20), evaluation=True)))
        await until_generated(engine, before + 100)
        await engine.start_update()
        assert evaluation.done()
        late = asyncio.create_task(engine.generate(batch[0]))
        await load(engine, policy_b, 12)
        return await asyncio.gather(*running), await evaluation, await late

    push(engine, policy_a, version=11)
    groups, evaluation, late = asyncio.run(updated())
    completions = [completion for group in groups for completion in group.completions]
    assert [len(completion.token_ids) for completion in completions] == [60] * 12
    assert {(c.first_version, c.last_version) for c in completions} <= {(11, 11), (11, 12), (12, 12)}
    assert (11, 12) in {(c.first_version, c.last_version) for c in completions}
    assert {(c.first_version, c.last_version) for c in evaluation.completions} == {(11, 11)}
    assert late.policy_version == 12
    assert late.completions == generate(engine, batch[0])[0].completions


def test_a_request_joins_those_that_run(engine: "VLLMEngine"):
    long, short = request(prompts(3)[0], exactly(300)), request(prompts(9)[0], exactly(5))

    async def join() -> tuple[bool, bool]:
        before = (await engine.status()).generated_tokens
        running = asyncio.create_task(engine.generate(long))
        await until_generated(engine, before + 10)
        await engine.generate(short)
        done = running.done()
        await running
        return done, running.done()

    assert asyncio.run(join()) == (False, True)


@pytest.mark.parametrize("urgent", [{"evaluation": True, "round": 2}, {"round": 1}])
def test_evaluation_and_earlier_rounds_go_before_requests_that_wait(engine: "VLLMEngine", urgent: dict[str, Any]):
    finished: list[str] = []

    async def run(name: str, request: Request) -> None:
        await engine.generate(request)
        finished.append(name)

    async def all_at_once() -> None:
        later = [request(prompts(3)[0], exactly(20), seed=seed) for seed in range(4 * SEQUENCES)]
        ordinary = [run("ordinary", replace(each, round=2)) for each in later]
        await asyncio.gather(*ordinary, run("urgent", replace(request(prompts(9)[0], exactly(20)), **urgent)))

    asyncio.run(all_at_once())
    assert finished.index("urgent") <= 2 * SEQUENCES < len(finished)


def test_log_probabilities_of_evaluation_are_those_of_the_model_whatever_the_sampling(
    engine: "VLLMEngine", policy_a: Policy
):
    push(engine, policy_a, version=0)
    (prompt,) = prompts(9)
    sampling = exactly(30, temperature=0.5, top_p=0.8, top_k=50, repetition_penalty=1.2)
    evaluation = replace(request(prompt, sampling, candidates=3), evaluation=True)
    (group, ordinary) = generate(engine, evaluation, request(prompt, sampling))
    for completion in group.completions:
        logps = policy_a.token_logps([*prompt.token_ids, *completion.token_ids])[len(prompt.token_ids) - 1 :]
        assert completion.logp == pytest.approx(sum(logps), abs=30 * 0.05)  # bfloat16 against float32
    assert [completion.logp for completion in ordinary.completions] == [None]


def test_a_request_ends_at_its_deadline_and_another_goes_on(engine: "VLLMEngine"):
    async def both() -> CompletionGroup:
        other = asyncio.create_task(engine.generate(request(prompts(9)[0], exactly(100))))
        with pytest.raises(RequestTimedOut, match=r"not complete 0\.1 s"):
            await engine.generate(replace(request(prompts(3)[0], exactly(400), candidates=4), deadline_s=0.1))
        return await other

    assert len(asyncio.run(both()).completions[0].token_ids) == 100
    status = asyncio.run(engine.status())
    assert (status.running, status.waiting, status.step_s) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        (prompts(3, MAX_MODEL_LEN - 10)[1], GREEDY, r"prompt 1 has 505 tokens; .* takes at most 488 beside 24"),
        (Prompt(0, (), (4, 999_999)), GREEDY, "999999 is out of vocabulary"),
        (Prompt(0, (), ()), GREEDY, "cannot be empty"),
        (prompts(3)[0], exactly(4, stop_token_ids=(999_999,)), "out-of-vocab"),
    ],
    ids=["long", "out of vocabulary", "empty", "stop token"],
)
def test_a_request_that_cannot_be_served_is_rejected_alone(
    engine: "VLLMEngine", prompt: Prompt, sampling: SamplingConfig, message: str
):
    async def both() -> CompletionGroup:
        other = asyncio.create_task(engine.generate(request(prompts(9)[0])))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match=message) as rejected:
            await engine.generate(request(prompt, sampling))
        assert type(rejected.value) is ValueError
        return await other

    assert asyncio.run(both()).completions


def test_the_same_seeds_give_the_same_completions_and_other_seeds_do_not(engine: "VLLMEngine"):
    def sample(*seeds: int) -> list[tuple[int, ...]]:
        requests = [
            request(prompt, exactly(16), candidates=3, seed=seed)
            for prompt, seed in zip(prompts(3, 20), seeds, strict=True)
        ]
        return [
            tuple(completion.token_ids) for group in generate(engine, *requests) for completion in group.completions
        ]

    first = sample(100, 200)
    assert sample(100, 200) == first
    assert not set(sample(300, 400)) & set(first)
    assert len(set(first)) == 6
    # Completion i of a group uses seed + i, so neighboring seeds share all completions except one.
    assert sample(101, 201)[0] == first[1]


def test_a_group_has_its_prompt_and_seed_and_as_many_candidates_as_asked(engine: "VLLMEngine"):
    batch = prompts(40, 3, 10)
    groups = generate(engine, *(request(prompt, exactly(4), candidates=5, seed=10 * prompt.index) for prompt in batch))
    assert [group.prompt for group in groups] == batch
    assert [group.seed for group in groups] == [0, 10, 20]
    assert [len(group.completions) for group in groups] == [5, 5, 5]


def test_a_finished_completion_ends_with_the_end_of_turn_token_and_its_text_without(engine: "VLLMEngine"):
    sampling = SamplingConfig(max_tokens=200)
    requests = [request(prompt, sampling, candidates=8, seed=100 * prompt.index) for prompt in prompts(3, 5, 9)]
    completions = [completion for group in generate(engine, *requests) for completion in group.completions]
    for completion in completions:
        assert completion.finished == (completion.token_ids[-1] == EOS)
        assert completion.finished or len(completion.token_ids) == 200
        assert EOS not in completion.token_ids[:-1]
        text = TOKENIZER.decode(list(completion.token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        assert completion.text.split() == text.split()
    assert {completion.finished for completion in completions} == {True, False}


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_it(engine: "VLLMEngine"):
    free = complete(engine, SamplingConfig(max_tokens=32))
    stop = free.text.split()[4]
    length = free.token_ids.index(TOKENIZER.convert_tokens_to_ids(stop)) + 1
    stopped = complete(engine, SamplingConfig(max_tokens=32, stop=(stop,)))
    assert stopped.finished
    assert stopped.token_ids == free.token_ids[:length]
    assert stopped.text.split() == free.text.split()[: length - 1]


def test_a_stop_token_ends_the_completion_like_the_end_of_turn_token(engine: "VLLMEngine"):
    free = complete(engine, SamplingConfig(max_tokens=32))
    stop = free.token_ids[6]
    stopped = complete(engine, SamplingConfig(max_tokens=32, stop_token_ids=(stop,)))
    assert stopped.finished
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


def test_min_tokens_forbids_the_end_of_turn_token_before(engine: "VLLMEngine"):
    for seed in range(100):
        free = complete(engine, SamplingConfig(max_tokens=40), seed)
        if len(free.token_ids) < 20:
            break
    longer = complete(engine, SamplingConfig(max_tokens=40, min_tokens=30), seed)
    assert free.token_ids[-1] == EOS
    assert len(longer.token_ids) >= 30
    assert longer.token_ids[: len(free.token_ids) - 1] == free.token_ids[:-1]
    assert EOS not in longer.token_ids[:29]


def test_min_p_of_one_leaves_the_most_likely_token(engine: "VLLMEngine"):
    greedy = complete(engine, exactly(24, temperature=0))
    assert complete(engine, exactly(24, min_p=1.0)).token_ids == greedy.token_ids
    assert complete(engine, exactly(24)).token_ids != greedy.token_ids


def test_a_large_repetition_penalty_keeps_every_token_from_a_second_use(engine: "VLLMEngine"):
    tokens = complete(engine, exactly(60, temperature=0, repetition_penalty=1000.0)).token_ids
    assert len(set(tokens)) == 60 > len(set(complete(engine, exactly(60, temperature=0)).token_ids))
    assert not set(tokens) & set(prompts(3)[0].token_ids)


def test_the_status_counts_tokens_and_reuse_of_prompts(engine: "VLLMEngine"):
    (prompt,) = prompts(300)

    async def run() -> tuple[EngineStatus, EngineStatus, EngineStatus]:
        before = await engine.status()
        running = asyncio.create_task(engine.generate(request(prompt, exactly(50), candidates=3 * SEQUENCES)))
        during = await until_generated(engine, before.generated_tokens + 10)
        await running
        return before, during, await engine.status()

    before, during, after = asyncio.run(run())
    assert (during.running, during.waiting) == (SEQUENCES, 2 * SEQUENCES)
    assert after.generated_tokens - before.generated_tokens == 3 * SEQUENCES * 50
    assert after.busy_s > during.busy_s > before.busy_s
    assert before.cache_hit_rate < after.cache_hit_rate < 1  # all sequences but the first reuse two blocks of 128


def test_an_engine_whose_step_failed_raises_in_every_call(engine: "VLLMEngine", monkeypatch: pytest.MonkeyPatch):
    """Comes last: the engine is unusable afterwards."""
    from dpo_ray.rollout.stepping import EngineFailed

    def fail() -> None:
        raise IndexError("index out of range")

    monkeypatch.setattr(engine._llm.llm_engine, "step", fail)
    for _ in range(2):
        with pytest.raises(EngineFailed, match="IndexError: index out of range"):
            generate(engine, request(prompts(3)[0]))
    for call in (engine.status, engine.start_update, engine.sleep):
        with pytest.raises(EngineFailed):
            asyncio.run(call())

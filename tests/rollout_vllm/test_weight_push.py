"""A real vLLM engine on the CPU: after a weight update it uses exactly the new weights.

Engines run in this process, one at a time. The models are random and tiny, with tied embeddings and fused layers like
those of a real model.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_ray.config.rounds import EngineConfig, SamplingConfig
from dpo_ray.rollout.engine import UNPUSHED, Request
from dpo_ray.sync.base import EngineGroup
from dpo_ray.sync.object_store import ObjectStoreSync
from dpo_ray.sync.tensors import Digest, WireTensor, to_buckets
from dpo_ray.types import CompletionGroup, Messages, Probe, Prompt

if TYPE_CHECKING:
    from dpo_ray.rollout.vllm_engine import VLLMEngine

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

WORDS = 250
MAX_MODEL_LEN = 512
ENGINE = EngineConfig(kv_cache_gib=0.125)
GREEDY = SamplingConfig(temperature=0, max_tokens=24)
DEADLINE_S = 120.0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{i:03}" for i in range(WORDS))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


TOKENIZER = tiny_tokenizer()


def render(messages: Messages) -> list[int]:
    conversation: Any = list(messages)
    token_ids: Any = TOKENIZER.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    return token_ids


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=256,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        intermediate_size=512,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM(config).bfloat16()


@dataclass(frozen=True)
class Policy:
    """A model, and the directory an engine can start from."""

    model: LlamaForCausalLM
    path: Path

    def weights(self) -> list[tuple[str, Tensor]]:
        return list(self.model.named_parameters())

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """Computed by transformers, in float32."""
        ids = torch.tensor([token_ids])
        with torch.no_grad():
            logits = self.model.float()(ids).logits
        self.model.bfloat16()
        return logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()


def saved_policy(seed: int, path: Path) -> Policy:
    model = tiny_llama(seed)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return Policy(model, path)


@pytest.fixture(scope="module")
def policy_a(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return saved_policy(1, tmp_path_factory.mktemp("policies") / "a")


@pytest.fixture(scope="module")
def policy_b(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return saved_policy(2, tmp_path_factory.mktemp("policies") / "b")


def start_engine(
    policy: Policy, *, worker_extension: str | None, drain_updates: bool = True, settings: EngineConfig = ENGINE
) -> "VLLMEngine":
    from dpo_ray.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(
        str(policy.path),
        dtype="bfloat16",
        engine=settings,
        max_model_len=MAX_MODEL_LEN,
        drain_updates=drain_updates,
        worker_extension=worker_extension,
        on_cpu=True,
    )


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    from dpo_ray.rollout.vllm_engine import engine_environment

    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(ENGINE, on_cpu=True, threads=1).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def completions_of_a_fresh_engine_of_b(policy_b: Policy, environment: None) -> list[tuple[int, ...]]:
    engine = start_engine(policy_b, worker_extension=None)
    completions = greedy(engine)
    engine.close()
    return completions


@pytest.fixture(scope="module")
def engine(
    policy_a: Policy, environment: None, completions_of_a_fresh_engine_of_b: list[tuple[int, ...]]
) -> Iterator["VLLMEngine"]:
    """Starts from policy A, after the engine of B is closed. A test that needs particular weights pushes them."""
    engine = start_engine(policy_a, worker_extension=ObjectStoreSync.worker_extension)
    yield engine
    engine.close()


class OneEngine(EngineGroup):
    """A pool of one, without a cluster."""

    def __init__(self, engine: "VLLMEngine") -> None:
        self.engine = engine
        self.buckets = 0

    def begin_update(self, version: int, *, collective: bool) -> list[str]:
        self.buckets, self.version = 0, version
        asyncio.run(self.engine.start_update())
        return []

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        raise NotImplementedError

    def load(self, message: list[WireTensor]) -> None:
        self.buckets += 1
        asyncio.run(self.engine.load(message))

    def end_update(self, digest: str, probe: Probe) -> None:
        assert asyncio.run(self.engine.finish_update(self.version)) == digest
        asyncio.run(self.engine.serve())


def pack(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[list[WireTensor]]:
    for tensors in to_buckets(weights, dtype=torch.bfloat16, device=torch.device("cpu"), bucket_bytes=bucket_bytes):
        yield [WireTensor.from_tensor(name, tensor) for name, tensor in tensors]


async def load_and_finish(engine: "VLLMEngine", policy: Policy, version: int) -> str:
    for bucket in pack(policy.weights(), bucket_bytes=2**20):
        await engine.load(bucket)
    digest = await engine.finish_update(version)
    await engine.serve()
    return digest


def digest_of(policy: Policy) -> str:
    digest = Digest()
    digest.update(policy.weights())
    return digest.hexdigest()


def push(engine: "VLLMEngine", policy: Policy, version: int) -> OneEngine:
    engines = OneEngine(engine)
    sync = ObjectStoreSync(bucket_mib=1)
    sync.connect(engines)
    sync.publish(policy.weights(), version=version, probe=Probe((), (), 0.0))
    return engines


def words(numbers: Iterable[int]) -> str:
    return " ".join(f"w{i % WORDS:03}" for i in numbers)


def prompts(*lengths: int) -> list[Prompt]:
    messages: list[Messages] = [
        ({"role": "user", "content": words(range(7 * index, 7 * index + length))},)
        for index, length in enumerate(lengths)
    ]
    return [Prompt(index, turns, tuple(render(turns))) for index, turns in enumerate(messages)]


def request(prompt: Prompt, sampling: SamplingConfig = GREEDY, candidates: int = 1, seed: int = 0) -> Request:
    return Request(prompt, sampling, candidates, seed, DEADLINE_S)


def generate(engine: "VLLMEngine", *requests: Request) -> list[CompletionGroup]:
    async def all_at_once() -> list[CompletionGroup]:
        return await asyncio.gather(*map(engine.generate, requests))

    return asyncio.run(all_at_once())


def greedy(engine: "VLLMEngine") -> list[tuple[int, ...]]:
    """Tokens after four prompts; the last is long enough for two blocks of the prefix cache."""
    groups = generate(engine, *map(request, prompts(3, 10, 40, 300)))
    return [tuple(group.completions[0].token_ids) for group in groups]


def version_of(engine: "VLLMEngine") -> int:
    return asyncio.run(engine.status()).version


def test_unpushed_weights_are_stamped_as_such(engine: "VLLMEngine"):
    (group,) = generate(engine, request(prompts(3)[0]))
    assert version_of(engine) == group.policy_version == UNPUSHED


def test_pushing_the_weights_an_engine_has_changes_nothing(engine: "VLLMEngine", policy_a: Policy):
    before = greedy(engine)
    push(engine, policy_a, version=0)
    assert greedy(engine) == before


def test_after_a_push_an_engine_generates_the_completions_of_a_fresh_engine_with_those_weights(
    engine: "VLLMEngine", policy_a: Policy, policy_b: Policy, completions_of_a_fresh_engine_of_b: list[tuple[int, ...]]
):
    push(engine, policy_a, version=1)
    completions_of_a = greedy(engine)  # also fills the prefix cache with keys and values of A
    engines = push(engine, policy_b, version=2)
    assert engines.buckets > 3
    assert greedy(engine) == completions_of_a_fresh_engine_of_b
    assert all(a != b for a, b in zip(completions_of_a, completions_of_a_fresh_engine_of_b, strict=True))
    push(engine, policy_a, version=3)
    assert greedy(engine) == completions_of_a


def test_fused_layers_load_from_buckets_of_one_tensor(
    engine: "VLLMEngine", policy_a: Policy, policy_b: Policy, completions_of_a_fresh_engine_of_b: list[tuple[int, ...]]
):
    async def update() -> None:
        await engine.start_update()
        for bucket in pack(policy_b.weights(), bucket_bytes=1):
            await engine.load(bucket)
        await engine.finish_update(5)
        await engine.serve()

    push(engine, policy_a, version=4)
    asyncio.run(update())
    assert greedy(engine) == completions_of_a_fresh_engine_of_b


@pytest.mark.parametrize("loaded", [1, 7, 20, 29])
def test_an_update_abandoned_after_some_tensors_leaves_no_trace_in_the_next(
    engine: "VLLMEngine", policy_a: Policy, policy_b: Policy, loaded: int
):
    """Of 29 tensors; 7 are the embedding and a part of the first layer, with one of its fused layers incomplete."""
    broken = [(name, torch.full_like(weight, 3.0)) for name, weight in policy_a.weights()]

    async def update() -> str:
        await engine.start_update()
        for bucket in list(pack(broken, bucket_bytes=1))[:loaded]:
            await engine.load(bucket)
        await engine.start_update()
        return await load_and_finish(engine, policy_b, loaded)

    assert len(broken) == 29
    push(engine, policy_a, version=0)
    expected = digest_of(policy_b)
    assert asyncio.run(update()) == expected
    assert version_of(engine) == loaded
    check_logps(engine, policy_b)


def test_an_update_that_leaves_out_a_parameter_is_rejected_and_can_be_started_again(
    engine: "VLLMEngine", policy_a: Policy, policy_b: Policy
):
    name, _ = policy_b.weights()[-1]

    async def incomplete() -> None:
        await engine.start_update()
        for bucket in pack(policy_b.weights()[:-1], bucket_bytes=2**20):
            await engine.load(bucket)
        await engine.finish_update(2)

    push(engine, policy_a, version=1)
    with pytest.raises(ValueError, match=f"left out 1 parameters .* first '{name}'"):
        asyncio.run(incomplete())
    assert version_of(engine) == 1
    push(engine, policy_b, version=2)
    check_logps(engine, policy_b)


def test_requests_wait_for_the_end_of_an_update_and_for_its_proof(engine: "VLLMEngine", policy_a: Policy):
    async def update() -> CompletionGroup:
        await engine.start_update()
        waiting = asyncio.create_task(engine.generate(request(prompts(3)[0])))
        with pytest.raises(RuntimeError, match="not finished"):
            await engine.token_logps([1, 2, 3])
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert (await engine.status()).waiting == 1
        for bucket in pack(policy_a.weights(), bucket_bytes=2**20):
            await engine.load(bucket)
        await engine.finish_update(9)
        with pytest.raises(RuntimeError, match="does not serve version 9 yet"):
            await engine.wake()
        assert len(await engine.token_logps([1, 2, 3])) == 2
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await engine.serve()
        return await waiting

    assert asyncio.run(update()).policy_version == 9


def test_a_draining_update_waits_for_running_requests_and_changes_none_of_them(
    engine: "VLLMEngine", policy_a: Policy, policy_b: Policy
):
    sampling = SamplingConfig(temperature=0, max_tokens=100, min_tokens=100)

    async def update() -> list[CompletionGroup]:
        running = [asyncio.create_task(engine.generate(request(prompt, sampling))) for prompt in prompts(3, 40)]
        while (await engine.status()).running < 2:
            await asyncio.sleep(0.001)
        await engine.start_update()
        assert all(task.done() for task in running)
        await load_and_finish(engine, policy_b, 22)
        return await asyncio.gather(*running)

    push(engine, policy_a, version=21)
    undisturbed = generate(engine, *(request(prompt, sampling) for prompt in prompts(3, 40)))
    assert asyncio.run(update()) == undisturbed
    assert [c.last_version for group in undisturbed for c in group.completions] == [21, 21]


def test_a_sleeping_engine_generates_after_waking_the_same_as_before(engine: "VLLMEngine", policy_a: Policy):
    """On a CPU vLLM keeps the memory; scheduler and caches behave as on a GPU."""

    async def sleep_and_wake() -> tuple[int, ...]:
        await engine.sleep()
        await engine.sleep()
        waiting = asyncio.create_task(engine.generate(request(prompts(3)[0])))
        with pytest.raises(RuntimeError, match="sleeps"):
            await engine.token_logps([1, 2, 3])
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await engine.wake()
        await engine.wake()
        return tuple((await waiting).completions[0].token_ids)

    push(engine, policy_a, version=0)
    before = greedy(engine)
    assert asyncio.run(sleep_and_wake()) == before[0]
    assert greedy(engine) == before


def test_a_push_wakes_the_weights_first_and_the_cache_after_the_last_bucket(
    engine: "VLLMEngine",
    policy_b: Policy,
    completions_of_a_fresh_engine_of_b: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[str] = []
    for name in ("wake_up", "start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"):
        real = getattr(engine._llm, name)

        def recorded(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            calls.append(" ".join([_name, *kwargs.get("tags", ())]))
            return _real(*args, **kwargs)

        monkeypatch.setattr(engine._llm, name, recorded)
    asyncio.run(engine.sleep())
    buckets = push(engine, policy_b, version=11).buckets
    assert calls == [
        "wake_up weights",
        "start_weight_update",
        *["update_weights"] * buckets,
        "finish_weight_update",
        "wake_up kv_cache",
        "reset_prefix_cache",
        "wake_up scheduling",
    ]
    assert version_of(engine) == 11
    assert greedy(engine) == completions_of_a_fresh_engine_of_b


def check_logps(engine: "VLLMEngine", policy: Policy) -> None:
    """The engine's log-probabilities of 302 tokens are those of the policy; two random models differ by 1.7."""
    token_ids = render(({"role": "user", "content": words(range(0, 900, 3))},))
    logps, expected = asyncio.run(engine.token_logps(token_ids)), policy.token_logps(token_ids)
    assert len(logps) == len(token_ids) - 1 > 256
    differences = [abs(a - b) for a, b in zip(logps, expected, strict=True)]
    assert sum(differences) / len(differences) < 0.05  # bfloat16 against float32


def test_token_logps_are_computed_with_the_pushed_weights(engine: "VLLMEngine", policy_a: Policy, policy_b: Policy):
    for version, policy in enumerate((policy_a, policy_b)):
        push(engine, policy, version=version)
        check_logps(engine, policy)

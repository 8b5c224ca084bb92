"""A real vLLM engine on the CPU: its completions, and that after a push it uses exactly the new weights.

Engines run in this process, one at a time. The models are random and tiny, with tied embeddings and fused layers like
those of a real model.
"""

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

from dpo_ray.config.schema import EngineConfig, SamplingConfig
from dpo_ray.rollout.vllm_engine import UNPUSHED
from dpo_ray.sync.base import EngineGroup, WireTensor, to_buckets
from dpo_ray.sync.object_store import ObjectStoreSync
from dpo_ray.types import Messages, Probe, Prompt

if TYPE_CHECKING:
    from dpo_ray.rollout.vllm_engine import VLLMEngine

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

WORDS = 250
MAX_MODEL_LEN = 512
ENGINE = EngineConfig(kv_cache_gib=0.125)
GREEDY = SamplingConfig(temperature=0, max_tokens=24)
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


def start_engine(policy: Policy, *, worker_extension: str | None) -> "VLLMEngine":
    from dpo_ray.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(
        str(policy.path),
        dtype="bfloat16",
        engine=ENGINE,
        max_model_len=MAX_MODEL_LEN,
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
        self.engine.start_update()
        return []

    def init_transfer(self, infos: Sequence[Mapping[str, Any]]) -> None:
        raise NotImplementedError

    def load(self, message: list[WireTensor]) -> None:
        self.buckets += 1
        self.engine.load(message)

    def end_update(self, digest: str, probe: Probe) -> None:
        assert self.engine.finish_update(self.version) == digest


def pack(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[list[WireTensor]]:
    for tensors in to_buckets(weights, dtype=torch.bfloat16, device=torch.device("cpu"), bucket_bytes=bucket_bytes):
        yield [WireTensor.from_tensor(name, tensor) for name, tensor in tensors]


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


def greedy(engine: "VLLMEngine") -> list[tuple[int, ...]]:
    """Tokens after four prompts; the last is long enough for two blocks of the prefix cache."""
    batch = prompts(3, 10, 40, 300)
    groups = engine.generate(batch, sampling=GREEDY, candidates=1, seeds=[0] * len(batch))
    return [group.completions[0].token_ids for group in groups]


def test_unpushed_weights_are_stamped_as_such(engine: "VLLMEngine"):
    (group,) = engine.generate(prompts(3), sampling=GREEDY, candidates=1, seeds=[0])
    assert engine.version == group.policy_version == UNPUSHED


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
    push(engine, policy_a, version=4)
    engine.start_update()
    for bucket in pack(policy_b.weights(), bucket_bytes=1):
        engine.load(bucket)
    engine.finish_update(5)
    assert greedy(engine) == completions_of_a_fresh_engine_of_b


def test_completions_are_stamped_with_the_version_of_the_push(engine: "VLLMEngine", policy_a: Policy):
    push(engine, policy_a, version=17)
    (group,) = engine.generate(prompts(3), sampling=GREEDY, candidates=1, seeds=[0])
    assert engine.version == group.policy_version == 17


def test_a_sleeping_engine_generates_nothing_and_after_waking_the_same_as_before(
    engine: "VLLMEngine", policy_a: Policy
):
    """On a CPU vLLM keeps the memory; scheduler and caches behave as on a GPU."""
    push(engine, policy_a, version=0)
    before = greedy(engine)
    engine.sleep()
    engine.sleep()
    with pytest.raises(RuntimeError, match="sleeps"):
        greedy(engine)
    with pytest.raises(RuntimeError, match="sleeps"):
        engine.token_logps([1, 2, 3])
    engine.wake()
    engine.wake()
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
    engine.sleep()
    buckets = push(engine, policy_b, version=11).buckets
    assert calls == [
        "wake_up weights",
        "start_weight_update",
        *["update_weights"] * buckets,
        "finish_weight_update",
        "wake_up kv_cache",
        "reset_prefix_cache",
    ]
    assert engine.version == 11
    assert greedy(engine) == completions_of_a_fresh_engine_of_b


def test_token_logps_are_computed_with_the_pushed_weights(engine: "VLLMEngine", policy_a: Policy, policy_b: Policy):
    token_ids = render(({"role": "user", "content": words(range(0, 900, 3))},))
    assert len(token_ids) > 256
    for version, policy in enumerate((policy_a, policy_b)):
        push(engine, policy, version=version)
        logps = engine.token_logps(token_ids)
        expected = policy.token_logps(token_ids)
        assert len(logps) == len(token_ids) - 1
        differences = [abs(a - b) for a, b in zip(logps, expected, strict=True)]
        assert sum(differences) / len(differences) < 0.05  # bfloat16 against float32


def test_the_same_seeds_give_the_same_completions_and_other_seeds_do_not(engine: "VLLMEngine"):
    def generate(*seeds: int) -> list[tuple[int, ...]]:
        groups = engine.generate(prompts(3, 20), sampling=SamplingConfig(max_tokens=16), candidates=3, seeds=seeds)
        return [completion.token_ids for group in groups for completion in group.completions]

    first = generate(100, 200)
    assert generate(100, 200) == first
    assert not set(generate(300, 400)) & set(first)
    assert len(set(first)) == 6
    # Completion i of a group uses seed + i, so neighbouring seeds share all completions except one.
    assert generate(101, 201)[0] == first[1]


def test_groups_come_in_the_order_of_the_prompts_with_as_many_candidates_as_asked(engine: "VLLMEngine"):
    batch = prompts(40, 3, 10)
    groups = engine.generate(batch, sampling=SamplingConfig(max_tokens=8), candidates=5, seeds=[10, 20, 30])
    assert [group.prompt for group in groups] == batch
    assert [list(group.prompt_token_ids) for group in groups] == [list(prompt.token_ids) for prompt in batch]
    assert [group.seed for group in groups] == [10, 20, 30]
    assert [len(group.completions) for group in groups] == [5, 5, 5]


def test_a_finished_completion_ends_with_the_end_of_turn_token_and_its_text_without(engine: "VLLMEngine"):
    sampling = SamplingConfig(max_tokens=200)
    groups = engine.generate(prompts(3, 5, 9), sampling=sampling, candidates=8, seeds=[0, 100, 200])
    completions = [completion for group in groups for completion in group.completions]
    for completion in completions:
        assert completion.finished == (completion.token_ids[-1] == TOKENIZER.eos_token_id)
        assert completion.finished or len(completion.token_ids) == 200
        assert TOKENIZER.eos_token_id not in completion.token_ids[:-1]
        text = TOKENIZER.decode(list(completion.token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        assert completion.text.split() == text.split()
    assert {completion.finished for completion in completions} == {True, False}


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_it(engine: "VLLMEngine"):
    def generate(stop: tuple[str, ...]) -> tuple[str, tuple[int, ...], bool]:
        sampling = SamplingConfig(max_tokens=32, stop=stop)
        (group,) = engine.generate(prompts(3), sampling=sampling, candidates=1, seeds=[5])
        (completion,) = group.completions
        return completion.text, completion.token_ids, completion.finished

    text, token_ids, _ = generate(())
    stop = text.split()[4]
    length = token_ids.index(TOKENIZER.convert_tokens_to_ids(stop)) + 1
    stopped_text, stopped_ids, finished = generate((stop,))
    assert finished
    assert stopped_ids == token_ids[:length]
    assert stopped_text.split() == text.split()[: length - 1]


def test_a_prompt_without_room_for_its_completion_is_rejected_by_index(engine: "VLLMEngine"):
    batch = prompts(3, MAX_MODEL_LEN - 10)
    with pytest.raises(ValueError, match=r"prompt 1 has 505 tokens; .* takes at most 488 beside 24"):
        engine.generate(batch, sampling=GREEDY, candidates=1, seeds=[0, 0])


def test_an_engine_does_not_generate_until_an_update_is_finished(engine: "VLLMEngine", policy_a: Policy):
    engine.start_update()
    with pytest.raises(RuntimeError, match="not finished"):
        engine.generate(prompts(3), sampling=GREEDY, candidates=1, seeds=[0])
    with pytest.raises(RuntimeError, match="not finished"):
        engine.start_update()
    for bucket in pack(policy_a.weights(), bucket_bytes=2**20):
        engine.load(bucket)
    engine.finish_update(1)
    assert len(engine.generate(prompts(3), sampling=GREEDY, candidates=1, seeds=[0])) == 1


def test_a_push_that_leaves_out_a_parameter_is_rejected(engine: "VLLMEngine", policy_a: Policy):
    """Comes last: the engine is unusable afterwards."""
    name, _ = policy_a.weights()[-1]
    engine.start_update()
    for bucket in pack(policy_a.weights()[:-1], bucket_bytes=2**20):
        engine.load(bucket)
    with pytest.raises(ValueError, match=f"left out 1 parameters .* first '{name}'"):
        engine.finish_update(2)

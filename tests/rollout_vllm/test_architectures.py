"""Pushes to engines of mixtures of experts, and of checkpoints whose head is stored beside a tied embedding.

After a push of changed weights, an engine's log-probabilities are those of transformers in float32.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_ray.sync.object_store import ObjectStoreSync
from dpo_ray.types import Probe
from tests.conftest import ragged_texts, save_tokenizer
from tests.distributed.processes import run_ranks
from tests.distributed.runs import offline
from tests.families import EXPERTS, PACKED, save_small_model
from tests.rollout_vllm.test_weight_push import ENGINE, TOKENIZER, WORDS, OneEngine, environment, tiny_llama

if TYPE_CHECKING:
    from dpo_ray.rollout.vllm_engine import VLLMEngine

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("environment")]

__all__ = ["environment"]  # fixture

PROBE = list(range(4, 4 + WORDS, 4))
TOLERANCE = 1e-4
"""Nats, between two implementations in float32; they differ by about 1e-5."""
# vLLM's attention on CPUs needs heads of 32 and more. Experts of 48 are padded to 64 on CPUs.
HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_EXPERTS: dict[str, dict[str, Any]] = {
    "granitemoe": HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "mixtral": HEADS | {"num_local_experts": 4},
    "olmoe": HEADS | EXPERTS,
    "qwen2_moe": HEADS | EXPERTS,
    "qwen3_moe": HEADS | EXPERTS | {"head_dim": 32},
}
EXPORTED = [
    "cohere", "exaone4", "gemma", "gemma2", "gemma3_text", "gpt2", "granite", "granitemoe", "ministral", "mistral",
    "mixtral", "olmo2", "olmo3", "olmoe", "opt", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
]  # fmt: skip
UNWINDOWED: dict[str, dict[str, Any]] = {"qwen2": {}, "qwen3": {"head_dim": 32}}
"""vLLM takes these architectures without windows in some layers only, as all released models are."""


@contextmanager
def engine_of(folder: Path, max_model_len: int = 128) -> Iterator["VLLMEngine"]:
    """An engine in float32 that starts from a checkpoint with its tokenizer."""
    from dpo_ray.rollout.vllm_engine import VLLMEngine

    engine = VLLMEngine(
        str(folder),
        dtype="float32",
        engine=ENGINE,
        max_model_len=max_model_len,
        worker_extension=ObjectStoreSync.worker_extension,
        on_cpu=True,
    )
    try:
        yield engine
    finally:
        engine.close()


def push(engine: "VLLMEngine", weights: dict[str, Tensor]) -> None:
    sync = ObjectStoreSync(bucket_mib=1, dtype="float32")
    sync.connect(OneEngine(engine))
    sync.publish(weights.items(), version=0, probe=Probe((), (), 0.0))


def engine_logps(engine: "VLLMEngine") -> list[float]:
    return asyncio.run(engine.token_logps(PROBE))


def changed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: weight + 0.05 * torch.randn_like(weight) for name, weight in weights.items()}


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def token_logps(folder: Path) -> list[float]:
    """Of the checkpoint, by transformers' eager implementations in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.tensor(PROBE)
    with torch.no_grad():
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[1:, None])[:, 0].tolist()


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "architecture",
    ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL_EXPERTS if name != "qwen3_moe")],
)
def test_an_engine_computes_with_the_experts_of_the_last_push(tmp_path: Path, architecture: str) -> None:
    folder = save_small_model(tmp_path, architecture, SMALL_EXPERTS[architecture])
    before, weights = token_logps(folder), load_file(folder / "model.safetensors")
    TOKENIZER.save_pretrained(folder)
    with engine_of(folder) as engine:
        push(engine, weights)
        assert difference(engine_logps(engine), before) < TOLERANCE
        save_weights(folder, changed(weights))
        after = token_logps(folder)
        assert difference(before, after) > 1
        push(engine, changed(weights))
        assert difference(engine_logps(engine), after) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EXPORTED)
def test_an_engine_loads_an_export_exactly(
    tmp_path: Path, architecture: str, write_pairs: Callable[[Sequence[tuple[str, str, str]]], Path]
) -> None:
    given = UNWINDOWED.get(architecture, PACKED[architecture])
    settings = given | HEADS | ({"head_dim": 32} if "head_dim" in given else {})
    save_tokenizer(save_small_model(tmp_path / "model", architecture, settings))
    config = {
        "run": {"dir": str(tmp_path), "name": "run", "steps": 1, "save_every": None},
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "reference": {"cache_dir": str(tmp_path / "cache")},
        "data": {"train": str(write_pairs(ragged_texts(4)))},
        "optim": {"lr": 1e-2, "pairs_per_step": 4, "schedule": "constant"},
        "cluster": {"train_workers": 1},
    }
    run_ranks(1, offline, config)
    export = tmp_path / "run" / "policy"
    assert difference(token_logps(export), token_logps(tmp_path / "model")) > 0.1
    with engine_of(export) as engine:
        assert difference(engine_logps(engine), token_logps(export)) < TOLERANCE


@pytest.mark.parametrize("redundant", [True, False], ids=["a copy of the embedding", "weights of its own"])
def test_a_head_stored_beside_a_tied_embedding_is_updated(tmp_path: Path, redundant: bool) -> None:
    """Transformers and vLLM tie such a head only if it equals the embedding, whatever the configuration says."""
    tiny_llama(seed=1).float().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    tied = load_file(tmp_path / "model.safetensors")
    embedding = tied["model.embed_tokens.weight"]
    stored = tied | {"lm_head.weight": embedding.clone() if redundant else 2 * embedding.flip(0)}
    save_weights(tmp_path, stored)
    TOKENIZER.save_pretrained(tmp_path)
    with engine_of(tmp_path) as engine:
        assert difference(engine_logps(engine), token_logps(tmp_path)) < TOLERANCE
        new = changed(tied if redundant else stored)
        save_weights(tmp_path, new)
        push(engine, new)
        assert difference(engine_logps(engine), token_logps(tmp_path)) < TOLERANCE


def test_a_push_of_weights_that_vllm_cannot_update_is_rejected(tmp_path: Path) -> None:
    """Its loader of gpt-oss copies sinks and experts, instead of passing them to the loaders that reloading wraps."""
    settings = HEADS | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    folder = save_small_model(tmp_path, "gpt_oss", settings)
    TOKENIZER.save_pretrained(folder)
    with (
        engine_of(folder) as engine,
        pytest.raises(ValueError, match=r"cannot update 10 parameters of GptOssForCausalLM, first .*sinks"),
    ):
        push(engine, load_file(folder / "model.safetensors"))

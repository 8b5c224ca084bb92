"""The rollout engine: vLLM in the process that builds it.

Independent of Ray. vLLM is imported when an engine is built, so ``engine_environment`` works without it.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpo_ray.config.schema import EngineConfig, SamplingConfig
from dpo_ray.types import Completion, CompletionGroup, Prompt

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

UNPUSHED = -1
"""Policy version of the weights that an engine loaded from disk, before the first push."""
CPU_BATCH_TOKENS = 4096
"""Minimum limit of prompt tokens per step on a CPU."""


class VLLMEngine:
    """``vllm.LLM`` with its scheduler in this process. Not thread-safe.

    The process needs ``engine_environment`` in its environment before it imports torch or vLLM.

    Args:
        model_path: hub id or Hugging Face directory.
        engine: vLLM's settings; ``engine.args`` override every other argument of ``vllm.LLM``.
        max_model_len: longest prompt plus completion, in tokens.
        tensor_parallel: GPUs of this engine; 1 on a CPU.
        executor: ``ray`` runs the workers of several GPUs in this process's placement group, ``mp`` on the GPUs visible
            to this process.
        sleeps: True for an engine that shares its GPUs with another process.
        worker_extension: ``WeightSync.worker_extension``; None for an engine that never gets new weights.
        on_cpu: True for the CPU build of vLLM.

    Example:
        engine.start_update()
        for bucket in buckets:
            engine.load(bucket)
        digest = engine.finish_update(version=3)
        groups = engine.generate(prompts, sampling=sampling, candidates=4, seeds=seeds)   # policy_version 3
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        engine: EngineConfig,
        max_model_len: int,
        tensor_parallel: int = 1,
        executor: str = "ray",
        sleeps: bool = False,
        worker_extension: str | None = None,
        on_cpu: bool,
        seed: int = 0,
    ) -> None:
        from vllm import LLM

        self._update_open = self._asleep = False
        arguments: dict[str, Any] = {
            "model": model_path,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "seed": seed,
            "enforce_eager": is_eager(engine, on_cpu=on_cpu),
            "enable_prefix_caching": True,
            # "vllm" ignores temperature and nucleus of the model's generation config, but not its end-of-turn tokens.
            "generation_config": "vllm",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if on_cpu:
            import torch

            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                arguments["dtype"] = "float32"  # bfloat16 would be multiplied at a hundredth of the rate
            arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
            # On a CPU, whose generators have no offset, a seeded request fails if its prompt is split over two steps.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(max_model_len, CPU_BATCH_TOKENS)
        else:
            arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
            arguments["tensor_parallel_size"] = tensor_parallel
            arguments["enable_sleep_mode"] = sleeps
            if tensor_parallel > 1:
                arguments["distributed_executor_backend"] = executor
        if worker_extension is not None:
            # Importing this class registers the transport's receiver with vLLM, under the same path.
            arguments["worker_extension_cls"] = worker_extension
            arguments["weight_transfer_config"] = {"backend": worker_extension}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
            self._llm = LLM(**{**arguments, **engine.args})
        self._max_model_len = self._llm.model_config.max_model_len
        self._llm.update_weight_version(str(UNPUSHED))

    @property
    def version(self) -> int:
        """Policy version of the weights in use; ``UNPUSHED`` before the first push."""
        return int(self._llm.get_weight_version())

    def generate(
        self, prompts: Sequence[Prompt], *, sampling: SamplingConfig, candidates: int, seeds: Sequence[int]
    ) -> list[CompletionGroup]:
        """Generate completions, one group per prompt, in the order of ``prompts``.

        Args:
            sampling: a stop string is not part of the text, but ``token_ids`` end with the token that completed it.
            candidates: completions per prompt.
            seeds: one per prompt; the i-th completion of a prompt uses its seed + i.

        Raises:
            ValueError: a prompt leaves no room for ``sampling.max_tokens``.
            RuntimeError: a weight update is unfinished, or the engine sleeps.
        """
        self._require_ready()
        longest = self._max_model_len - sampling.max_tokens
        for prompt in prompts:
            if (length := len(prompt.token_ids)) > longest:
                raise ValueError(
                    f"prompt {prompt.index} has {length} tokens; an engine of {self._max_model_len} tokens takes "
                    f"at most {longest} beside {sampling.max_tokens} new ones; raise online.engine.max_model_len, or "
                    "lower data.max_prompt_tokens to drop such prompts"
                )
        if not prompts:
            return []
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts],
            [_sampling_params(sampling, candidates, seed) for seed in seeds],
            use_tqdm=False,
        )
        return [
            _completion_group(prompt, output, seed)
            for prompt, output, seed in zip(prompts, outputs, seeds, strict=True)
        ]

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """The model's log-probability of each token after the first, nats; sampling settings do not affect it."""
        from vllm import SamplingParams

        self._require_ready()
        (output,) = self._llm.generate(
            [{"prompt_token_ids": list(token_ids)}],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        prompt_logprobs: Any = output.prompt_logprobs  # requested, so only its first entry is None
        return [logps[token].logprob for token, logps in zip(token_ids[1:], prompt_logprobs[1:], strict=True)]

    def sleep(self) -> None:
        """Free the GPU for the process that shares it: weights move to host memory, the key-value cache is dropped."""
        if not self._asleep:
            # Level 2 would drop the weights, and an engine that wakes without a push would generate gibberish.
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Move the weights back to the GPU and allocate the cache; does nothing if awake."""
        self._require_no_open_update()
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Pass the transport's initialization info to the receiver in every worker."""
        self._llm.init_weight_transfer_engine({"init_info": info})

    def start_update(self) -> None:
        """Start a weight update; the engine cannot generate until it is finished.

        A sleeping engine is woken: its weights here, its cache in ``finish_update``.

        Raises:
            RuntimeError: an update is unfinished. Some layers are half loaded, so the engine must be replaced.
        """
        self._require_no_open_update()
        self._update_open = True
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.start_weight_update()

    def load(self, bucket: Any) -> None:
        """Pass one message of the transport to the receiver in every worker."""
        self._llm.update_weights({"update_info": {"bucket": bucket}})

    def finish_update(self, version: int) -> str:
        """Switch to the received weights and drop all keys and values computed with the old ones.

        Returns:
            The transport's digest of the weights received since ``start_update``.

        Raises:
            RuntimeError: the workers received different weights, or vLLM did not drop its prefix cache.
        """
        self._llm.finish_weight_update(weight_version=str(version))
        digests = set(self._llm.collective_rpc("received_digest"))
        if len(digests) != 1:
            raise RuntimeError(f"the workers of one engine received different weights: digests {sorted(digests)}")
        if self._asleep:
            # The cache is allocated only now: during the transfer the sender's buckets need the memory.
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        # vLLM keeps its prefix cache over an update: known prompts would reuse keys and values of the old weights.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(f"vLLM did not drop its prefix cache after the push of version {version}")
        self._update_open = False
        return digests.pop()

    def close(self) -> None:
        """Shut vLLM down."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _require_ready(self) -> None:
        self._require_no_open_update()
        if self._asleep:
            raise RuntimeError("this engine sleeps: it has neither weights nor a cache on its GPU until it wakes up")

    def _require_no_open_update(self) -> None:
        if self._update_open:
            raise RuntimeError(
                f"a weight update after version {self.version} was started and not finished: "
                "this engine holds parts of two policies and must be replaced"
            )


def engine_environment(engine: EngineConfig, *, on_cpu: bool, threads: int) -> dict[str, str]:
    """Environment variables that a process needs before it imports torch and builds a ``VLLMEngine``."""
    environment = {
        # The scheduler stays in this process: buckets reach it without a copy, and no process outlives it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    if on_cpu:
        # By default, all engines of a node bind their threads to the same cores.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if is_eager(engine, on_cpu=on_cpu):
            # vLLM compiles small functions even in eager mode; the first probe would wait 20 s for a C++ compiler.
            environment["TORCH_COMPILE_DISABLE"] = "1"
    return environment


def is_eager(engine: EngineConfig, *, on_cpu: bool) -> bool:
    """``online.engine.enforce_eager``, with null resolved."""
    return on_cpu if engine.enforce_eager is None else engine.enforce_eager


def _sampling_params(sampling: SamplingConfig, candidates: int, seed: int) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=candidates, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY, **sampling.model_dump(mode="json")
    )


def _completion_group(prompt: Prompt, output: "RequestOutput", seed: int) -> CompletionGroup:
    outputs: list[Any] = output.outputs  # finished, so vLLM's optional fields are set
    assert output.prompt_token_ids is not None
    versions = {int(span.version) for completion in outputs for span in completion.weight_versions}
    if len(versions) != 1:
        raise RuntimeError(f"prompt {prompt.index} was completed with several policy versions: {sorted(versions)}")
    return CompletionGroup(
        prompt=prompt,
        prompt_token_ids=tuple(output.prompt_token_ids),
        completions=tuple(
            Completion(completion.text, tuple(completion.token_ids), finished=completion.finish_reason == "stop")
            for completion in outputs
        ),
        policy_version=versions.pop(),
        seed=seed,
    )

"""The rollout engine of vLLM, running inside the process that builds it.

Owns how vLLM is set up, asked and updated. Knows nothing of Ray, and of a weight transport only the import path of its
receiving end, which vLLM loads in its own workers. vLLM is imported when an engine is built, so that whoever prepares
the engine's process can ask for its environment without it.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpo_ray.config.schema import EngineConfig, SamplingConfig
from dpo_ray.rollout.engine import UNPUSHED, Render
from dpo_ray.types import Completion, CompletionGroup, Prompt

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

CPU_BATCH_TOKENS = 4096
"""Prompt tokens that one step takes in on a CPU."""


class VLLMEngine:
    """vLLM behind the ``Engine`` contract: ``vllm.LLM`` with its scheduler in this process.

    The process needs ``engine_environment`` in its environment before it imports torch or vLLM.

    Args:
        model_path: hub id or Hugging Face directory.
        render: conversation to prompt tokens.
        dtype: compute dtype, ``bfloat16`` or ``float32``; a CPU that cannot multiply bfloat16 holds the weights, as
            rounded as they are, in float32.
        engine: vLLM's settings; ``engine.args`` goes to ``vllm.LLM`` last and overrides everything here.
        max_model_len: longest prompt plus completion, in tokens.
        tensor_parallel: GPUs of this engine. Always 1 on a CPU.
        executor: who runs the workers of several GPUs. ``ray``: Ray, in the placement group that this process belongs
            to. ``mp``: processes on the GPUs that this process sees.
        sleeps: whether the engine takes turns on its GPUs with another process: then it can ``sleep``.
        worker_extension: ``WeightSync.worker_extension``, the dotted import path of the transport's class in vLLM's
            workers; None for an engine that never gets new weights. Importing the class registers the transport's
            receiving end with vLLM under the same path, and its ``received_digest()`` is the digest of what arrived.
        on_cpu: whether this is the CPU build of vLLM.
        seed: seeds whatever is not seeded by request.
    """

    def __init__(
        self,
        model_path: str,
        *,
        render: Render,
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

        self._render = render
        self._update_open = self._asleep = False
        arguments: dict[str, Any] = {
            "model": model_path,
            "dtype": _fast_dtype(dtype) if on_cpu else dtype,
            "max_model_len": max_model_len,
            "seed": seed,
            "enforce_eager": is_eager(engine, on_cpu=on_cpu),
            "enable_prefix_caching": True,
            # "vllm" leaves the model's own temperature and nucleus out; its end-of-turn tokens still count.
            "generation_config": "vllm",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if on_cpu:
            arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
            # A seeded request whose prompt is split over two steps fails on a CPU, whose generators have no offset.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(max_model_len, CPU_BATCH_TOKENS)
        else:
            arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
            arguments["tensor_parallel_size"] = tensor_parallel
            arguments["enable_sleep_mode"] = sleeps
            if tensor_parallel > 1:
                arguments["distributed_executor_backend"] = executor
        if worker_extension is not None:
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
        """Completions of each prompt; see ``Engine.generate``."""
        self._require_ready()
        if sampling.temperature == 0 and candidates > 1:
            raise ValueError(
                f"temperature 0 would write the same completion {candidates} times; "
                "ask for one candidate, or set online.sampling.temperature above 0"
            )
        prompt_tokens = [self._render(prompt.messages) for prompt in prompts]
        longest = self._max_model_len - sampling.max_tokens
        for prompt, tokens in zip(prompts, prompt_tokens, strict=True):
            if len(tokens) > longest:
                raise ValueError(
                    f"prompt {prompt.index} has {len(tokens)} tokens; an engine of {self._max_model_len} tokens takes "
                    f"at most {longest} beside {sampling.max_tokens} new ones; raise online.engine.max_model_len, or "
                    "lower data.max_prompt_tokens to drop such prompts"
                )
        if not prompts:
            return []
        outputs = self._llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompt_tokens],
            [_sampling_params(sampling, candidates, seed) for seed in seeds],
            use_tqdm=False,
        )
        return [_group(prompt, output, seed) for prompt, output, seed in zip(prompts, outputs, seeds, strict=True)]

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability in nats of each token after the first; see ``Engine.token_logps``."""
        from vllm import SamplingParams

        self._require_ready()
        (output,) = self._llm.generate(
            [{"prompt_token_ids": list(token_ids)}],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        prompt_logprobs: Any = output.prompt_logprobs  # asked for, so neither it nor an entry after the first is None
        after_the_first = zip(token_ids[1:], prompt_logprobs[1:], strict=True)
        return [logprobs[token].logprob for token, logprobs in after_the_first]

    def sleep(self) -> None:
        """Give the GPU up; see ``Engine.sleep``."""
        if not self._asleep:
            # Level 2 would drop the weights, and an engine that wakes without a push would write gibberish.
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Take the GPU again; see ``Engine.wake``."""
        self._require_whole_update()
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Hand ``info`` to the transport's receiving end in every worker."""
        self._llm.init_weight_transfer_engine({"init_info": info})

    def start_update(self) -> None:
        """Open a weight update; see ``Engine.start_update``."""
        self._require_whole_update()
        self._update_open = True
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.start_weight_update()

    def load(self, bucket: Any) -> None:
        """Hand one message to the transport's receiving end in every worker."""
        self._llm.update_weights({"update_info": {"bucket": bucket}})

    def finish_update(self, version: int) -> str:
        """Put the received weights to use; see ``Engine.finish_update``."""
        self._llm.finish_weight_update(weight_version=str(version))
        digests = set(self._llm.collective_rpc("received_digest"))
        if len(digests) != 1:
            raise RuntimeError(f"the workers of one engine received different weights: digests {sorted(digests)}")
        if self._asleep:
            # Only now: while weights travel, the sender's buckets need the room.
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        # vLLM keeps its cache over an update: prompts it has seen would go on with keys and values of the old weights.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(f"vLLM did not drop its prefix cache after the push of version {version}")
        self._update_open = False
        return digests.pop()

    def close(self) -> None:
        """Shut vLLM down."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _require_ready(self) -> None:
        self._require_whole_update()
        if self._asleep:
            raise RuntimeError("this engine sleeps: it has neither weights nor a cache on its GPU until it is woken")

    def _require_whole_update(self) -> None:
        if self._update_open:
            raise RuntimeError(
                f"a weight update after version {self.version} was started and not finished: "
                "this engine holds parts of two policies and has to be replaced"
            )


def engine_environment(engine: EngineConfig, *, on_cpu: bool, threads: int) -> dict[str, str]:
    """Environment variables that a process needs before it imports torch and builds a ``VLLMEngine``.

    Args:
        engine: vLLM's settings, as the engine gets them.
        on_cpu: whether the process runs the CPU build of vLLM.
        threads: CPU threads of the engine.
    """
    environment = {
        # The scheduler stays in this process: buckets reach it without a copy, and no process is left behind.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    if on_cpu:
        # Left to itself, every engine of a node binds its threads to the same cores.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if is_eager(engine, on_cpu=on_cpu):
            # vLLM compiles small functions even so; the first probe would wait 20 s for a C++ compiler.
            environment["TORCH_COMPILE_DISABLE"] = "1"
    return environment


def is_eager(engine: EngineConfig, *, on_cpu: bool) -> bool:
    """``online.engine.enforce_eager`` with null decided."""
    return on_cpu if engine.enforce_eager is None else engine.enforce_eager


def _fast_dtype(dtype: str) -> str:
    """Without the instructions, torch multiplies bfloat16 on a CPU at a hundredth of its float32 rate."""
    import torch

    return dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def _sampling_params(sampling: SamplingConfig, candidates: int, seed: int) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=candidates,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _group(prompt: Prompt, output: "RequestOutput", seed: int) -> CompletionGroup:
    outputs: list[Any] = output.outputs  # finished, so the fields that vLLM calls optional are set
    assert output.prompt_token_ids is not None
    versions = {int(span.version) for completion in outputs for span in completion.weight_versions}
    if len(versions) != 1:
        raise RuntimeError(f"prompt {prompt.index} was completed by several policies: versions {sorted(versions)}")
    return CompletionGroup(
        prompt=prompt,
        prompt_token_ids=tuple(output.prompt_token_ids),
        completions=tuple(
            Completion(
                text=completion.text,
                token_ids=tuple(completion.token_ids),
                finished=completion.finish_reason == "stop",
            )
            for completion in outputs
        ),
        policy_version=versions.pop(),
        seed=seed,
    )

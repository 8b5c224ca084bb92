"""The rollout engine: vLLM, fed and stepped by a thread of its own.

Independent of Ray. vLLM is imported when an engine is built, so ``engine_environment`` works without it.
"""

import asyncio
import pickle
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dpo_ray.config.rounds import EngineConfig, SamplingConfig
from dpo_ray.rollout.engine import UNPUSHED, EngineStatus, Request
from dpo_ray.rollout.stepping import Call, EngineFailed, Job, Serving, Stepper
from dpo_ray.rollout.vllm_requests import Statistics, completion_group, prompt_logps, rejections, sampling_params
from dpo_ray.types import CompletionGroup, Prompt

if TYPE_CHECKING:
    from vllm import SamplingParams

CPU_BATCH_TOKENS = 4096
"""Minimum limit of prompt tokens per step on a CPU."""
CLOSE_S = 30.0
"""Seconds to wait for the step in progress when an engine is closed."""
FIRST = -1
"""vLLM's priority of what goes before the requests of rounds, whose priority is their round: lower values go first."""


class VLLMEngine:
    """``vllm.LLM`` behind the ``Engine`` protocol.

    One thread owns vLLM. Coroutines hand it requests, which join the running batch at the next step, and calls, which
    run between two steps. The process needs ``engine_environment`` in its environment before it imports torch or vLLM.

    Args:
        model_path: hub id or Hugging Face directory.
        engine: vLLM's settings; ``engine.args`` override every other argument of ``vllm.LLM``.
        max_model_len: longest prompt plus completion, in tokens.
        drain_updates: True if a weight update waits for all running requests; False if it waits for evaluation requests
            only and the others continue with the new weights, their keys and values computed again.
        tensor_parallel: GPUs of this engine; 1 on a CPU.
        executor: ``ray`` runs the workers of several GPUs in this process's placement group, ``mp`` on the GPUs visible
            to this process.
        sleeps: True for an engine that shares its GPUs with another process.
        worker_extension: ``WeightSync.worker_extension``; None for an engine that never gets new weights.
        on_cpu: True for the CPU build of vLLM.
        on_failure: called on the engine's thread if vLLM fails; every later call raises the exception.

    Example:
        await engine.start_update()
        for message in messages:
            await engine.load(message)
        digest = await engine.finish_update(version=3)
        await engine.serve()
        group = await engine.generate(request)   # last_version 3
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        engine: EngineConfig,
        max_model_len: int,
        drain_updates: bool = True,
        tensor_parallel: int = 1,
        executor: str = "ray",
        sleeps: bool = False,
        worker_extension: str | None = None,
        on_cpu: bool,
        seed: int = 0,
        on_failure: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        from vllm import LLM
        from vllm.v1.engine.core_client import InprocClient
        from vllm.v1.engine.exceptions import EngineDeadError

        self._update_open = self._unproven = self._asleep = False
        self._drain_updates = drain_updates
        self._version = UNPUSHED
        arguments: dict[str, Any] = {
            "model": model_path,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "seed": seed,
            "enforce_eager": is_eager(engine, on_cpu=on_cpu),
            "enable_prefix_caching": True,
            "scheduling_policy": "priority",
            # "vllm" ignores temperature and nucleus of the model's generation config, but not its end-of-turn tokens.
            "generation_config": "vllm",
            "disable_log_stats": False,
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
        core: Any = self._llm.llm_engine
        self._statistics = core.logger_manager = Statistics()
        self._in_process = isinstance(core.engine_core, InprocClient)
        self._guards = (
            [] if self._in_process else [guard(p.pid) for p in core.engine_core.resources.engine_manager.processes]
        )
        self._max_model_len = self._llm.model_config.max_model_len
        self._max_sequences = core.vllm_config.scheduler_config.max_num_seqs
        self._llm.update_weight_version(str(UNPUSHED))
        self._stepper = Stepper(core, fatal=(EngineDeadError,), on_failure=on_failure)

    async def generate(self, request: Request) -> CompletionGroup:
        """Complete a prompt; see ``Engine.generate``.

        A stop string is not part of the text, but ``token_ids`` end with the token that completed it. While the engine
        sleeps or is updated, requests wait.
        """
        prompt, sampling = request.prompt, request.sampling
        self._require_room(prompt, sampling)
        params = sampling_params(request)
        return await self._submit(
            Job(
                add=self._adder(prompt.token_ids, params, FIRST if request.evaluation else request.round),
                read=partial(completion_group, prompt, request.seed),
                sequences=request.candidates,
                pinned=request.evaluation,
                deadline_s=request.deadline_s,
            )
        )

    async def status(self) -> EngineStatus:
        """The engine's status; answers at once, also during a long step.

        Raises:
            EngineFailed: vLLM failed, or its engine process died.
        """
        if self._stepper.error is not None:
            raise self._stepper.error
        core: Any = self._llm.llm_engine.engine_core
        if not self._in_process and core.resources.engine_dead:
            raise EngineFailed("vLLM's engine process died")  # a step in progress would wait for it forever
        progress, statistics = self._stepper.progress, self._statistics
        running = min(statistics.running, progress.running)
        return EngineStatus(
            version=self._version,
            running=running,
            waiting=progress.running - running + progress.held,
            generated_tokens=statistics.generated_tokens,
            busy_s=progress.busy_s,
            step_s=0.0 if progress.step_started is None else time.monotonic() - progress.step_started,
            cache_hit_rate=statistics.cache_hits / max(statistics.cache_queries, 1),
            max_sequences=self._max_sequences,
        )

    async def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """The model's log-probability of each token after the first, nats; sampling settings do not affect it.

        Raises:
            RuntimeError: a weight update is unfinished, or the engine sleeps.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        await self._call(self._require_ready)
        return await self._submit(
            Job(
                add=self._adder(token_ids, params, FIRST),
                read=partial(prompt_logps, tuple(token_ids)),
                pinned=True,
                proof=True,
            )
        )

    async def abort(self) -> None:
        """Abort all requests; see ``Engine.abort``."""
        await self._call(self._stepper.abort, urgent=True)

    async def start_update(self) -> None:
        """Start a weight update; see ``Engine.start_update``.

        A sleeping engine is woken: its weights here, its cache in ``finish_update``.
        """
        await self._call(self._start_update, drains=lambda job: job.pinned or self._drain_updates, serves=Serving.NONE)

    async def init_transfer(self, info: Mapping[str, Any]) -> None:
        """Pass the transport's initialization info to the receiver in every worker."""
        await self._call(lambda: self._llm.init_weight_transfer_engine({"init_info": dict(info)}))

    async def load(self, message: Any) -> None:
        """Pass one message of the transport to the receiver in every worker."""
        await self._call(lambda: self._load(message))

    async def finish_update(self, version: int) -> str:
        """Switch to the received weights and drop all keys and values computed with the old ones.

        Until ``serve``, only ``token_logps`` is answered.

        Returns:
            The transport's digest of the weights received since ``start_update``.

        Raises:
            ValueError: parameters got no weights. The update stays open: start it again.
            RuntimeError: the workers received different weights.
        """
        return await self._call(lambda: self._finish_update(version), serves=Serving.PROOFS)

    async def serve(self) -> None:
        """Complete prompts with the weights of ``finish_update``.

        Raises:
            RuntimeError: a weight update is unfinished, or the engine sleeps.
        """
        await self._call(self._serve, serves=Serving.ALL)

    async def sleep(self) -> None:
        """Free the GPU for the process that shares it, once the running requests are done.

        Weights move to host memory, the key-value cache is dropped.
        """
        await self._call(self._sleep, drains=lambda job: True, serves=Serving.NONE)

    async def wake(self) -> None:
        """Move the weights back to the GPU and allocate the cache; does nothing if awake.

        Raises:
            RuntimeError: a weight update is unfinished, or ``serve`` has not been called after it.
        """
        await self._call(self._wake, serves=Serving.ALL)

    def close(self) -> None:
        """Shut vLLM down; requests in progress get an exception."""
        self._stepper.close(CLOSE_S)
        self._llm.llm_engine.engine_core.shutdown()
        for process in self._guards:
            process.kill()
            process.wait()
        del self._llm

    # -------------------------------------------------------------------------------------- on the engine's thread

    def _adder(self, token_ids: Sequence[int], params: "SamplingParams", priority: int) -> Callable[[str], Any]:
        def add(request_id: str) -> None:
            with rejections():
                self._llm.llm_engine.add_request(request_id, prompt, params, priority=priority)

        prompt: Any = {"prompt_token_ids": list(token_ids)}
        return add

    def _start_update(self) -> None:
        if self._update_open:
            self._llm.collective_rpc("abandon_update")
        elif self._asleep:
            self._llm.wake_up(tags=["weights"])
        else:
            self._llm.sleep(level=0, mode="keep")  # an engine process would continue to step
        self._update_open, self._unproven = True, False
        self._llm.start_weight_update()

    def _load(self, message: Any) -> None:
        # vLLM's own encoding loses the types of records and tuples on the way to its engine process.
        bucket = message if self._in_process else pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._llm.update_weights({"update_info": {"bucket": bucket}})

    def _finish_update(self, version: int) -> str:
        self._llm.finish_weight_update()
        digests = set(self._llm.collective_rpc("received_digest"))
        if len(digests) != 1:
            raise RuntimeError(f"the workers of one engine received different weights: digests {sorted(digests)}")
        self._llm.update_weight_version(str(version))
        if self._asleep:
            # The cache is allocated only now: during the transfer the sender's buckets need the memory.
            self._llm.wake_up(tags=["kv_cache"])
        # vLLM keeps its prefix cache over an update: known prompts would reuse keys and values of the old weights.
        # Running requests are preempted, so theirs are computed again.
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError(f"vLLM did not drop its prefix cache after the update to version {version}")
        self._llm.wake_up(tags=["scheduling"])
        self._update_open = self._asleep = False
        self._unproven = True
        self._version = version
        return digests.pop()

    def _serve(self) -> None:
        self._require_ready()
        self._unproven = False

    def _sleep(self) -> None:
        self._require_serving()
        if not self._asleep:
            # Level 2 would drop the weights, and an engine that wakes without an update would generate gibberish.
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        self._require_serving()
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _require_ready(self) -> None:
        self._require_no_open_update()
        if self._asleep:
            raise RuntimeError("this engine sleeps: it has neither weights nor a cache on its GPU until it wakes up")

    def _require_serving(self) -> None:
        self._require_no_open_update()
        if self._unproven:
            raise RuntimeError(f"this engine does not serve version {self._version} yet")

    def _require_no_open_update(self) -> None:
        if self._update_open:
            raise RuntimeError(f"the weight update after version {self._version} is not finished")

    # --------------------------------------------------------------------------------------------- on any thread

    async def _submit(self, work: Job | Call) -> Any:
        return await asyncio.wrap_future(self._stepper.submit(work))

    async def _call(self, run: Callable[[], Any], **conditions: Any) -> Any:
        return await self._submit(Call(run, **conditions))

    def _require_room(self, prompt: Prompt, sampling: SamplingConfig) -> None:
        longest = self._max_model_len - sampling.max_tokens
        if (length := len(prompt.token_ids)) > longest:
            raise ValueError(
                f"prompt {prompt.index} has {length} tokens; an engine of {self._max_model_len} tokens takes "
                f"at most {longest} beside {sampling.max_tokens} new ones; raise online.engine.max_model_len, or "
                "lower data.max_prompt_tokens to drop such prompts"
            )


def engine_environment(engine: EngineConfig, *, on_cpu: bool, threads: int) -> dict[str, str]:
    """Environment variables that a process needs before it imports torch and builds a ``VLLMEngine``."""
    environment = {
        # On a CPU vLLM runs in this process: buckets reach it without a copy. On a GPU its own process keeps scheduling
        # while this one converts text.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if on_cpu else "1",
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


def guard(pid: int) -> "subprocess.Popen[bytes]":
    """Start a process that kills another one when this one ends, even by SIGKILL: vLLM's would keep its GPU forever."""
    # The guard reads until the end of its input, which this process holds open; its session is out of reach of Ctrl-C.
    command = ["sh", "-c", 'cat >/dev/null; kill -9 "$0"', str(pid)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def is_eager(engine: EngineConfig, *, on_cpu: bool) -> bool:
    """``online.engine.enforce_eager``, with null resolved."""
    return on_cpu if engine.enforce_eager is None else engine.enforce_eager

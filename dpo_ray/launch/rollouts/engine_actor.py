"""One vLLM engine as an async Ray actor. Light to import, for the fleet: vLLM is imported when an engine is built."""

import logging
import os
import time
from typing import Any

from dpo_ray.config import Config
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.rollout.vllm_engine import VLLMEngine

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""Seconds for the exceptions of requests in progress to reach their callers before the process exits."""


class EngineActor(VLLMEngine):
    """One engine in its own process, which exits if vLLM fails. Methods are coroutines; see ``Engine``."""

    def __init__(
        self, config: dict[str, Any], index: int, *, on_cpu: bool, executor: str, worker_extension: str
    ) -> None:
        parsed = Config.model_validate(config)
        log_to_run(parsed.run.path, f"engine-{index}")
        assert parsed.online is not None
        super().__init__(
            parsed.model.path,
            dtype=parsed.model.dtype,
            engine=parsed.online.engine,
            max_model_len=parsed.max_model_len,
            drain_updates=parsed.online.max_lag == 0,
            tensor_parallel=1 if on_cpu else parsed.cluster.gpus_per_engine,
            executor=executor,
            sleeps=parsed.cluster.colocate,
            worker_extension=worker_extension,
            on_cpu=on_cpu,
            seed=parsed.run.seed,
            on_failure=_exit,
        )


def _exit(error: Exception) -> None:
    logger.error("%s; this engine's process exits", error, exc_info=error)
    time.sleep(GRACE_S)
    os._exit(1)  # from a thread, sys.exit would end the thread only

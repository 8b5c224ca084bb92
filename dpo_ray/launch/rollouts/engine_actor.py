"""One vLLM engine as a Ray actor. Light to import, for the pool: vLLM is imported when an engine is built."""

from typing import Any

from dpo_ray.config import Config
from dpo_ray.launch.run_dir import log_to_run
from dpo_ray.rollout.vllm_engine import VLLMEngine
from dpo_ray.types import CompletionGroup, Prompt


class EngineActor(VLLMEngine):
    """One engine in its own process. Calls run one at a time, in order."""

    def __init__(
        self, config: dict[str, Any], index: int, *, on_cpu: bool, executor: str, worker_extension: str
    ) -> None:
        parsed = Config.model_validate(config)
        log_to_run(parsed.run.path, f"engine-{index}")
        assert parsed.online is not None
        self.sampling = parsed.online.sampling
        super().__init__(
            parsed.model.path,
            dtype=parsed.model.dtype,
            engine=parsed.online.engine,
            max_model_len=parsed.max_model_len,
            tensor_parallel=1 if on_cpu else parsed.cluster.gpus_per_engine,
            executor=executor,
            sleeps=parsed.cluster.colocate,
            worker_extension=worker_extension,
            on_cpu=on_cpu,
            seed=parsed.run.seed,
        )

    def ready(self) -> None:
        """Returns once the engine is up."""

    def generate(  # pyrefly: ignore
        self, prompts: list[Prompt], seeds: list[int], candidates: int
    ) -> list[CompletionGroup]:
        """One group per prompt, in order."""
        return super().generate(prompts, sampling=self.sampling, candidates=candidates, seeds=seeds)

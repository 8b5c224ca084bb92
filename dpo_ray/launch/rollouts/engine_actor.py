"""One vLLM engine as a Ray actor. Light to import, for the pool: vLLM is imported when an engine is built."""

from typing import Any

from dpo_ray.config import Config
from dpo_ray.launch.process_logs import log_to_run
from dpo_ray.rollout.vllm_engine import VLLMEngine
from dpo_ray.types import CompletionGroup, Prompt


class EngineActor:
    """One engine in its own process. Calls run one at a time, in order."""

    def __init__(
        self, config: dict[str, Any], index: int, *, on_cpu: bool, executor: str, worker_extension: str
    ) -> None:
        self.config = Config.model_validate(config)
        log_to_run(self.config.run.path, f"engine-{index}")
        from dpo_ray.data.tokenize import load_tokenizer, render_prompt

        online = self.config.online
        assert online is not None
        tokenizer = load_tokenizer(self.config.model.path, self.config.model.chat_template)
        self.engine = VLLMEngine(
            self.config.model.path,
            render=lambda messages: list(render_prompt(messages, tokenizer)),
            dtype=self.config.model.dtype,
            engine=online.engine,
            max_model_len=self.config.max_model_len,
            tensor_parallel=1 if on_cpu else self.config.cluster.gpus_per_engine,
            executor=executor,
            sleeps=self.config.cluster.colocate,
            worker_extension=worker_extension,
            on_cpu=on_cpu,
            seed=self.config.run.seed,
        )

    def ready(self) -> None:
        """Returns once the engine is up."""

    def generate(self, prompts: list[Prompt], seeds: list[int], candidates: int) -> list[CompletionGroup]:
        """One group per prompt, in order."""
        online = self.config.online
        assert online is not None
        return self.engine.generate(prompts, sampling=online.sampling, candidates=candidates, seeds=seeds)

    def token_logps(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token after the first, nats."""
        return self.engine.token_logps(token_ids)

    def sleep(self) -> None:
        """Frees the GPU memory."""
        self.engine.sleep()

    def wake(self) -> None:
        """Allocates the GPU memory again."""
        self.engine.wake()

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Initializes the receiving end of the weight transport."""
        self.engine.init_transfer(info)

    def start_update(self) -> None:
        """Begins a weight update."""
        self.engine.start_update()

    def load(self, bucket: Any) -> None:
        """Loads one bucket of weights."""
        self.engine.load(bucket)

    def finish_update(self, version: int) -> str:
        """Switches to the received weights; returns their digest."""
        return self.engine.finish_update(version)

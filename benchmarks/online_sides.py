"""The other sides of ``benchmarks.online``: TRL's OnlineDPOTrainer, and vLLM without an engine around it."""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.online import LENGTH, PROMPTS
from dpo_ray.config.rounds import EngineConfig, SamplingConfig
from dpo_ray.config.schema import DataConfig
from dpo_ray.data.examples import load_prompts
from dpo_ray.data.tokenize import RecordTokenizer
from dpo_ray.data.tokenizer import load_tokenizer
from dpo_ray.rollout.engine import Request
from dpo_ray.rollout.vllm_engine import VLLMEngine, engine_environment
from dpo_ray.rollout.vllm_requests import sampling_params
from dpo_ray.types import Prompt

MICRO_BATCH = 8


def demo_prompts(model: str, count: int) -> list[Prompt]:
    """The first prompts of the demo."""
    tokenizer = RecordTokenizer(load_tokenizer(model), DataConfig(max_prompt_tokens=256))
    return load_prompts([str(PROMPTS)], tokenizer, strict=False)[0][:count]


def trl(model: str, prompts: int, rounds: int, repeat: int, settings: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """Seconds of each optimizer step after the first: generation, rewards and the update of ``prompts`` prompts.

    Args:
        settings: of OnlineDPOConfig, beyond those that make the work equal.
        bf16: compute in bfloat16.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    class Clock(TrainerCallback):
        """Times optimizer steps."""

        def __init__(self) -> None:
            self.began, self.seconds = 0.0, list[float]()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    records = [{"prompt": list(map(dict, p.messages))} for p in demo_prompts(model, prompts)] * rounds
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = OnlineDPOConfig(
            output_dir=folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=prompts // MICRO_BATCH,
            max_steps=rounds,
            learning_rate=1e-6,
            max_new_tokens=LENGTH["max_tokens"],
            generation_kwargs={"min_new_tokens": LENGTH["min_tokens"]},
            temperature=1.0,
            missing_eos_penalty=None,
            use_vllm=False,
            bf16=bf16,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            dataloader_drop_last=True,
            **settings,
        )
        trainer = OnlineDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            reward_funcs=lambda prompts, completions, **_: [float(len(str(text))) for text in completions],
            args=arguments,
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    return {"seconds": clock.seconds[1:]}


def engine(model: str, prompts: int, rounds: int, repeat: int) -> dict[str, Any]:
    """Tokens per second of the same requests, bare and through the engine; the first pair warms up."""
    os.environ.update(engine_environment(EngineConfig(), on_cpu=True, threads=1))
    sampling = SamplingConfig(**LENGTH)
    ours = VLLMEngine(model, dtype="bfloat16", engine=EngineConfig(), max_model_len=512, on_cpu=True)
    llm = ours._llm

    def bare(requests: list[Request]) -> None:
        ids: Any = [{"prompt_token_ids": list(request.prompt.token_ids)} for request in requests]
        llm.generate(ids, list(map(sampling_params, requests)), use_tqdm=False)

    def through_engine(requests: list[Request]) -> None:
        async def all_at_once() -> None:
            await asyncio.gather(*map(ours.generate, requests))

        asyncio.run(all_at_once())

    def rate(run: Callable[[list[Request]], None], requests: list[Request]) -> float:
        llm.reset_prefix_cache()
        started = time.perf_counter()
        run(requests)
        return 2 * LENGTH["max_tokens"] * len(requests) / (time.perf_counter() - started)

    pairs = []
    for repetition in range(repeat + 1):
        seeds = range(1000 * repetition, 1000 * repetition + 64)
        batch = [Request(p, sampling, 2, s, 3600) for p, s in zip(demo_prompts(model, 64), seeds, strict=True)]
        first, second = (bare, through_engine) if repetition % 2 else (through_engine, bare)
        rates = {run: rate(run, batch) for run in (first, second)}
        pairs.append((rates[bare], rates[through_engine]))
    ours.close()
    return {"pairs": pairs[1:]}


if __name__ == "__main__":
    print(json.dumps({"trl": trl, "engine": engine}[sys.argv[1]](**json.loads(sys.argv[2]))))

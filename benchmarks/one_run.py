"""One run of one side of the comparison, in a process of its own: ``python -m benchmarks.one_run SIDE TASK FOLDER``."""

import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks.flops import Shape, step_flops
from dpo_ray.objective.precision import PATHS, ProductPath, rounded_inputs


def ours(task: dict[str, Any], folder: Path, clock: "_Clock | None" = None) -> dict[str, float]:
    """The training loop of a worker of ``jobs.offline``, as the only rank."""
    import torch.distributed as dist

    from dpo_ray.config import Config
    from dpo_ray.data.store import prepare_pairs
    from dpo_ray.data.tokenize import load_record_tokenizer
    from dpo_ray.train.offline import train_offline

    config = Config.model_validate(
        {
            "run": {"dir": str(folder), "save_every": None, "export": False},
            "model": {"path": task["model"], "dtype": task["dtype"]},
            "reference": {"cache_dir": str(folder / "cache")},
            "data": {
                "train": task["file"],
                "shuffle": False,
                "max_prompt_tokens": None,
                "max_completion_tokens": None,
                "strings": "raw",
            },
            "optim": {
                "lr": 1e-6,
                "pairs_per_step": task["pairs_per_step"],
                "tokens_per_micro_batch": task["tokens_per_micro_batch"],
            },
        }
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    pairs = prepare_pairs(config.data.train, load_record_tokenizer(config), folder=folder / "data")
    clock = clock or _Clock()
    train_offline(config, pairs=pairs, held_out=None, device=torch.device("cpu"), reporter=clock)
    return {"reference_s": clock.reference_s, "train_s": clock.train_s, "loss": clock.loss}


PARTS = {
    "matrix products": {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"},
    "attention kernel": {"_scaled_dot_product_flash_attention_for_cpu"},
    "copies and casts": {"copy_", "cat", "fill_", "zero_"},
    "optimizer": {"_fused_adamw_", "linalg_vector_norm", "_foreach_norm", "_foreach_mul_"},
}
"""Operators of each part of a run; the others and Python are the rest."""


def parts(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``ours`` under the profiler: also the share of the time of pass and steps in each of ``PARTS``."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])

    class Profiled(_Clock):
        def phase(self, name: str, done: int = 0, total: int = 0) -> None:
            if name == "scoring" and name not in self.began:
                profiler.start()
            super().phase(name, done, total)

    result: dict[str, Any] = ours(task, folder, Profiled())
    profiler.stop()
    seconds = {part: 0.0 for part in PARTS}
    for event in profiler.key_averages():
        for part, names in PARTS.items():
            if event.key.removeprefix("aten::") in names:
                seconds[part] += event.self_cpu_time_total / 1e6
    whole = result["reference_s"] + result["train_s"]
    return result | {"parts": {part: spent / whole for part, spent in seconds.items()}}


class _Clock:
    """A Reporter that only measures time."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.reference_s = self.train_s = self.loss = 0.0

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        self.began.setdefault(name, time.perf_counter())

    def note(self, text: str) -> None: ...

    def start(self, step: int, round: int = 0) -> None:
        self.reference_s = time.perf_counter() - self.began["scoring"]

    def step(self, metrics: dict[str, Any]) -> None:
        self.train_s, self.loss = time.perf_counter() - self.began["training"], metrics["loss"]

    def round(self, metrics: dict[str, Any]) -> None: ...

    def evaluation(self, metrics: dict[str, Any]) -> None: ...

    def stop_requested(self) -> bool:
        return False


def trl(task: dict[str, Any], folder: Path) -> dict[str, float]:
    """TRL's DPOTrainer; all other settings are its defaults."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        reference_s = 0.0

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return super()._precompute_ref_logps(*args, **kwargs)
            finally:
                self.reference_s += time.perf_counter() - started

    settings = dict(task["trl"])
    micro_batch = settings.pop("micro_batch")
    records = [json.loads(line) for line in Path(task["file"]).read_text().splitlines()]
    trainer = Timed(
        model=task["model"],
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=task["pairs_per_step"] // micro_batch,
            num_train_epochs=1,
            learning_rate=1e-6,
            warmup_steps=0,
            use_cpu=True,
            bf16=task["dtype"] == "bfloat16",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    loss = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line][-1]
    return {"reference_s": trainer.reference_s, "train_s": seconds, "loss": loss}


def peak_gflops(shape: Shape, dtype: str, *, tokens: int = 1024, repeats: int = 9) -> float:
    """GFLOP/s of a model's matrix products on this process's threads, each on the fastest path for its shape.

    Covers the linear layers with ``tokens`` tokens and the head with half as many, weighted by their operations.
    """
    hidden, layers, heads, key_heads, intermediate, vocabulary = shape
    key_size = hidden // heads * key_heads
    projections = [(hidden, hidden)] * 2 + [(hidden, key_size)] * 2 + [(hidden, intermediate)] * 3
    products = [(tokens, *sizes, layers) for sizes in projections] + [(tokens // 2, hidden, vocabulary, 1)]
    operations = seconds = 0.0
    known: dict[tuple[int, ...], float] = {}
    for n, inputs, outputs, count in products:
        if (n, inputs, outputs) not in known:
            known[n, inputs, outputs] = min(
                _median_seconds(n, inputs, outputs, path, repeats)
                for path in (PATHS if dtype == "bfloat16" else PATHS[:1])
            )
        operations += 2 * n * inputs * outputs * count
        seconds += known[n, inputs, outputs] * count
    return operations / seconds / 1e9


def _median_seconds(tokens: int, inputs: int, outputs: int, path: ProductPath, repeats: int) -> float:
    dtype = torch.bfloat16 if path == "bfloat16" else torch.float32
    x, weight = torch.randn(tokens, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    seconds = []
    with rounded_inputs(path):
        for _ in range(repeats + 1):
            started = time.perf_counter()
            x @ weight.t()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    """Run one side and write its results."""
    side, task, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(task["threads"])
    shape = Shape.of(AutoConfig.from_pretrained(task["model"]))
    started = time.process_time()
    result: dict[str, Any] = {"ours": ours, "parts": parts, "trl": trl}[side](task, folder)
    result["cpu_s"] = time.process_time() - started
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    useful, _ = step_flops(shape, np.array(task["lengths"]))
    result |= {
        "peak_gflops": peak_gflops(shape, task["dtype"]),  # last, as its tensors would count as memory of the run
        "useful_gflops": useful / result["train_s"] / 1e9,
        "reference_gflops": useful / 3 / result["reference_s"] / 1e9 if result["reference_s"] else 0.0,
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

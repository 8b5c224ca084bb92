"""One run of one side of the comparison, in a process of its own: ``python -m benchmarks.one_run SIDE TASK FOLDER``."""

import contextlib
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
from dpo_ray.objective.precision import bfloat16_products


def ours(task: dict[str, Any], folder: Path) -> dict[str, float]:
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
    clock = _Clock()
    train_offline(config, pairs=pairs, held_out=None, device=torch.device("cpu"), reporter=clock)
    return {"reference_s": clock.reference_s, "train_s": clock.train_s, "loss": clock.loss}


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


def matmul_gflops(dtype: str, size: int = 2048, repeats: int = 20) -> float:
    """GFLOP/s of matrix products with inputs rounded to ``dtype``, on this process's threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    with bfloat16_products() if dtype == "bfloat16" else contextlib.nullcontext():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:]) / 1e9


def main() -> None:
    """Run one side and write its results."""
    side, task, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(task["threads"])
    peak_gflops = matmul_gflops(task["dtype"])
    result = {"ours": ours, "trl": trl}[side](task, folder)
    useful, _ = step_flops(Shape.of(AutoConfig.from_pretrained(task["model"])), np.array(task["lengths"]))
    result |= {
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_gflops": peak_gflops,
        "useful_gflops": useful / result["train_s"] / 1e9,
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

"""TRL's trainers as independent oracles: the same pairs in the same order, one log line per step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def trl_steps(
    model: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    folder: Path,
    pairs_per_step: int,
    lr: float,
    pairs_per_micro_batch: int | None = None,
    adapter: Path | None = None,
    **losses: Any,
) -> list[dict[str, Any]]:
    """Train one epoch of DPO in float32 without shuffling; returns TRL's own log of each step.

    Args:
        records: prompt, chosen and rejected, as message lists or as text.
        pairs_per_micro_batch: all of a step's by default.
        adapter: peft directory with the adapters to train; all weights by default.
        losses: beta and further settings of TRL's DPOConfig, such as ``loss_type``.
    """
    from trl import DPOConfig, DPOTrainer

    settings = _settings(folder, pairs_per_step, pairs_per_micro_batch or pairs_per_step, lr)
    args = DPOConfig(
        **settings, **losses, max_length=None, gradient_checkpointing=False, train_sampling_strategy="sequential"
    )
    return _train(DPOTrainer, model, args, records, adapter)


def trl_simpo_steps(
    model: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    folder: Path,
    pairs_per_step: int,
    lr: float,
    beta: float,
    gamma: float,
) -> list[dict[str, Any]]:
    """Train SimPO, which is part of TRL's CPO trainer."""
    from torch.utils.data import SequentialSampler
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Sequential(CPOTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            records: Any = self.train_dataset
            return SequentialSampler(records)

    settings = _settings(folder, pairs_per_step, pairs_per_step, lr)
    args = CPOConfig(
        **settings, loss_type="simpo", cpo_alpha=0.0, beta=beta, simpo_gamma=gamma, max_length=2048,
        gradient_checkpointing=False,
    )  # fmt: skip
    return _train(Sequential, model, args, records)


def trl_kto_steps(
    model: Path, records: Sequence[Mapping[str, Any]], *, folder: Path, lr: float, epochs: int, **losses: Any
) -> list[dict[str, Any]]:
    """Train KTO with all records in each step; TRL estimates the KL divergence with the completion before, in turn."""
    from trl import KTOConfig, KTOTrainer

    settings = _settings(folder, len(records), len(records), lr) | {"num_train_epochs": epochs}
    args = KTOConfig(**settings, **losses, max_length=None, gradient_checkpointing=False)
    return _train(KTOTrainer, model, args, records)


def _settings(folder: Path, pairs_per_step: int, pairs_per_micro_batch: int, lr: float) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": pairs_per_micro_batch,
        "gradient_accumulation_steps": pairs_per_step // pairs_per_micro_batch,
        "num_train_epochs": 1,
        "learning_rate": lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32"},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _train(
    trainer_class: Any, model: Path, args: Any, records: Sequence[Mapping[str, Any]], adapter: Path | None = None
) -> list[dict[str, Any]]:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained: Any = str(model)
    if adapter is not None:
        args.model_init_kwargs = None
        base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        trained = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trainer = trainer_class(
        model=trained,
        args=args,
        train_dataset=Dataset.from_list([dict(record) for record in records]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]

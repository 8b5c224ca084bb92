"""TRL's DPOTrainer as an independent oracle: the same pairs in the same order, one log line a step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]


def trl_steps(
    model: Path,
    records: Sequence[dict[str, Messages]],
    *,
    folder: Path,
    pairs_per_step: int,
    lr: float,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> list[dict[str, Any]]:
    """Train one epoch in float32 without shuffling; returns TRL's own log of each step.

    Args:
        records: prompt, chosen and rejected as message lists.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=str(model),
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=pairs_per_step,
            num_train_epochs=1,
            learning_rate=lr,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            max_length=None,
            bf16=False,
            fp16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(list(records)),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]

"""Libraries that talk as they are imported."""

import logging

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers that warn of what a person who starts a command can do nothing about."""


def filter_import_warnings() -> None:
    """Let them say errors only; to be called before torch and transformers are imported."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)

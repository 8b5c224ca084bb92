"""Libraries that talk as they are imported."""

import logging

TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that warn of what a person who starts a command can do nothing about."""


def quieten() -> None:
    """Let them say errors only; to be called before torch and transformers are imported."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)

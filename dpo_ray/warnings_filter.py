"""Filter for warnings that libraries log when they are imported."""

import logging

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers whose import-time warnings a user cannot act on."""


def filter_import_warnings() -> None:
    """Set these loggers to ERROR; call it before torch and transformers are imported."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)

"""Masks keys, tokens and passwords in a configuration that leaves the run directory."""

import re
from collections.abc import Mapping
from typing import Any

SECRET_NAME = re.compile(
    r"(^key|(api|access|secret|private|auth)_?key|secret|passw(or)?d|credentials?|token|authorization)$", re.IGNORECASE
)
SECRET_VALUE = re.compile(
    r"(://)[^/@\s]+(?=@)"  # https://user:password@host
    r"|([?&](?i:[\w-]*(?:token|key|secret|password|signature|sig))=)[^&\s]+"  # https://host?token=...
    r"|\b(?:sk-|hf_|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza|eyJ|wandb_v\d_)[\w.-]{16,}"
)


def holds_secret(value: Any) -> bool:
    """True if ``mask_secrets`` would hide a part of a tree of plain values."""
    return mask_secrets(value) != value


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of a tree of plain values with secrets replaced, found by the name of their key or by their form."""
    if isinstance(value, Mapping):
        return {key: mask_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secrets(item, name) for item in value]
    if not isinstance(value, str):
        return value
    named = SECRET_NAME.search(name.replace("-", "_"))
    return "(hidden)" if named and value else SECRET_VALUE.sub(r"\g<1>\g<2>(hidden)", value)

"""The tokenizer of a model, its digest, and the limits of the model's inputs."""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_ray.config import Config
from dpo_ray.storage import error_summary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Limits of a model's inputs; None is no limit."""

    vocabulary: int | None = None
    """Rows of the embedding."""
    positions: int | None = None
    """Longest sequence in tokens."""
    engine_prompt: int | None = None
    """Longest prompt that leaves an engine room for a completion."""


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        path: hub id or directory.
        chat_template: path of a Jinja template that replaces the tokenizer's own.

    Raises:
        ValueError: there is no tokenizer at ``path``, or the template cannot be read.
    """
    template = None if chat_template is None else _read_template(chat_template)
    is_folder = Path(path).is_dir()
    if not is_folder and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"model.path: {path}: no such directory; accepted is a model directory or a hub id, org/name")

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=is_folder)
    except Exception as error:  # the hub client, its HTTP library and the tokenizer's parser each have own errors
        kind = "the directory holds no tokenizer that can be loaded" if is_folder else "not loaded from the hub"
        raise ValueError(f"model.path: {path}: {kind}: {error_summary(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"model.path: {path}: its tokenizer is a {type(tokenizer).__name__}; accepted is one of transformers"
        )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_limits(path: str) -> ModelLimits:
    """Limits of the model at ``path``, from its configuration; no limits if it has none that can be loaded."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir()).get_text_config()
    except Exception:  # reported when the model is loaded
        return ModelLimits()
    return ModelLimits(getattr(config, "vocab_size", None), positions_of(config))


def positions_of(config: "PreTrainedConfig") -> int | None:
    """Longest sequence in tokens of a text model with this configuration; None is no limit."""
    names = ("max_position_embeddings", "max_seq_len")  # MPT and DBRX have the second
    positions = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        # Some configurations scale the positions beyond max_position_embeddings, as vLLM does.
        positions = max(positions, int(rope.get("factor", 1) * rope.get("original_max_position_embeddings", positions)))
    return positions


def engine_limits(config: Config, limits: ModelLimits) -> ModelLimits:
    """Limits of an online run: a prompt leaves an engine room for a completion.

    Raises:
        ValueError: ``online.engine.max_model_len`` is longer than the model's positions.
    """
    assert config.online is not None
    if limits.positions is not None and config.max_model_len > limits.positions:
        raise ValueError(
            f"online.engine.max_model_len: prompts and completions of up to {config.max_model_len} tokens do not fit "
            f"the {limits.positions} positions of the model of model.path; lower it, data.max_prompt_tokens or "
            "online.sampling.max_tokens"
        )
    return replace(limits, engine_prompt=config.max_model_len - config.online.sampling.max_tokens)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that determines token ids: vocabulary and rules, special tokens, chat template."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # State of the last call that padded or truncated.
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = json.dumps([rules, special, tokenizer.chat_template], sort_keys=True)
    return sha256(content.encode()).hexdigest()


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"model.chat_template: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"model.chat_template: {path}: not UTF-8 text; accepted is a Jinja template") from None

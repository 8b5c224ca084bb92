"""From text to token ids: the chat template, the boundary between prompt and completion, the length limits.

Prompt and completion are tokenised as one text and split afterwards, so that the policy trains on the tokens that it
would generate. Independent of files.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from dpo_ray.data.records import PairRecord, Problem
from dpo_ray.storage import error_summary
from dpo_ray.types import Messages, TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A kept pair and notes on it."""

    pair: TokenPair
    notes: tuple[str, ...] = ()
    """Counted in the data report: boundary_moved, completion_cut, double_eos, no_eos."""


def tokenize_pair(
    record: PairRecord,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_tokens: int | None,
    max_completion_tokens: int | None,
) -> TokenizedPair | Problem:
    """Token ids of one preference pair.

    The prompt's ids are the common prefix of three tokenized texts: the prompt alone (with the generation prompt), with
    chosen, and with rejected. The rest is the completion, with the template's end of turn; text records end with the
    end-of-sequence token. Completions over the limit are truncated without adding an end-of-sequence token.

    Args:
        record: text or messages.
        tokenizer: with a chat template when the record holds messages.
        max_prompt_tokens: longer prompts are dropped; None is no limit.
        max_completion_tokens: longer completions are truncated; None is no limit.

    Returns:
        The pair, or the reason to drop it: template_refused, empty_prompt, prompt_too_long, completion_emptied,
        identical, identical_after_truncation.

    Raises:
        ValueError: the tokenizer lacks the chat template or the end-of-sequence token that the record needs.
    """
    from jinja2 import TemplateError

    def drop(reason: str, detail: str) -> Problem:
        return Problem(reason, record.source, record.number, detail)

    try:
        prompt_ids, with_chosen, with_rejected = _encode(record, tokenizer)
    except TemplateError as error:
        return drop("template_refused", f"the chat template raised: {error}")

    # As in TRL's DPOTrainer: a template may render a prompt alone differently than before a completion.
    start = min(_common_prefix(prompt_ids, with_chosen), _common_prefix(prompt_ids, with_rejected))
    if not start:
        return drop("empty_prompt", f"none of the prompt's {len(prompt_ids)} tokens precede both completions")
    if max_prompt_tokens is not None and start > max_prompt_tokens:
        return drop("prompt_too_long", f"{start} tokens; data.max_prompt_tokens is {max_prompt_tokens}")

    chosen, rejected = with_chosen[start:][:max_completion_tokens], with_rejected[start:][:max_completion_tokens]
    truncated = len(chosen) < len(with_chosen) - start or len(rejected) < len(with_rejected) - start
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion:
            return drop("completion_emptied", f"{name}: the completion has no tokens after the prompt")
    if chosen == rejected:
        if truncated:
            return drop("identical_after_truncation", f"data.max_completion_tokens is {max_completion_tokens}")
        return drop("identical", "chosen and rejected give the same tokens")

    eos = tokenizer.eos_token_id
    notes = {
        "boundary_moved": start < len(prompt_ids),
        "completion_cut": truncated,
        "double_eos": any(_has_double(completion, eos) for completion in (chosen, rejected)),
        "no_eos": eos is not None and any(eos not in ids[start:] for ids in (with_chosen, with_rejected)),
    }
    pair = TokenPair(tuple(prompt_ids[:start]), tuple(chosen), tuple(rejected))
    return TokenizedPair(pair, tuple(note for note, applies in notes.items() if applies))


class ChatTemplateError(ValueError):
    """A chat template rejects a conversation."""


def render_prompt(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Token ids of a conversation with the generation prompt.

    Raises:
        ChatTemplateError: the chat template rejects the conversation.
        ValueError: the tokenizer has no chat template, or the template is not valid.
    """
    from jinja2 import TemplateError

    try:
        return tuple(_render(messages, tokenizer, generation_prompt=True))
    except TemplateError as error:
        raise ChatTemplateError(f"the chat template raised: {error}") from None


def load_tokenizer(path: str, chat_template: str | None = None) -> "PreTrainedTokenizerBase":
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
    assert tokenizer is not None
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
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


def _encode(record: PairRecord, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt alone, with chosen and with rejected."""
    prompt, chosen, rejected = record.prompt, record.chosen, record.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        eos = tokenizer.eos_token
        if not eos:
            raise ValueError("model.path: the tokenizer has no end-of-sequence token, which plain-text pairs need")
        texts = [prompt, *(prompt + text + ("" if text.endswith(eos) else eos) for text in (chosen, rejected))]
        prompt_ids, with_chosen, with_rejected = tokenizer(texts, verbose=False)["input_ids"]
        return prompt_ids, with_chosen, with_rejected
    assert not isinstance(prompt, str)
    assert not isinstance(chosen, str)
    assert not isinstance(rejected, str)
    return (
        _render(prompt, tokenizer, generation_prompt=True),
        _render((*prompt, *chosen), tokenizer, generation_prompt=False),
        _render((*prompt, *rejected), tokenizer, generation_prompt=False),
    )


def _render(messages: Messages, tokenizer: "PreTrainedTokenizerBase", *, generation_prompt: bool) -> list[int]:
    from jinja2 import TemplateSyntaxError

    if tokenizer.chat_template is None:
        raise ValueError(
            "model.chat_template: the data holds messages and the model's tokenizer has no chat template; "
            "give the path of a Jinja template"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            return_dict=False,
        )
    except TemplateSyntaxError as error:
        raise ValueError(f"model.chat_template: line {error.lineno} of the template: {error.message}") from None
    # Templates add the special tokens themselves.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _common_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    for i, (token, other_token) in enumerate(zip(ids, other, strict=False)):
        if token != other_token:
            return i
    return min(len(ids), len(other))


def _has_double(ids: Sequence[int], token: int | None) -> bool:
    return token is not None and any(a == b == token for a, b in pairwise(ids))


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"model.chat_template: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"model.chat_template: {path}: not UTF-8 text; accepted is a Jinja template") from None

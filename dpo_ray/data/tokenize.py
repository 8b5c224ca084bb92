"""From text to token ids: the chat template, the boundary between prompt and completion, special tokens and limits.

Prompt and completion are tokenized as one text and split afterwards, so that the policy trains on the tokens that it
would generate. Independent of files.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from dpo_ray.config import Config
from dpo_ray.config.losses import Examples
from dpo_ray.config.schema import DataConfig
from dpo_ray.data.fields import bad_field
from dpo_ray.data.formats import Unusable, show
from dpo_ray.data.loss_mask import LostTurn, common_prefix, mask_other_turns
from dpo_ray.data.records import PairRecord, Problem, PromptRecord, Tools
from dpo_ray.data.template import (
    FOREIGN_SPECIAL_TOKEN,
    SPECIAL_TOKEN,
    ChatTemplateError,
    generation_prompt,
    probe_texts,
    render,
    turn_markers,
    unrendered_texts,
    validate_template,
)
from dpo_ray.data.tokenizer import ModelLimits, engine_limits, load_limits, load_tokenizer
from dpo_ray.data.turns import transcript_turns
from dpo_ray.types import Message, Messages, TokenPair


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair that was not dropped."""

    pair: TokenPair
    notes: tuple[tuple[str, str], ...] = ()
    """Reason and detail, counted in the data report: boundary_moved, completion_cut, double_eos, no_eos, ..."""
    removed: tuple[int, int] = (0, 0)
    """Tokens by which chosen and rejected were truncated."""


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt that was not dropped."""

    token_ids: tuple[int, ...]
    messages: Messages
    """The prompt as a conversation; a string that is used as written is one user turn."""
    notes: tuple[tuple[str, str], ...] = ()


Noted = dict[str, dict[str, None]]
"""Details of the notes on a record by reason, each once."""
AnyRecord = TypeVar("AnyRecord", PairRecord, PromptRecord)
Tokenized = TypeVar("Tokenized", TokenizedPair, TokenizedPrompt)


class RecordTokenizer:
    """Tokenizes records as the model reads them.

    Args:
        tokenizer: the policy's tokenizer.
        data: limits on prompts and completions, and the treatment of strings.
        limits: of the model.
        examples: kind of training examples that records become.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        limits: ModelLimits | None = None,
        examples: Examples = "pairs",
    ) -> None:
        self.tokenizer, self.data, self.limits, self.examples = tokenizer, data, limits or ModelLimits(), examples
        added = tokenizer.added_tokens_decoder
        self.special = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
        self.special_texts = [*filter(None, map(str, tokenizer.convert_ids_to_tokens(sorted(self.special))))]
        spellings = *map(re.escape, sorted(self.special_texts, key=len, reverse=True)), FOREIGN_SPECIAL_TOKEN.pattern
        self._markers = re.compile("|".join(spellings))
        whole, open_ended = probe_texts(tokenizer)
        self.end_of_turn = next((token for token in reversed(self._ids(whole)) if token in self.special), None)
        """The last special token that the chat template writes after an answer."""
        # GPT-2 has one token for the unknown and the end.
        self.endings = self.special - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id, self.end_of_turn})
        """Special tokens that a text may end with."""
        self.template_text = whole + open_ended
        """Text that the chat template writes around turns."""
        self.generation_prompt = generation_prompt(tokenizer)
        self.template_tokens = [special for special in self.special_texts if special in self.template_text]
        """Special tokens that the chat template writes: a string that contains one has been rendered."""
        with_special, without = tokenizer("a")["input_ids"], self._ids("a")
        self.bos = with_special[: with_special.index(without[0])] if without else []
        """Tokens that the tokenizer adds in front of text."""
        self.bos_texts = [*filter(None, map(str, tokenizer.convert_ids_to_tokens(self.bos)))]
        unknown = tokenizer.unk_token_id
        self.unknown = unknown if unknown in self._ids("\U000f0000") else None
        """Id of the unknown token; None if the tokenizer has tokens for all text."""

    def pair(self, record: PairRecord) -> TokenizedPair | Problem:
        """Token ids of one preference pair.

        The prompt's ids are the common prefix of three tokenized texts: the prompt alone (up to where the model
        continues), with chosen, and with rejected. The rest is the completion, with the template's end of turn; a
        string ends with the end-of-sequence token unless it ends with a special token of its own, trailing white space
        aside. Tool turns of a completion carry no loss. Completions over the limit are truncated without adding an
        end-of-sequence token.

        Returns:
            The pair, or the reason to drop it: template_refused, empty_prompt, prompt_rewritten, prompt_too_long,
            completion_emptied, identical, identical_after_truncation, unknown_token, too_long_for_model, bad_field.

        Raises:
            ValueError: the tokenizer lacks the chat template or the end-of-sequence token that the record needs.
        """
        return _or_problem(self._pair, record)

    def prompt(self, record: PromptRecord) -> TokenizedPrompt | Problem:
        """Token ids of a prompt, up to where the model continues.

        Returns:
            The prompt, or the reason to drop it: template_refused, prompt_too_long, unknown_token, bad_field.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        return _or_problem(self._prompt, record)

    def _prompt(self, record: PromptRecord) -> TokenizedPrompt:
        messages, treatment = self._conversation(record, record.prompt)
        noted: Noted = {}
        if messages is None:
            assert isinstance(record.prompt, str)
            messages, ids = ({"role": "user", "content": record.prompt},), self._with_bos(record.prompt)
            self._note_unknown({"prompt": record.prompt}, noted)
        else:
            text = render(messages, self.tokenizer, record.tools, answer_follows=True)
            ids = self._ids(text)
            self._check_texts(text, ids, messages, _names("prompt", messages), record.tools, noted, answer_follows=True)
        self._check_limits({"prompt": ids}, len(ids), 0)
        return TokenizedPrompt(tuple(ids), messages, (*_treated(treatment), *record.notes, *_notes(noted)))

    def _pair(self, record: PairRecord) -> TokenizedPair:
        prompt, treatment = self._conversation(record, record.prompt, record.chosen, record.rejected)
        noted: Noted = {}
        rewritten = False
        if prompt is None:
            prompt_ids, with_chosen, with_rejected = self._encode_strings(record, noted)
        else:
            text = render(prompt, self.tokenizer, record.tools, answer_follows=True)
            prompt_ids = self._ids(text)
            conversation, with_chosen = self._encode_conversation(record, prompt, record.chosen, record.names[0], noted)
            conversations, with_rejected = [conversation], with_chosen
            if record.rejected != record.chosen:
                conversation, with_rejected = self._encode_conversation(
                    record, prompt, record.rejected, record.names[1], noted
                )
                conversations.append(conversation)
            rewritten = self._is_rewritten(prompt, text, conversations, record.tools)

        # As in TRL's DPOTrainer: a template may render a prompt alone differently than before a completion.
        start = min(common_prefix(prompt_ids, with_chosen), common_prefix(prompt_ids, with_rejected))
        if not start:
            raise Unusable("empty_prompt", f"none of the prompt's {len(prompt_ids)} tokens precede both completions")
        if prompt is not None and rewritten:
            lost = _unrendered(noted, ("prompt",))
            raise Unusable(
                "prompt_rewritten",
                f"the completions would start before the end of prompt[{len(prompt) - 1}]: the chat template renders "
                f"the prompt otherwise when they follow{lost}",
            )

        limit = self.data.max_completion_tokens
        whole = with_chosen[start:], with_rejected[start:]
        chosen, rejected = (ids[:limit] for ids in whole)
        removed = len(whole[0]) - len(chosen), len(whole[1]) - len(rejected)
        self._check_limits(
            {"prompt": prompt_ids[:start], record.names[0]: chosen, record.names[1]: rejected},
            start,
            max(len(chosen), len(rejected)),
        )
        for name, completion in zip(record.names, (chosen, rejected), strict=True):
            if not any(token >= 0 for token in completion):
                raise Unusable("completion_emptied", f"{name}: the completion has no tokens after the prompt")
        same = [token for token in chosen if token >= 0] == [token for token in rejected if token >= 0]
        if same and record.rejected != record.chosen:
            if any(removed):
                raise Unusable("identical_after_truncation", f"data.max_completion_tokens is {limit}")
            lost = _unrendered(noted, record.names)
            raise Unusable("identical", f"chosen and rejected have the same tokens with loss{lost}")

        notes = {
            "boundary_moved": start < len(prompt_ids),
            "completion_cut": any(removed),
            "double_eos": any(
                _has_double(completion, self.tokenizer.eos_token_id) for completion in (chosen, rejected)
            ),
            "no_eos": bool(self.special) and any(self.endings.isdisjoint(ids) for ids in whole),
        }
        pair = TokenPair(tuple(prompt_ids[:start]), tuple(chosen), tuple(rejected), record.unpaired)
        applying = tuple((note, "") for note, applies in notes.items() if applies)
        return TokenizedPair(pair, (*_treated(treatment), *record.notes, *applying, *_notes(noted)), removed)

    def _is_rewritten(self, prompt: Messages, text: str, conversations: Sequence[str], tools: Tools) -> bool:
        """True if the completions would start before the end of the prompt's last turn, so that it would carry loss.

        Args:
            text: the rendered prompt, up to where the model continues.
            conversations: the rendered prompt with each completion.
        """

        def starts_all(start: str) -> bool:
            return all(conversation.startswith(start.rstrip()) for conversation in conversations)

        if prompt[-1]["role"] == "assistant":
            return not starts_all(text)
        # Before an answer, a template may write something else than its generation prompt.
        if starts_all(text.removesuffix(self.generation_prompt)):
            return False
        try:
            closed = render(prompt, self.tokenizer, tools)
        except ChatTemplateError:  # it demands an answer
            return False
        return not starts_all(commonprefix([text, closed]))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens and tokens without loss included."""
        return str(self.tokenizer.decode([token if token >= 0 else ~token for token in ids]))

    # ------------------------------------------------------------------------------------------------------- strings

    def _conversation(
        self, record: PairRecord | PromptRecord, prompt: Messages | str, *completions: Messages | str
    ) -> tuple[Messages | None, str | None]:
        """The prompt as messages, or None for a string used as written; and the treatment of strings, chat or raw."""
        if not isinstance(prompt, str):
            _validate_begun(prompt)
            return prompt, None
        treatment, texts = self.data.strings, [text for text in (prompt, *completions) if isinstance(text, str)]
        if treatment == "auto" and self.tokenizer.chat_template is None:
            treatment = "raw"
        elif treatment == "auto":
            for marker in (marker for text in texts for marker in turn_markers(text)):
                self._reject_split(marker, ", in text that the template of another model rendered")
            own = (*turn_markers(prompt), *filter(prompt.__contains__, (*self.template_tokens, *self.bos_texts)))
            treatment = "raw" if any(marker in self.template_text for marker in own) else "chat"
        if treatment == "chat":
            return (*record.system, *(transcript_turns(prompt) or ({"role": "user", "content": prompt},))), "chat"
        for marker in (marker for text in texts for marker in SPECIAL_TOKEN.findall(text)):
            self._reject_split(marker)
        key = "model.chat_template" if self.tokenizer.chat_template is None else "data.strings: chat"
        for name, value in (("system", record.system), ("tools", record.tools)):
            if value:
                raise Unusable("bad_field", f"{name}: beside a prompt used as written; accepted with {key}")
        return None, "raw"

    def _reject_split(self, marker: str, where: str = "") -> None:
        """Drop a record with a marker that is neither a token nor plain text of the chat template."""
        if marker not in self.template_text and len(self._ids(marker)) > 1:
            raise Unusable(
                "split_special_token", f"{marker}: the tokenizer of model.path splits it into several tokens{where}"
            )

    def _encode_strings(self, record: PairRecord, noted: Noted) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the prompt alone, with chosen and with rejected, as written."""
        prompt, chosen, rejected = record.prompt, record.chosen, record.rejected
        assert isinstance(prompt, str)
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        completions = dict(zip(record.names, (chosen, rejected), strict=True))
        for name, completion in completions.items():
            if completion.startswith(prompt.strip()) and turn_markers(prompt):
                bad_field(name, "the prompt at the start", "the text after the prompt")
        self._note_unknown({"prompt": prompt, **completions}, noted)
        return self._with_bos(prompt), self._ended(prompt + chosen), self._ended(prompt + rejected)

    def _ended(self, text: str) -> list[int]:
        ids, eos = self._with_bos(text), self.tokenizer.eos_token_id
        last = next((token for token in reversed(ids) if self.decode([token]).strip()), None)
        if last in self.endings:
            return ids
        if eos is None:
            raise ValueError("model.path: the tokenizer has no end-of-sequence token, which plain-text pairs need")
        return [*ids, eos]

    def _with_bos(self, text: str) -> list[int]:
        ids = self._ids(text)
        return ids if ids[: len(self.bos)] == self.bos else self.bos + ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    # ------------------------------------------------------------------------------------------------- conversations

    def _encode_conversation(
        self, record: PairRecord, prompt: Messages, completion: Messages | str, name: str, noted: Noted
    ) -> tuple[str, list[int]]:
        """The prompt with a completion as text and as token ids; those of tool turns are stored as ``~id``."""
        if isinstance(completion, str):
            transcript = isinstance(record.prompt, str) and transcript_turns(record.prompt)
            begun = prompt[-1]["role"] == "assistant"
            content = completion.strip() if transcript and not begun else completion
            completion = ({"role": "assistant", "content": content},)
        names = [*_names("prompt", prompt), *_names(name, completion)]
        if prompt[-1]["role"] == "assistant":
            # The completion continues the prompt's last turn.
            completion = (_continued(prompt[-1], completion[0], name), *completion[1:])
            prompt = prompt[:-1]
            del names[len(prompt)]
        messages = (*prompt, *completion)
        text = render(messages, self.tokenizer, record.tools)
        ids = self._ids(text)
        self._check_texts(text, ids, messages, names, record.tools, noted)
        if len(completion) == 1:
            return text, ids

        def encode(messages: Messages, *, answer_follows: bool = False) -> list[int]:
            return self._ids(render(messages, self.tokenizer, record.tools, answer_follows=answer_follows))

        try:
            return text, mask_other_turns(ids, messages, len(prompt), encode, self.end_of_turn)
        except LostTurn as error:
            raise Unusable("loss_mask", str(error)) from None

    def _check_texts(
        self,
        text: str,
        ids: Sequence[int],
        messages: Messages,
        names: Sequence[str],
        tools: Tools,
        noted: Noted,
        **how: Any,
    ) -> None:
        """Note the parts of a conversation that the template leaves out, and special tokens written in the others."""
        lost = unrendered_texts(text, messages, names, self.tokenizer, tools, **how)
        for name in lost:
            noted.setdefault("text_not_rendered", {})[name] = None
        parts = {
            f"{name}.{key}": str(message[key]) for message, name in zip(messages, names, strict=True) for key in message
        }
        if tools:
            parts["tools"] = str(tools)
        rendered = {name: value for name, value in parts.items() if name not in lost}
        for name, value in rendered.items():
            markers = dict.fromkeys(self._markers.findall(value))
            for reason, is_own in (("special_in_text", True), ("split_special_token", False)):
                if found := [marker for marker in markers if (len(self._ids(marker)) == 1) == is_own]:
                    noted.setdefault(reason, {})[f"{name}: {' '.join(found)}"] = None
        if self._has_unknown(text, ids):
            self._note_unknown(rendered, noted)

    def _note_unknown(self, texts: Mapping[str, str], noted: Noted) -> None:
        for name, text in texts.items():
            if self._has_unknown(text):
                noted.setdefault("unknown_text", {})[name] = None

    def _has_unknown(self, text: str, ids: Sequence[int] | None = None) -> bool:
        """True if the tokenizer has no token for some of the text; ``ids`` are its token ids, if they are known."""
        if self.unknown is None:
            return False
        ids = self._ids(text) if ids is None else ids
        return ids.count(self.unknown) > text.count(str(self.tokenizer.unk_token))

    # -------------------------------------------------------------------------------------------------------- limits

    def _check_limits(self, parts: dict[str, Sequence[int]], prompt: int, completion: int) -> None:
        prompt_limits = {
            "data.max_prompt_tokens": self.data.max_prompt_tokens,
            "online.engine.max_model_len - online.sampling.max_tokens": self.limits.engine_prompt,
        }
        for key, limit in prompt_limits.items():
            if limit is not None and prompt > limit:
                raise Unusable("prompt_too_long", f"{prompt} tokens; {key} is {limit}")
        positions, rows = self.limits.positions, self.limits.vocabulary
        if positions is not None and prompt + completion > positions:
            raise Unusable(
                "too_long_for_model",
                f"{prompt + completion} tokens; the model of model.path takes {positions} (max_position_embeddings or "
                "max_seq_len)",
            )
        if rows is not None:
            for name, ids in parts.items():
                token = max((token if token >= 0 else ~token for token in ids), default=0)
                if token >= rows:
                    text = self.tokenizer.convert_ids_to_tokens(token)
                    raise Unusable(
                        "unknown_token",
                        f"{name}: token {text} has id {token}; the model of model.path has {rows} embeddings",
                    )


def load_record_tokenizer(config: Config) -> RecordTokenizer:
    """The tokenizer of a run's records, with the limits of its model and engines.

    Raises:
        ValueError: the tokenizer cannot be loaded, or does not fit the chat template or the limits.
    """
    limits = load_limits(config.model.path)
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    if config.model.chat_template is not None:
        validate_template(tokenizer)
    limits = engine_limits(config, limits) if config.online else limits
    return RecordTokenizer(tokenizer, config.data, limits, config.loss.examples)


def _or_problem(tokenize: Callable[[AnyRecord], Tokenized], record: AnyRecord) -> Tokenized | Problem:
    try:
        return tokenize(record)
    except Unusable as drop:
        return Problem(drop.reason, record.source, record.number, drop.detail)
    except ChatTemplateError as error:
        return Problem("template_refused", record.source, record.number, str(error))


def _validate_begun(prompt: Messages) -> None:
    """Drop a prompt that ends with calls of tools, which no completion can continue."""
    if prompt[-1]["role"] == "assistant" and "tool_calls" in prompt[-1]:
        bad_field(
            f"prompt[{len(prompt) - 1}].tool_calls",
            f"{show(prompt[-1]['tool_calls'])} in the last turn, which the completion continues",
            "a last turn of text, or the results of the tools after it",
        )


def _continued(begun: Message, first: Message, name: str) -> Message:
    """The last turn of a prompt with the first turn of a completion, which continues its content."""
    for key, value in first.items():
        if key not in ("content", "tool_calls") and value != begun.get(key):
            accepted = show(begun[key]) if key in begun else "content only"
            bad_field(f"{name}[0].{key}", f"{show(value)} in the turn that continues the prompt's last one", accepted)
    return {**begun, **first, "content": begun["content"] + (first["content"] or "")}


def _names(name: str, messages: Messages) -> list[str]:
    return [f"{name}[{i}]" for i in range(len(messages))]


def _treated(treatment: str | None) -> tuple[tuple[str, str], ...]:
    return ((f"strings_{treatment}", ""),) if treatment else ()


def _notes(noted: Noted) -> Iterator[tuple[str, str]]:
    return ((reason, ", ".join(details)) for reason, details in noted.items())


def _unrendered(noted: Noted, names: tuple[str, ...]) -> str:
    """The end of a message: the texts of these fields that the chat template leaves out."""
    lost = ", ".join(name for name in noted.get("text_not_rendered", ()) if name.startswith(names))
    return f"; the chat template leaves out {lost}" if lost else ""


def _has_double(ids: Sequence[int], token: int | None) -> bool:
    return token is not None and any(a == b == token for a, b in pairwise(ids))

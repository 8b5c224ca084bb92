"""From text to token ids: the chat template, the boundary between prompt and completion, special tokens and limits.

Prompt and completion are tokenised as one text and split afterwards, so that the policy trains on the tokens that it
would generate. Independent of files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from dpo_ray.config import Config
from dpo_ray.config.schema import DataConfig, Examples
from dpo_ray.data.layouts import transcript_turns
from dpo_ray.data.records import PairRecord, Problem, PromptRecord
from dpo_ray.data.template import (
    SPECIAL_TOKEN,
    ChatTemplateError,
    probe_texts,
    render,
    unrendered_texts,
    validate_template,
)
from dpo_ray.data.tokenizer import ModelLimits, engine_limits, load_limits, load_tokenizer
from dpo_ray.types import Messages, TokenPair


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


AnyRecord = TypeVar("AnyRecord", PairRecord, PromptRecord)
Tokenized = TypeVar("Tokenized", TokenizedPair, TokenizedPrompt)


class _Drop(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class RecordTokenizer:
    """Tokenises records as the model reads them.

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
        whole, open_ended = probe_texts(tokenizer)
        self.end_of_turn = next((token for token in reversed(self._ids(whole)) if token in self.special), None)
        """The last special token that the chat template writes after an answer."""
        self.template_tokens = [special for special in self.special_texts if special in whole + open_ended]
        """Special tokens that the chat template writes: a string that contains one has been rendered."""
        with_special, without = tokenizer("a")["input_ids"], self._ids("a")
        self.bos = with_special[: with_special.index(without[0])] if without else []
        """Tokens that the tokenizer adds in front of text."""
        self.bos_texts = [*filter(None, map(str, tokenizer.convert_ids_to_tokens(self.bos)))]

    def pair(self, record: PairRecord) -> TokenizedPair | Problem:
        """Token ids of one preference pair.

        The prompt's ids are the common prefix of three tokenized texts: the prompt alone (up to where the model
        continues), with chosen, and with rejected. The rest is the completion, with the template's end of turn; a
        string ends with the end-of-sequence token unless it ends with a special token of its own. Tool turns of a
        completion carry no loss. Completions over the limit are truncated without adding an end-of-sequence token.

        Returns:
            The pair, or the reason to drop it: template_refused, empty_prompt, prompt_too_long, completion_emptied,
            identical, identical_after_truncation, unknown_token, too_long_for_model, bad_field.

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
        unrendered: list[str] = []
        if messages is None:
            assert isinstance(record.prompt, str)
            messages, ids = ({"role": "user", "content": record.prompt},), self._with_bos(record.prompt)
        else:
            text, names = (
                render(messages, self.tokenizer, record.tools, answer_follows=True),
                _names("prompt", messages),
            )
            unrendered += unrendered_texts(text, messages, names, self.tokenizer, record.tools, answer_follows=True)
            ids = self._ids(text)
        self._check_limits({"prompt": ids}, len(ids), 0)
        return TokenizedPrompt(tuple(ids), messages, (*_treated(treatment), *_unrendered(unrendered)))

    def _pair(self, record: PairRecord) -> TokenizedPair:
        prompt, treatment = self._conversation(record, record.prompt, record.chosen, record.rejected)
        unrendered: list[str] = []
        if prompt is None:
            prompt_ids, with_chosen, with_rejected = self._encode_strings(record)
        else:
            prompt_ids = self._ids(render(prompt, self.tokenizer, record.tools, answer_follows=True))
            with_chosen, with_rejected = (
                self._encode_conversation(record, prompt, name, unrendered) for name in ("chosen", "rejected")
            )

        # As in TRL's DPOTrainer: a template may render a prompt alone differently than before a completion.
        start = min(_common_prefix(prompt_ids, with_chosen), _common_prefix(prompt_ids, with_rejected))
        if not start:
            raise _Drop("empty_prompt", f"none of the prompt's {len(prompt_ids)} tokens precede both completions")

        limit = self.data.max_completion_tokens
        whole = with_chosen[start:], with_rejected[start:]
        chosen, rejected = (ids[:limit] for ids in whole)
        removed = len(whole[0]) - len(chosen), len(whole[1]) - len(rejected)
        self._check_limits(
            {"prompt": prompt_ids[:start], "chosen": chosen, "rejected": rejected},
            start,
            max(len(chosen), len(rejected)),
        )
        for name, completion in (("chosen", chosen), ("rejected", rejected)):
            if not any(token >= 0 for token in completion):
                raise _Drop("completion_emptied", f"{name}: the completion has no tokens after the prompt")
        same = [token for token in chosen if token >= 0] == [token for token in rejected if token >= 0]
        if same and not record.unpaired:
            if any(removed):
                raise _Drop("identical_after_truncation", f"data.max_completion_tokens is {limit}")
            raise _Drop("identical", "chosen and rejected have the same tokens with loss")

        notes = {
            "boundary_moved": start < len(prompt_ids),
            "completion_cut": any(removed),
            "double_eos": any(
                _has_double(completion, self.tokenizer.eos_token_id) for completion in (chosen, rejected)
            ),
            "no_eos": bool(self.special) and any(self.special.isdisjoint(ids) for ids in whole),
        }
        pair = TokenPair(tuple(prompt_ids[:start]), tuple(chosen), tuple(rejected), record.unpaired)
        applying = tuple((note, "") for note, applies in notes.items() if applies)
        return TokenizedPair(pair, (*_treated(treatment), *applying, *_unrendered(unrendered)), removed)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens and tokens without loss included."""
        return str(self.tokenizer.decode([token if token >= 0 else ~token for token in ids]))

    # ------------------------------------------------------------------------------------------------------- strings

    def _conversation(
        self, record: PairRecord | PromptRecord, prompt: Messages | str, *completions: Messages | str
    ) -> tuple[Messages | None, str | None]:
        """The prompt as messages, or None for a string used as written; and the treatment of strings, chat or raw."""
        if not isinstance(prompt, str):
            return prompt, None
        treatment = self.data.strings
        if treatment == "auto":
            rendered = any(special in prompt for special in (*self.template_tokens, *self.bos_texts))
            treatment = "raw" if rendered or self.tokenizer.chat_template is None else "chat"
        if treatment == "chat":
            return (*record.system, *(transcript_turns(prompt) or ({"role": "user", "content": prompt},))), "chat"
        for text in (prompt, *(text for text in completions if isinstance(text, str))):
            for marker in SPECIAL_TOKEN.findall(text):
                if len(self._ids(marker)) > 1:
                    raise _Drop(
                        "split_special_token", f"{marker}: the tokenizer of model.path splits it into several tokens"
                    )
        for name, value in (("system", record.system), ("tools", record.tools)):
            if value:
                raise _Drop("bad_field", f"{name}: beside a prompt used as written; accepted with data.strings: chat")
        return None, "raw"

    def _encode_strings(self, record: PairRecord) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the prompt alone, with chosen and with rejected, as written."""
        prompt, chosen, rejected = record.prompt, record.chosen, record.rejected
        assert isinstance(prompt, str)
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        return self._with_bos(prompt), self._ended(prompt + chosen), self._ended(prompt + rejected)

    def _ended(self, text: str) -> list[int]:
        ids, eos = self._with_bos(text), self.tokenizer.eos_token_id
        if ids[-1] in self.special:
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
        self, record: PairRecord, prompt: Messages, name: Literal["chosen", "rejected"], unrendered: list[str]
    ) -> list[int]:
        """Token ids of the prompt with a completion; those of tool turns are stored as ``~id``."""
        completion = getattr(record, name)
        if isinstance(completion, str):
            transcript = isinstance(record.prompt, str) and transcript_turns(record.prompt)
            begun = prompt[-1]["role"] == "assistant"
            content = completion.strip() if transcript and not begun else completion
            completion = ({"role": "assistant", "content": content},)
        names = [*_names("prompt", prompt), *_names(name, completion)]
        if prompt[-1]["role"] == "assistant":
            # The completion continues the prompt's last turn.
            begun, first, prompt = prompt[-1], completion[0], prompt[:-1]
            completion = ({**begun, **first, "content": begun["content"] + (first["content"] or "")}, *completion[1:])
            del names[len(prompt)]
        messages = (*prompt, *completion)
        text = render(messages, self.tokenizer, record.tools)
        lost = unrendered_texts(text, messages, names, self.tokenizer, record.tools)
        unrendered += [field for field in lost if field not in unrendered]
        ids = self._ids(text)
        return self._mask_tools(ids, messages, len(prompt), record) if len(completion) > 1 else ids

    def _mask_tools(self, ids: list[int], messages: Messages, prompt_turns: int, record: PairRecord) -> list[int]:
        """Token ids; the completion's tokens outside assistant turns become ``~id``."""
        masked: list[int] = []
        for i in range(prompt_turns, len(messages)):
            if messages[i]["role"] == "assistant":
                before = messages[:i]
                # The turn starts after the generation prompt, which follows every turn but an assistant turn.
                follows = before[-1]["role"] != "assistant"
                starts = self._ids(render(before, self.tokenizer, record.tools, answer_follows=follows))
                start, end = _common_prefix(starts, ids), self._end_of_turn(ids, messages, i, record)
                between = ids[len(masked) : start]
                masked += [*([~token for token in between] if masked else between), *ids[start:end]]
        return masked + [~token for token in ids[len(masked) :]]

    def _end_of_turn(self, ids: list[int], messages: Messages, i: int, record: PairRecord) -> int:
        """Number of ids up to the end of the i-th turn, with its end-of-turn token."""
        ends = self._ids(render(messages[: i + 1], self.tokenizer, record.tools))
        end = _common_prefix(ends, ids)
        if end == len(ends) or i + 1 == len(messages):
            return end
        # The template renders a last turn otherwise: the turn ends at the last end-of-turn token before the next text.
        altered = (*messages[: i + 1], {**messages[i + 1], "content": "\x00"})
        following = _common_prefix(self._ids(render(altered, self.tokenizer, record.tools)), ids)
        positions = [n for n in range(end, following) if ids[n] == self.end_of_turn]
        if not positions:
            raise _Drop("loss_mask", f"the chat template rewrites turn {i} of the conversation when others follow")
        return positions[-1] + 1

    # -------------------------------------------------------------------------------------------------------- limits

    def _check_limits(self, parts: dict[str, Sequence[int]], prompt: int, completion: int) -> None:
        prompt_limits = {
            "data.max_prompt_tokens": self.data.max_prompt_tokens,
            "online.engine.max_model_len - online.sampling.max_tokens": self.limits.engine_prompt,
        }
        for key, limit in prompt_limits.items():
            if limit is not None and prompt > limit:
                raise _Drop("prompt_too_long", f"{prompt} tokens; {key} is {limit}")
        positions, rows = self.limits.positions, self.limits.vocabulary
        if positions is not None and prompt + completion > positions:
            raise _Drop(
                "too_long_for_model",
                f"{prompt + completion} tokens; the model of model.path takes {positions} (max_position_embeddings)",
            )
        if rows is not None and len(self.tokenizer) > rows:
            for name, ids in parts.items():
                token = max((token if token >= 0 else ~token for token in ids), default=0)
                if token >= rows:
                    text = self.tokenizer.convert_ids_to_tokens(token)
                    raise _Drop(
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
    except _Drop as drop:
        return Problem(drop.reason, record.source, record.number, drop.detail)
    except ChatTemplateError as error:
        return Problem("template_refused", record.source, record.number, str(error))


def _names(name: str, messages: Messages) -> list[str]:
    return [f"{name}[{i}]" for i in range(len(messages))]


def _treated(treatment: str | None) -> tuple[tuple[str, str], ...]:
    return ((f"strings_{treatment}", ""),) if treatment else ()


def _unrendered(fields: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return (("text_not_rendered", ", ".join(fields)),) if fields else ()


def _common_prefix(ids: Sequence[int], other: Sequence[int]) -> int:
    for i, (token, other_token) in enumerate(zip(ids, other, strict=False)):
        if token != other_token:
            return i
    return min(len(ids), len(other))


def _has_double(ids: Sequence[int], token: int | None) -> bool:
    return token is not None and any(a == b == token for a, b in pairwise(ids))

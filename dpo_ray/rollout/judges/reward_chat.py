"""The text that a reward model reads: a prompt and its completion in the reward model's own chat template."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_ray.storage import error_summary
from dpo_ray.types import Messages, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE: Messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def conversation(prompt: Prompt, completion: str) -> Messages:
    """The prompt's messages and the completion as the assistant's turn, or as the rest of a turn that it continues."""
    *before, last = prompt.messages
    if last["role"] == "assistant":
        return (*before, {**last, "content": f"{last['content'] or ''}{completion}"})
    return (*prompt.messages, {"role": "assistant", "content": completion})


class RewardChat:
    """Renders conversations by a reward model's chat template.

    Args:
        path: hub id or directory of the reward model.
        judge: for messages: the name of the judge.

    Raises:
        ValueError: the tokenizer cannot be loaded, has no chat template, or its template is not valid.
    """

    def __init__(self, path: str, judge: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
        from dpo_ray.data.template import ChatTemplateError, render

        self._render = render
        self.tokenizer = _load(path, judge, revision, trust_remote_code)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"judge {judge!r}: the tokenizer of {path} has no chat template, and a reward model scores "
                "conversations; save the template that the model was trained with as chat_template.jinja beside the "
                "tokenizer"
            )
        try:
            render(PROBE, self.tokenizer)
        except ChatTemplateError:  # it may demand other conversations, such as a system turn
            pass
        except ValueError as error:
            raise ValueError(f"judge {judge!r}: the chat template of {path} is not valid: {error}") from None

    def text(self, prompt: Prompt, completion: str) -> str:
        """The rendered conversation, with the special tokens that the template writes.

        Raises:
            ChatTemplateError: the template rejects the conversation.
        """
        return self._render(conversation(prompt, completion), self.tokenizer)

    def token_ids(self, prompt: Prompt, completion: str) -> list[int]:
        """Token ids of ``text``. The tokenizer adds none: a template writes its own beginning-of-sequence token."""
        return self.tokenizer(self.text(prompt, completion), add_special_tokens=False, verbose=False)["input_ids"]

    def text_without_bos(self, prompt: Prompt, completion: str) -> str:
        """``text`` for a server whose tokenizer adds the beginning-of-sequence token again if it does so here."""
        text, bos = self.text(prompt, completion), self.tokenizer.bos_token
        adds_bos = self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if bos and adds_bos else text


def _load(path: str, judge: str, revision: str | None, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, local_files_only=Path(path).is_dir()
        )
        return tokenizer
    except Exception as error:  # the hub client, its HTTP library and the tokenizer's parser each have own errors
        raise ValueError(
            f"judge {judge!r}: the tokenizer of {path} cannot be loaded: {error_summary(error)}; "
            "accepted is a hub id, org/name, or a directory that the judge's process can read"
        ) from None

"""Placeholders of images, audio and video in the texts of records, whose media no model would see."""

import re
from collections.abc import Iterable

from dpo_ray.data.fields import bad_field
from dpo_ray.data.turns import as_turns, prompt_turns
from dpo_ray.types import Messages

_CLOSING = {f"<{kind}>": f"</{kind}>" for kind in ("image", "audio", "video")} | {
    f"[{kind}]": f"[/{kind}]" for kind in ("IMG", "IMAGE", "AUDIO", "VIDEO")
}
"""Placeholders that may also be HTML or BBCode, which closes them."""
_TAG = "|".join(map(re.escape, _CLOSING))
_TAGS = re.compile(_TAG)
_TAG_APART = re.compile(
    rf"\A\s*(?:{_TAG})|(?:{_TAG})\s*\Z|^(?:[\w# ]{{1,24}}:)?(?:[ \t,]*(?:{_TAG}))+[ \t,]*$", re.MULTILINE
)
"""Placeholders before or after all other text, or on a line of their own, after ``User:`` or another label."""
_TOKEN = re.compile(
    r"<\|(?:image|audio|video|vision|IMAGE|AUDIO)(?:_?(?:pad|start|end|token|placeholder|\d+))?\|>"
    r"|<(?:image|audio|video|img|IMG)[_ -](?:\d+|placeholder|token|soft_token|pad|here|CONTEXT)>"
    r"|<(?:start_of_image|ImageHere)>"
)
"""A placeholder that is nothing else."""
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def placeholder_notes(
    prompt: Messages | str, completions: Iterable[tuple[str, Messages | str]] = ()
) -> tuple[tuple[str, str], ...]:
    """A note on the placeholders within the texts of a prompt and its completions, if they have any.

    Args:
        completions: field and content of each.

    Raises:
        Unusable: a text of the user or of the assistant has a placeholder that stands for media: neither in
            code nor in a sentence.
    """
    texts = [("prompt", isinstance(prompt, str), prompt_turns(prompt))] if prompt else []
    texts += [(name, isinstance(completion, str), as_turns(completion)) for name, completion in completions]
    details = []
    for name, is_text, turns in texts:
        for i, message in enumerate(turns):
            content, where = message["content"] or "", name if is_text else f"{name}[{i}].content"
            if message["role"] in ("user", "assistant") and (placeholder := _stand_in(content, message["role"])):
                bad_field(where, f"the placeholder {placeholder}", "text without images, audio or video")
            if mentions := dict.fromkeys((*_TAGS.findall(content), *_TOKEN.findall(content))):
                details.append(f"{where}: {' '.join(mentions)}")
    return (("media_placeholder", ", ".join(details)),) if details else ()


def _stand_in(content: str, role: str) -> str | None:
    """The first placeholder of a text that stands for media; None if there is none."""
    text = _CODE.sub("code", content)
    for tag, closing in _CLOSING.items():
        text = text.replace(tag, "code") if closing in text else text
    if token := _TOKEN.search(text):
        return token[0]
    apart = _TAG_APART.search(text)
    tags = _TAGS.findall(apart[0]) if apart else []
    # An answer of only a tag names it.
    return tags[0] if tags and (role == "user" or text.strip() != tags[0]) else None

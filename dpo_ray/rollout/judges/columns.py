"""Columns of the prompts' records, as judges read them."""

from collections.abc import Sequence
from typing import Any

from dpo_ray.types import Prompt

GOLD = ("answer", "ground_truth", "label")
"""Synonyms of the column with the reference answer."""


class Column:
    """One column of the records that a judge needs.

    ``answer``, ``ground_truth`` and ``label`` are synonyms; the exact name wins. verl's ``reward_model.ground_truth``
    is one more of them.

    Args:
        name: of the column.
        judge: for messages.
    """

    def __init__(self, name: str, judge: str) -> None:
        self.name, self._judge = name, judge
        self.found = False
        """True when a record had the column."""

    def lookup(self, prompts: Sequence[Prompt]) -> list[Any]:
        """The value of each prompt's record, None where it has none."""
        values = [_value(prompt, self.name) for prompt in prompts]
        self.found = self.found or any(value is not None for value in values)
        return values

    def require(self, prompts: Sequence[Prompt]) -> list[Any]:
        """As ``lookup``.

        Raises:
            ValueError: no record has the column, here or in an earlier call.
        """
        values = self.lookup(prompts)
        if prompts and not self.found:
            present = ", ".join(sorted({name for prompt in prompts for name in prompt.fields})) or "none"
            synonyms = f" (or {' or '.join(name for name in GOLD if name != self.name)})" if self.name in GOLD else ""
            raise ValueError(
                f"judge {self._judge!r} needs the field {self.name!r}{synonyms} of the prompts' records; "
                f"the fields of prompt {prompts[0].index} and the others of this call: {present}"
            )
        return values


def _value(prompt: Prompt, name: str) -> Any:
    fields = prompt.fields
    if fields.get(name) is not None or name not in GOLD:
        return fields.get(name)
    nested = fields.get("reward_model")
    values = [nested.get("ground_truth") if isinstance(nested, dict) else None, *(fields.get(gold) for gold in GOLD)]
    return next((value for value in values if value is not None), None)

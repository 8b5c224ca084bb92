"""Columns of the prompts' records, as judges read them."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

from dpo_ray.types import Prompt

logger = logging.getLogger(__name__)

GOLD = ("answer", "ground_truth", "label")
"""Synonyms of the column with the reference answer."""
NESTED = "reward_model.ground_truth"
"""Key of that answer in verl's records."""


class Column:
    """One column of the records that a judge reads.

    ``answer``, ``ground_truth`` and ``label`` are synonyms; the exact name wins. verl's ``reward_model.ground_truth``
    is one more of them.

    Args:
        name: of the column.
        judge: for messages.
    """

    def __init__(self, name: str, judge: str) -> None:
        self.name, self._judge = name, judge

    def lookup(self, prompts: Sequence[Prompt]) -> list[Any]:
        """The value of each prompt's record, None where it has none."""
        return [_value(prompt, self.name) for prompt in prompts]

    def is_in(self, columns: Collection[str]) -> bool:
        """True if the column, or a synonym of it, is one of ``columns``."""
        return self.name in columns or (self.name in GOLD and not {*GOLD, NESTED}.isdisjoint(columns))

    def require(self, columns: Collection[str] | None) -> None:
        """Check that the prompts have the column.

        Args:
            columns: see ``columns_of``; None if they are not known, which passes.

        Raises:
            ValueError: no record has it.
        """
        if columns is not None and not self.is_in(columns):
            synonyms = f" (or {' or '.join(name for name in GOLD if name != self.name)})" if self.name in GOLD else ""
            raise ValueError(
                f"judge {self._judge!r} needs the column {self.name!r}{synonyms} of the prompts' records, and no "
                f"record has it; available columns: {', '.join(sorted(columns)) or 'none'}"
            )


def label_column(judge: str, columns: Collection[str] | None) -> Column:
    """The column with the labels that a reward function of OpenRLHF gets; a missing one is logged.

    Args:
        columns: of the prompts' records, see ``columns_of``; None if they are not known.
    """
    labels = Column("label", judge)
    if columns is not None and not labels.is_in(columns):
        logger.warning("no record has a field answer, ground_truth or label; labels are empty strings")
    return labels


def columns_of(prompts: Sequence[Prompt]) -> set[str]:
    """Columns of which at least one record has a value."""
    names = {name for prompt in prompts for name, value in prompt.fields.items() if value is not None}
    return names | ({NESTED} if any(_nested(prompt) is not None for prompt in prompts) else set())


def _value(prompt: Prompt, name: str) -> Any:
    fields = prompt.fields
    if fields.get(name) is not None or name not in GOLD:
        return fields.get(name)
    values = [_nested(prompt), *(fields.get(gold) for gold in GOLD)]
    return next((value for value in values if value is not None), None)


def _nested(prompt: Prompt) -> Any:
    value = prompt.fields.get("reward_model")
    return value.get("ground_truth") if isinstance(value, dict) else None

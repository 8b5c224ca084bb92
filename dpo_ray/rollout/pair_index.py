"""The pairs of a round as training reads them: ``pairs.i64`` and ``gaps.f64``, in the order of the prompts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.rollout.tally import Line
from dpo_ray.storage import write_atomically

SPANS, GAPS, REFERENCE = "pairs.i64", "gaps.f64", "reference.f64"


@dataclass(frozen=True, slots=True)
class PairIndex:
    """Positions of the pairs in tokens.i32, and their gaps, by the position of their prompt in the round."""

    spans: dict[int, list[list[int]]] = field(default_factory=dict)
    gaps: dict[int, list[float]] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Add the pairs of a line."""
        if line["pairs"]:
            self.spans[line["position"]] = _pair_spans(line)
            self.gaps[line["position"]] = [_gap(pair) for pair in line["pairs"]]

    def write(self, folder: Path) -> None:
        """Write both files; the positions last, because a round without them is not finished."""
        for name, values, dtype in ((GAPS, self.gaps, np.float64), (SPANS, self.spans, np.int64)):
            rows: list[Any] = [row for position in sorted(values) for row in values[position]]
            write_atomically(folder / name, np.array(rows, dtype).tobytes())


def memory_map(path: Path, dtype: Any) -> np.ndarray:
    """The values of a file, read where they are used."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # an empty file cannot be mapped


def _pair_spans(line: Line) -> list[list[int]]:
    """Start and length of prompt, chosen and rejected of each pair of a line, in tokens."""
    start, prompt = line["tokens"]["start"], line["tokens"]["prompt"]
    lengths = [candidate["tokens"] for candidate in line["candidates"]]
    starts = [start + prompt + sum(lengths[:i]) for i in range(len(lengths))]
    return [
        [
            start,
            prompt,
            *(part for side in ("chosen", "rejected") for part in (starts[pair[side]], lengths[pair[side]])),
        ]
        for pair in line["pairs"]
    ]


def _gap(pair: Mapping[str, Any]) -> float:
    """``ScoredPair.gap`` of a pair of a line; NaN without scores."""
    if (gap := pair.get("gap")) is not None:
        return gap
    chosen, rejected = pair["chosen_score"], pair["rejected_score"]
    return math.nan if chosen is None or rejected is None else chosen - rejected

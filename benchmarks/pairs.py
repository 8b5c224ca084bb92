"""Generated pairs for benchmarks: real words, with the lengths of two kinds of preference data."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = {"answers": ((4.2, 0.8), (5.3, 0.6)), "dialogue": ((6.2, 0.4), (3.4, 0.5))}
"""Mean and standard deviation of the log length of prompt and completion, in words. answers: long answers to short
questions, about 65 and 200 words. dialogue: short turns after long conversations, about 490 and 30 words."""

TEXTS = Path(__file__).parents[1] / "jobs/data/demo_pairs.jsonl"


def generate_pairs(kind: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield ``count`` pairs whose chosen and rejected differ."""
    words = TEXTS.read_text(encoding="utf-8").split()
    draw = random.Random(seed)
    prompt, completion = KINDS[kind]

    def text(mean: float, deviation: float) -> str:
        length = max(3, min(600, round(draw.lognormvariate(mean, deviation))))
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    for _ in range(count):
        yield {
            "prompt": [{"role": "user", "content": text(*prompt)}],
            "chosen": [{"role": "assistant", "content": text(*completion)}],
            "rejected": [{"role": "assistant", "content": text(*completion)}],
        }

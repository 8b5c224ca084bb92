"""Hand-written groups of completions for the tests of rollout."""

from collections.abc import Callable

import pytest

from dpo_ray.types import Completion, CompletionGroup, Prompt

MakeGroup = Callable[..., CompletionGroup]


@pytest.fixture
def group() -> MakeGroup:
    """Builds a group from texts; a text of n words has tokens 1 to n and the end-of-turn token 0."""

    def make(
        *texts: str, index: int = 0, policy_version: int = 0, seed: int = 7, finished: bool = True
    ) -> CompletionGroup:
        return CompletionGroup(
            prompt=Prompt(index, ({"role": "user", "content": f"question {index}"},), (100, index)),
            completions=tuple(
                Completion(text, (*range(1, len(text.split()) + 1), 0), finished, policy_version, policy_version)
                for text in texts
            ),
            seed=seed,
        )

    return make

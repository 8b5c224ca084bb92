"""Failed requests to an endpoint: when so many make it unavailable, and what their messages must not show."""

from dpo_ray.config.secrets import mask_secrets
from dpo_ray.types import JudgeUnavailable

REJECTED = (400, 413, 422)
"""Statuses that concern one request; others, such as 401 and 404, concern all."""


class FailuresInARow:
    """Counts the failed requests of all groups since the latest answer.

    Args:
        most: failures after which the endpoint counts as unavailable.
        attempts: most attempts of each request.
    """

    def __init__(self, most: int, *, attempts: int) -> None:
        self.most, self.attempts, self.failed = most, attempts, 0

    def reset(self) -> None:
        """The endpoint works: it answered, or rejected a single request."""
        self.failed = 0

    def count(self, endpoint: str, error: Exception) -> None:
        """Counts a failure.

        Raises:
            JudgeUnavailable: it is one too many.
        """
        self.failed += 1
        if self.failed >= self.most:
            raise JudgeUnavailable(
                f"{endpoint} is unavailable: {self.failed} requests in a row failed (online.judge.args.max_failures is "
                f"{self.most}, each was tried up to {self.attempts} times); the last: {error}"
            ) from None


def masked(text: str, key: str | None) -> str:
    """``text`` without the key of an endpoint and without what looks like another secret."""
    return mask_secrets(text.replace(key, "(hidden)") if key else text)

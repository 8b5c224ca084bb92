"""Admission: which rounds may be collected. Nothing else decides."""


def admitted(version: int, *, max_lag: int, rounds: int) -> range:
    """The rounds that may be collected while the trainer has finished ``version`` rounds and ``version`` is published.

    Round r, on which version r trains, needs a policy at most ``max_lag`` rounds old: ``version + max_lag >= r``.
    """
    return range(version, min(version + max_lag + 1, rounds))


def oldest_version(round: int, *, max_lag: int) -> int:
    """Oldest policy version that may sample a token of a round."""
    return max(0, round - max_lag)

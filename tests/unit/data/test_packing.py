"""Rows, masks and the sharing of work."""

import numpy as np
import pytest
import torch

from dpo_ray.data.loader import BatchShape, PairLoader, epoch_order
from dpo_ray.data.packing import attention_mask, build_rows, build_sample_rows, deal
from dpo_ray.types import TokenPair, TokenSample

PAIR = TokenPair(prompt=(1, 2), chosen=(3, 4), rejected=(5,))


def test_a_shared_row_holds_the_prompt_once_and_both_completions_restart_after_it() -> None:
    rows = build_rows([PAIR], "shared")
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert rows.labels.tolist() == [3, 4, 5]
    assert rows.source.tolist() == [1, 2, 1], "the last prompt token predicts the first token of both completions"
    assert rows.sequence.tolist() == [0, 0, 1]
    assert rows.lengths.tolist() == [2, 1]


def test_the_rejected_completion_sees_the_prompt_and_itself_but_not_the_chosen_one() -> None:
    mask = attention_mask(build_rows([PAIR], "shared"))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_padding_attends_to_something_and_nothing_attends_to_padding() -> None:
    mask = attention_mask(build_rows([PAIR, TokenPair((1,), (2,), (3,))], "shared"))
    assert mask.any(-1).all()
    assert not mask[1, 0, :3, 3:].any()


def test_plain_rows_repeat_the_prompt_before_each_completion() -> None:
    rows = build_rows([PAIR], "plain")
    assert rows.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 5, 0]]
    assert rows.labels.tolist() == [3, 4, 5]
    assert rows.source.tolist() == [1, 2, 5]


def test_sample_rows_hold_one_sequence_each() -> None:
    rows = build_sample_rows([TokenSample((1,), (2, 3)), TokenSample((4, 5), (6,))])
    assert rows.lengths.tolist() == [2, 1]
    assert rows.sequence.tolist() == [0, 0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 4, 29])
def test_every_row_is_dealt_once_and_every_rank_gets_as_many_micro_batches(ranks: int, rows: int) -> None:
    lengths = np.random.default_rng(rows).integers(1, 200, rows)
    dealt = deal(lengths, ranks=ranks, tokens_per_micro_batch=400)
    assert len(dealt) == ranks
    assert len({len(mine) for mine in dealt}) == 1
    assert sorted(row for mine in dealt for batch in mine for row in batch) == list(range(rows))
    for mine in dealt:
        for batch in mine:
            assert len(batch) <= 1 or len(batch) * max(lengths[list(batch)]) <= 400


def area(batch: tuple[int, ...], lengths: np.ndarray) -> int:
    return len(batch) * int(max(lengths[list(batch)], default=0))


@pytest.mark.parametrize(("rows", "ranks"), [(64, 4), (12, 2), (31, 2), (64, 8)])
def test_ranks_get_near_equal_work(rows: int, ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(120, 220, rows)
    dealt = deal(lengths, ranks=ranks, tokens_per_micro_batch=2048)
    work = [sum(area(batch, lengths) for batch in mine) for mine in dealt]
    assert max(work) / min(work) < 1.25
    assert max(work) * ranks / lengths.sum() < 1.25, "padding and the slowest rank together"


def test_length_buckets_leave_little_padding() -> None:
    # Unsorted, rows of 50 to 800 tokens would be padded to the longest of their batch: about 800 / 425 = 1.9 times.
    lengths = np.random.default_rng(0).integers(50, 800, 64)
    (batches,) = deal(lengths, ranks=1, tokens_per_micro_batch=4096)
    assert sum(area(batch, lengths) for batch in batches) / lengths.sum() < 1.15


def loader(pairs: int, consumed: int = 0, **changes: int | bool) -> PairLoader:
    source = [TokenPair((i + 1,), (1,), (2,)) for i in range(pairs)]
    settings = {"pairs_per_step": 4, "seed": 3, "shuffle": True} | changes
    return PairLoader(source, BatchShape(0, 1, 64), consumed=consumed, **settings)  # type: ignore[arg-type]


def test_an_epoch_holds_every_pair_once_and_its_last_step_takes_what_is_left() -> None:
    steps = [next(batches) for batches in [loader(10)] for _ in range(3)]
    assert [len(step.pairs) for step in steps] == [4, 4, 2]
    assert sorted(pair for step in steps for pair in step.pairs) == list(range(10))
    assert steps[-1].epoch == 1.0


def test_epochs_come_in_different_orders_fixed_by_the_seed() -> None:
    first, second = (epoch_order(50, seed=3, epoch=epoch, shuffle=True).tolist() for epoch in (0, 1))
    assert first != second
    assert first == epoch_order(50, seed=3, epoch=0, shuffle=True).tolist()
    assert first != epoch_order(50, seed=4, epoch=0, shuffle=True).tolist()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_loader_that_starts_after_what_was_consumed_goes_on_where_the_other_stopped(steps: int) -> None:
    undisturbed = loader(10)
    for _ in range(steps):
        next(undisturbed)
    resumed = loader(10, consumed=undisturbed.consumed)
    assert [next(undisturbed).pairs for _ in range(4)] == [next(resumed).pairs for _ in range(4)]


def test_without_shuffling_pairs_keep_the_order_of_the_file() -> None:
    assert next(loader(10, shuffle=False)).pairs == (0, 1, 2, 3)


def test_both_layouts_carry_the_same_labels() -> None:
    shared, plain = (build_rows([PAIR, TokenPair((9,), (8, 7), (6, 5, 4))], layout) for layout in ("shared", "plain"))
    assert torch.equal(shared.labels, plain.labels)
    assert torch.equal(shared.sequence, plain.sequence)

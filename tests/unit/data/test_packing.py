"""Rows, masks and the sharing of work."""

import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.data.assignment import PIECES, attended, balance_micro_batches, shard_row
from dpo_ray.data.loader import BatchShape, Mixture, PairLoader, checked_gaps, epoch_order
from dpo_ray.data.packing import (
    Layout,
    Span,
    attention_mask,
    build_row,
    build_sample_row,
    padded_positions,
    row_tokens,
    token_limits,
)
from dpo_ray.types import TokenPair, TokenSample
from tests.pair_list import PairList

PAIR = TokenPair(prompt=(1, 2), chosen=(3, 4), rejected=(5,))


def test_a_shared_row_holds_the_prompt_once_and_both_completions_restart_after_it() -> None:
    row = build_row([PAIR, TokenPair((6,), (7,), (8, 9))], "shared")
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert row.spans == ((2, 2, 1), (1, 1, 2))
    assert row.labels.tolist() == [3, 4, 5, 7, 8, 9]
    assert row.source.tolist() == [1, 2, 1, 5, 5, 7], "the last prompt token predicts the first of both completions"
    assert row.sequence.tolist() == [0, 0, 1, 2, 3, 3]
    assert row.lengths.tolist() == [2, 1, 1, 2]


def test_a_completion_sees_its_prompt_and_itself_and_nothing_else() -> None:
    mask = attention_mask(build_row([PAIR, TokenPair((6,), (7,), (8,))], "shared").spans)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]


def test_plain_rows_repeat_the_prompt_before_each_completion() -> None:
    row = build_row([PAIR], "plain")
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 5]]
    assert row.spans == ((2, 2), (2, 1))
    assert row.pairs.tolist() == [[0, 1]]
    assert row.labels.tolist() == [3, 4, 5]
    assert row.source.tolist() == [1, 2, 5]


def test_pairs_of_one_prompt_share_its_span_and_their_completions() -> None:
    best, middle, worst = (3, 4), (5,), (6, 7, 8)
    row = build_row([TokenPair((1, 2), best, worst), TokenPair((1, 2), middle, worst), PAIR], "shared")
    assert row.spans == ((2, 2, 3, 1),), "prompt, best, worst, middle"
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 6, 7, 8, 5]]
    assert row.pairs.tolist() == [[0, 1], [2, 1], [0, 2]]
    assert row.lengths.tolist() == [2, 3, 1]
    assert row.prompts == ((3, 3, 6),)
    plain = build_row([TokenPair((1, 2), best, worst), TokenPair((1, 2), middle, worst), PAIR], "plain")
    assert plain.spans == ((2, 2), (2, 3), (2, 1))
    assert (plain.pairs.tolist(), plain.prompts) == (row.pairs.tolist(), row.prompts)
    other = build_row([TokenPair((1, 2), best, worst), TokenPair((9,), middle, worst), PAIR], "shared")
    assert other.spans == ((2, 2, 3), (1, 1, 3), (2, 2, 1)), "only pairs that follow each other share a span"
    assert other.pairs.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_pairs_of_different_records_with_the_same_prompt_share_nothing() -> None:
    ranked, opposite = TokenPair((1,), (2,), (3,)), TokenPair((1,), (3,), (2,))
    assert build_row([ranked, opposite], "shared").pairs.tolist() == [[0, 1], [1, 0]]
    assert build_row([ranked, opposite], "shared", [5, 6]).pairs.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("layout", ["shared", "plain", "padded"])
def test_the_empty_place_beside_a_completion_costs_nothing(layout: Layout) -> None:
    row = build_row([TokenPair((1, 2), (3,), (), 1), TokenPair((4,), (), (5, 6), -1)], layout)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert row.spans == ((2, 1, 0), (1, 2, 0))
    assert row.pairs.tolist() == [[0, 1], [3, 2]]
    assert row.lengths.tolist() == [1, 0, 2, 0]
    assert row.unpaired.tolist() == [1, -1]


def test_padded_micro_batches_count_the_padding_of_every_sequence() -> None:
    # A list of 10 sequences of 50 tokens and a pair of 200: together they would be padded to 12 * 200.
    tokens, rows = np.array([500, 400]), np.array([10, 2])
    (share,) = balance_micro_batches(tokens, tokens, ranks=1, tokens_per_micro_batch=1000, rows=rows).micro_batches
    assert sorted(share) == [(0,), (1,)]


def test_sample_rows_hold_one_sequence_each() -> None:
    row = build_sample_row([TokenSample((1,), (2, 3)), TokenSample((4, 5), (6,))])
    assert row.lengths.tolist() == [2, 1]
    assert row.sequence.tolist() == [0, 0, 1]
    assert row.spans == ((1, 2), (2, 1))
    assert row.pairs.shape == (0, 2)


def test_row_tokens_and_attended_pairs_follow_from_the_lengths() -> None:
    lengths = np.array([[2, 2, 1]])
    assert row_tokens(lengths, "shared").tolist() == [5]
    assert row_tokens(lengths, "plain").tolist() == [7]
    assert row_tokens(lengths, "padded").tolist() == [8], "two sequences of the longer one's four tokens"
    # prompt 2 * 2 / 2, chosen 2 * (2 + 1), rejected 1 * (2 + 1/2)
    assert attended(lengths).tolist() == [2 + 6 + 2.5]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 29])
def test_every_item_is_assigned_once_and_ranks_get_equal_micro_batch_counts(ranks: int, items: int) -> None:
    tokens = np.random.default_rng(items).integers(1, 500, items)
    shares = balance_micro_batches(tokens, tokens, ranks=ranks, tokens_per_micro_batch=400).micro_batches
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert sorted(item for share in shares for batch in share for item in batch) == list(range(items))
    for share in shares:
        for batch in share:
            assert len(batch) <= 1 or tokens[list(batch)].sum() <= 400


@pytest.mark.parametrize(("items", "ranks"), [(64, 4), (12, 2), (31, 2), (64, 8)])
def test_ranks_get_near_equal_work(items: int, ranks: int) -> None:
    tokens = np.random.default_rng(0).integers(50, 800, items)
    costs = tokens + tokens.astype(float) ** 2 / 3000
    dealt = balance_micro_batches(tokens, costs, ranks=ranks, tokens_per_micro_batch=4096)
    work = [[costs[list(batch)].sum() for batch in share] for share in dealt.micro_batches]
    slowest = sum(max(turn) for turn in zip(*work, strict=True)) * ranks
    assert dealt.idle == pytest.approx(1 - costs.sum() / slowest)
    assert dealt.idle < 0.1


def test_micro_batches_are_filled_to_the_token_limit() -> None:
    tokens = np.random.default_rng(0).integers(50, 800, 64)
    (share,) = balance_micro_batches(tokens, tokens, ranks=1, tokens_per_micro_batch=4096).micro_batches
    assert len(share) == -(-tokens.sum() // 4096), "as few as all of the tokens need"


@pytest.mark.parametrize(("ranks", "turns"), [(1, 5), (2, 3)])
def test_items_longer_than_a_micro_batch_run_alone_and_none_is_empty_for_their_sake(ranks: int, turns: int) -> None:
    tokens = np.array([3000, 1025, 9000, 2000, 1500])
    shares = balance_micro_batches(tokens, tokens, ranks=ranks, tokens_per_micro_batch=1024).micro_batches
    assert [len(share) for share in shares] == [turns] * ranks
    assert [len(batch) for share in shares for batch in share].count(0) == ranks * turns - 5


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 29, 300])
def test_padded_micro_batches_hold_items_of_like_length_within_the_limit(ranks: int, items: int) -> None:
    tokens = np.random.default_rng(items).integers(1, 500, items)
    assigned = balance_micro_batches(
        tokens, tokens, ranks=ranks, tokens_per_micro_batch=2000, rows=np.ones_like(tokens)
    )
    batches = [tokens[list(batch)] for share in assigned.micro_batches for batch in share]
    assert sorted(item for share in assigned.micro_batches for batch in share for item in batch) == list(range(items))
    assert len({len(share) for share in assigned.micro_batches}) == 1
    assert all(len(batch) * batch.max() <= 2000 for batch in batches if len(batch))
    computed = sum(len(batch) * batch.max() for batch in batches if len(batch))
    assert computed <= 1.1 * tokens.sum() or items < 300
    fewest = -(-tokens.sum() // 2000)
    assert len(batches) <= max(1.2 * fewest, 1) + ranks


def test_padded_micro_batches_have_like_costs() -> None:
    tokens = np.random.default_rng(0).integers(50, 800, 64)
    assigned = balance_micro_batches(tokens, tokens, ranks=4, tokens_per_micro_batch=4096, rows=np.ones_like(tokens))
    assert assigned.idle < 0.15


def test_padded_sequences_lie_at_the_starts_of_their_rows() -> None:
    shape, positions = padded_positions(build_row([PAIR], "padded").spans)
    assert shape == (2, 4)
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("padded", [False, True])
def test_a_large_step_is_balanced_in_milliseconds(padded: bool) -> None:
    tokens = np.random.default_rng(0).integers(50, 4000, 4096)
    started = time.perf_counter()
    balance_micro_batches(
        tokens, tokens, ranks=256, tokens_per_micro_batch=8192, rows=np.ones_like(tokens) if padded else None
    )
    assert time.perf_counter() - started < 0.5


def loader(pairs: int, consumed: int = 0, **changes: int | bool) -> PairLoader:
    source = PairList([TokenPair((i + 1,), (1,), (2,)) for i in range(pairs)])
    settings = {"pairs_per_step": 4, "seed": 3, "shuffle": True} | changes
    return PairLoader(source, BatchShape(0, 1, 64, 0.001), consumed=consumed, **settings)  # type: ignore[arg-type]


def test_an_epoch_has_every_pair_once_and_its_last_step_the_remaining_ones() -> None:
    steps = [next(batches) for batches in [loader(10)] for _ in range(3)]
    assert [len(step.pairs) for step in steps] == [4, 4, 2]
    assert sorted(pair for step in steps for pair in step.pairs) == list(range(10))
    assert steps[-1].epoch == 1.0


def test_epochs_come_in_different_orders_fixed_by_the_seed() -> None:
    first, second = (
        epoch_order(Mixture((50,), (1.0,)), seed=3, epoch=epoch, shuffle=True).tolist() for epoch in (0, 1)
    )
    assert first != second
    assert first == epoch_order(Mixture((50,), (1.0,)), seed=3, epoch=0, shuffle=True).tolist()
    assert first != epoch_order(Mixture((50,), (1.0,)), seed=4, epoch=0, shuffle=True).tolist()


def test_an_epoch_of_a_mixture_has_each_source_in_proportion_to_its_weight():
    mixture = Mixture((10, 4, 6), (0.5, 2.0, 1.0))
    assert len(mixture) == 5 + 8 + 6
    first, second = (epoch_order(mixture, seed=1, epoch=epoch, shuffle=True) for epoch in (0, 1))
    for order in (first, second):
        counts = np.bincount(order, minlength=20)
        assert counts[:10].sum() == 5
        assert counts[:10].max() == 1
        assert counts[10:14].tolist() == [2] * 4
        assert counts[14:].tolist() == [1] * 6
    # Two epochs at half weight are one pass.
    assert np.bincount(np.concatenate((first, second)), minlength=20)[:10].tolist() == [1] * 10


def test_a_weight_that_divides_nothing_evenly_still_sees_all_pairs_equally_often():
    mixture = Mixture((7,), (0.4,))
    orders = [epoch_order(mixture, seed=5, epoch=epoch, shuffle=True) for epoch in range(7)]
    assert [len(order) for order in orders] == [3] * 7
    assert np.bincount(np.concatenate(orders)).tolist() == [3] * 7


def test_a_mixture_without_shuffling_takes_the_sources_in_order():
    assert epoch_order(Mixture((4, 2), (0.5, 1.0)), seed=0, epoch=1, shuffle=False).tolist() == [2, 3, 4, 5]


def test_a_loader_of_a_mixture_steps_through_its_epochs():
    pairs = PairList([TokenPair((i,), (7,), (8,)) for i in range(6)])
    shape = BatchShape(dp_rank=0, dp_size=1, tokens_per_micro_batch=64, attention_cost=0.0)
    loader = PairLoader(pairs, shape, pairs_per_step=4, seed=0, shuffle=False, mixture=Mixture((4, 2), (1.0, 1.5)))
    assert loader.steps_per_epoch == 2
    assert [next(loader).pairs for _ in range(4)] == [(0, 1, 2, 3), (4, 5, 4), (0, 1, 2, 3), (5, 4, 5)]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_loader_resumes_after_the_consumed_pairs(steps: int) -> None:
    undisturbed = loader(10)
    for _ in range(steps):
        next(undisturbed)
    resumed = loader(10, consumed=undisturbed.consumed)
    assert [next(undisturbed).pairs for _ in range(4)] == [next(resumed).pairs for _ in range(4)]


@pytest.mark.parametrize("before", range(1, 13))
@pytest.mark.parametrize("consumed", [0, 3, 7, 10, 12, 25])
def test_the_steps_that_are_left_are_those_that_a_loader_takes(before: int, consumed: int) -> None:
    for until in range(40):
        resumed, steps = loader(10, consumed=consumed, pairs_per_step=before), 0
        expected = resumed.steps_until(until)
        while resumed.consumed < until:
            next(resumed)
            steps += 1
        assert steps == expected


def test_a_step_of_another_size_takes_the_pairs_that_are_left_and_is_a_part_of_the_epoch() -> None:
    first = loader(64, pairs_per_step=8)
    seen = [pair for _ in range(4) for pair in next(first).pairs]
    resumed = loader(64, consumed=first.consumed, pairs_per_step=16)
    assert (resumed.steps_until(64), resumed.epochs_after(), resumed.epochs_after(2)) == (2, 0.5, 1.0)
    assert sorted(seen + [pair for _ in range(2) for pair in next(resumed).pairs]) == list(range(64))


def ranked_pairs(prompts: int) -> list[TokenPair]:
    """Three pairs of four completions for every third prompt, one for the others."""
    completions = [tuple(range(100 * k, 100 * k + k)) for k in range(1, 5)]
    return [
        TokenPair((1, prompt), completions[best], completions[worst])
        for prompt in range(prompts)
        for best, worst in [(0, 3), (1, 3), (0, 2)][: 3 if prompt % 3 == 0 else 1]
    ]


@pytest.mark.parametrize("passes", [1.0, 0.5, 2.0])
def test_pairs_of_a_prompt_follow_each_other_in_every_epoch_and_none_is_lost(passes: float) -> None:
    pairs = ranked_pairs(12)  # 20 pairs
    epoch = PairLoader(
        PairList(pairs), BatchShape(0, 1, 10**6, 0.0), pairs_per_step=int(20 * passes), seed=1, shuffle=True,
        mixture=Mixture((20,), (passes,)),
    )  # fmt: skip
    first, second = next(epoch).pairs, next(epoch).pairs
    assert first != second
    seen = np.bincount(first + second, minlength=20)
    assert set(seen) == ({1} if passes == 0.5 else {2 * passes})
    for order in (first, second):
        prompts = [pairs[i].prompt for i in order]
        runs = 1 + sum(one != other for one, other in pairwise(prompts))
        assert runs <= len(set(prompts)) * max(1, int(passes))


def test_a_step_has_each_prompt_and_each_completion_once() -> None:
    pairs = ranked_pairs(6)  # prompts of 2 tokens; completions of 1 to 4
    shape = BatchShape(0, 1, 20, 0.0)
    batch = next(PairLoader(PairList(pairs), shape, pairs_per_step=len(pairs), seed=0, shuffle=False))
    # Two prompts with all four completions, four with those of 1 and 4 tokens.
    assert batch.tokens == 2 * (2 + 10) + 4 * (2 + 5)
    assert sum(micro.row.input_ids.numel() for micro in batch.micro_batches) == batch.tokens
    assert all(micro.row.input_ids.numel() <= 20 for micro in batch.micro_batches)
    assert sorted(pair for micro in batch.micro_batches for pair in micro.pairs) == list(range(len(pairs)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_weights_of_a_step_are_its_gaps_over_their_mean_on_any_number_of_ranks(ranks: int) -> None:
    source = PairList(ranked_pairs(6), gaps=[float(1 + i) for i in range(10)])
    batches = [
        next(
            PairLoader(
                source, BatchShape(rank, ranks, 20, 0.0), pairs_per_step=6, seed=3, shuffle=True, gaps=source.gaps
            )
        )
        for rank in range(ranks)
    ]
    weights = dict[int, float]()
    for micro in (micro for batch in batches for micro in batch.micro_batches):
        weights |= dict(zip(micro.pairs, micro.row.weights.tolist(), strict=True))
    mean = sum(1 + pair for pair in batches[0].pairs) / 6
    assert weights == pytest.approx({pair: (1 + pair) / mean for pair in batches[0].pairs})
    assert sum(weights.values()) == pytest.approx(6.0), "the mean weight is 1"


@pytest.mark.parametrize("gap", [0.0, 0.1, 7.0])
def test_equal_gaps_give_weights_of_exactly_one_as_pairs_without_weights_have(gap: float) -> None:
    source = PairList(ranked_pairs(6), gaps=[gap] * 10)
    for gaps in (source.gaps, None):
        batches = PairLoader(source, BatchShape(0, 1, 64, 0.0), pairs_per_step=7, seed=0, shuffle=True, gaps=gaps)
        rows = [micro.row for micro in next(batches).micro_batches]
        assert [weight for row in rows for weight in row.weights.tolist()] == [1.0] * 7


@pytest.mark.parametrize(
    ("gaps", "found"),
    [
        (None, r"pairs\[0\] has none"),
        ([1.0, math.nan], r"pairs\[1\] has none"),
        ([1.0, -0.5], r"\[1\] has a gap of -0.5"),
    ],
)
def test_pairs_without_scores_or_of_a_better_rejected_completion_cannot_be_weighted(
    gaps: list[float] | None, found: str
) -> None:
    with pytest.raises(ValueError, match=rf"loss.weighting: gap needs pairs with scores.*{found}; set loss.weighting"):
        checked_gaps(PairList([PAIR, PAIR], gaps=gaps))


def test_without_shuffling_pairs_keep_the_order_of_the_file() -> None:
    assert next(loader(10, shuffle=False)).pairs == (0, 1, 2, 3)


def test_both_layouts_carry_the_same_labels() -> None:
    shared, plain = (build_row([PAIR, TokenPair((9,), (8, 7), (6, 5, 4))], layout) for layout in ("shared", "plain"))
    assert torch.equal(shared.labels, plain.labels)
    assert torch.equal(shared.sequence, plain.sequence)


SPANS = st.lists(st.builds(Span, st.lists(st.integers(1, 60), min_size=1, max_size=5)), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(SPANS, st.integers(1, 5))
def test_a_sharded_row_has_each_token_once_and_each_label_on_the_rank_of_its_source(
    spans: list[Span], ranks: int
) -> None:
    cut, scored = shard_row(spans, ranks), np.ones(sum(sum(span.completions) for span in spans), bool)
    row = np.arange(sum(map(sum, cut.spans)))
    parts = [cut.positions[rank] for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(row) // ranks}
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), row)
    for rank, part in enumerate(parts):
        np.testing.assert_array_equal(np.concatenate([row[piece] for piece in cut.stretches(rank)]), part)
        assert set(token_limits(spans).sources[cut.labels(rank, scored)]) <= set(part.tolist())
    labels = np.concatenate([cut.labels(rank, scored) for rank in range(ranks)])
    np.testing.assert_array_equal(np.sort(labels), np.arange(len(scored)))
    assert 0 <= cut.padding < PIECES * ranks
    assert cut.spans[: len(spans)] == tuple(spans)


@settings(max_examples=200, deadline=None)
@given(SPANS, st.integers(1, 5))
def test_the_attention_of_ranks_differs_by_less_than_one_piece(spans: list[Span], ranks: int) -> None:
    cut = shard_row(spans, ranks)
    seen = token_limits(cut.spans).seen
    of_ranks = [seen[cut.positions[rank]].sum() for rank in range(ranks)]
    assert max(of_ranks) - min(of_ranks) < seen.reshape(PIECES * ranks, -1).sum(1).max() or ranks == 1


def test_a_causal_row_is_sharded_evenly() -> None:
    # Eight pieces of 100 tokens, the n-th with 100 * 100 n + 5050 pairs of tokens: 7 + 4 + 3 + 0 and 6 + 5 + 2 + 1.
    cut = shard_row([Span.of(800)], 2)
    assert cut.stretches(0) == (slice(0, 100), slice(300, 500), slice(700, 800))
    assert cut.stretches(1) == (slice(100, 300), slice(500, 700))
    assert [token_limits(cut.spans).seen[cut.positions[rank]].sum() for rank in range(2)] == [160_200, 160_200]


def test_seen_tokens_equal_the_row_sums_of_the_mask() -> None:
    row = build_row([PAIR, TokenPair((6,), (7,), (8, 9))], "shared")
    assert token_limits(row.spans).seen.tolist() == attention_mask(row.spans)[0, 0].sum(1).tolist()


def test_a_row_without_pairs_can_be_sharded() -> None:
    empty = build_row([], "shared")
    cut, scored = shard_row(empty.spans, 2), empty.scored
    assert cut.spans == ((1,), (7,))
    assert [len(cut.positions[rank]) for rank in range(2)] == [4, 4]
    assert [len(cut.labels(rank, scored)) for rank in range(2)] == [0, 0]


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_tokens_without_loss_are_part_of_the_input_and_no_labels(layout: Layout) -> None:
    # Tokens 7 and 8 of chosen are the answer of a tool.
    row = build_row([TokenPair((1, 2), (5, ~7, ~8, 9), (6,)), TokenPair((3,), (4,), (~10, 11))], layout)
    shared = [1, 2, 5, 7, 8, 9, 6, 3, 4, 10, 11]
    plain = [1, 2, 5, 7, 8, 9, 1, 2, 6, 3, 4, 3, 10, 11]
    assert row.input_ids[0].tolist() == (shared if layout == "shared" else plain)
    assert row.labels.tolist() == [5, 9, 6, 4, 11]
    assert row.lengths.tolist() == [2, 1, 1, 1]
    assert row.prompts == ((1, 2, 3), (1, 2, 2)), "pairs, sequences and labels"
    assert row.sequence.tolist() == [0, 0, 1, 2, 3]
    # The hidden state before a label predicts it: 2 -> 5, 8 -> 9, 2 -> 6, 3 -> 4, 10 -> 11.
    assert row.input_ids[0][row.source].tolist() == [2, 8, 2, 3, 10]
    split = [shard_row(row.spans, 2).labels(rank, row.scored) for rank in range(2)]
    assert sorted(np.concatenate(split).tolist()) == [0, 1, 2, 3, 4]

"""The block mask of packed rows against the dense mask, and flex_attention's log-probabilities against masked ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dpo_ray.config.schema import ModelConfig
from dpo_ray.data.assignment import shard_row
from dpo_ray.data.packing import Span, attention_mask, build_row
from dpo_ray.model.load import build_model, resolve_attention
from dpo_ray.model.scorer import Scorer, pair_logps, pair_losses
from dpo_ray.ops.flex import BLOCK, _softcap, local_limits, span_mask, token_limits, visible_blocks
from dpo_ray.ops.windows import Window
from tests.unit.model.test_scorer import preference, ragged_pairs

SPANS = st.lists(st.builds(Span, st.lists(st.integers(1, 30), min_size=1, max_size=5)), min_size=1, max_size=6)
WINDOWS = st.one_of(st.none(), st.builds(Window, st.sampled_from([1, 5, 20]), st.booleans()))


def dense_mask(spans: Sequence[Span], window: Window | None = None) -> np.ndarray:
    mask = attention_mask(spans)[0, 0].numpy()
    if window is None:
        return mask
    position = np.concatenate(
        [np.r_[(slice(s.prompt), *(slice(s.prompt, s.prompt + c) for c in s[1:]))] for s in spans]
    )
    query, key = position[:, None], position[None]
    return mask & (query // window.size == key // window.size if window.chunked else query - key < window.size)


@settings(max_examples=200, deadline=None)
@given(SPANS, st.sampled_from([4, 8, 16]), WINDOWS)
def test_blocks_equal_those_of_the_dense_mask(spans: list[Span], block: int, window: Window | None) -> None:
    mask = dense_mask(spans, window)
    blocks = -(-len(mask) // block)
    padded = np.zeros((blocks * block,) * 2, bool)
    padded[: len(mask), : len(mask)] = mask
    tiles = padded.reshape(blocks, block, blocks, block).swapaxes(1, 2)
    some = tiles.any((2, 3))
    # A short last block is full if its existing rows are.
    padded[len(mask) :] = True
    full = padded.reshape(blocks, block, blocks, block).swapaxes(1, 2).all((2, 3)) & some
    limits = token_limits(spans)
    visible = visible_blocks(limits if window is None else local_limits(limits, window), len(mask), block)
    np.testing.assert_array_equal(visible.full, full)
    np.testing.assert_array_equal(visible.partial, some & ~full)


@pytest.mark.parametrize("window", [None, Window(140), Window(140, chunked=True)])
def test_the_block_mask_equals_the_one_that_torch_creates_from_its_mask_function(window: Window | None) -> None:
    spans = [Span.of(200, 90, 150), Span.of(300, 0, 0), Span.of(3, 400, 260)]
    mask = span_mask(spans, torch.device("cpu"), window=window)
    tokens = sum(map(sum, spans))
    assert mask.mask_mod is not None
    evaluated = create_block_mask(mask.mask_mod, 1, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(mask.to_dense(), evaluated.to_dense())
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), query.expand(tokens, tokens), key.expand(tokens, tokens))
    np.testing.assert_array_equal(seen.numpy(), dense_mask(spans, window))


@settings(max_examples=100, deadline=None)
@given(SPANS, st.sampled_from([1, 2, 3]), st.sampled_from([4, 16]))
def test_blocks_of_a_ranks_tokens_equal_those_of_their_rows_of_the_dense_mask(
    spans: list[Span], ranks: int, block: int
) -> None:
    split = shard_row(spans, ranks)
    mask = dense_mask(split.spans)
    for rank in range(ranks):
        queries = split.positions[rank]
        rows = mask[queries]
        blocks = visible_blocks(token_limits(split.spans).of(queries), len(mask), block)
        for q in range(-(-len(queries) // block)):
            for k in range(-(-len(mask) // block)):
                tile = rows[q * block : (q + 1) * block, k * block : (k + 1) * block]
                full = tile.all() and tile.shape[1] == block
                assert (blocks.partial[q, k], blocks.full[q, k]) == (tile.any() and not full, full)


def test_the_mask_of_a_ranks_tokens_equals_their_rows_of_the_dense_mask() -> None:
    split = shard_row([Span.of(200, 90, 150), Span.of(300, 0, 0), Span.of(3, 401, 260)], 2)
    dense = dense_mask(split.spans)
    for rank in range(2):
        queries = split.positions[rank]
        mask = span_mask(split.spans, torch.device("cpu"), queries)
        shape = (len(queries), len(dense))
        assert mask.mask_mod is not None
        evaluated = create_block_mask(mask.mask_mod, 1, None, *shape, device="cpu", BLOCK_SIZE=BLOCK)
        assert torch.equal(mask.to_dense(), evaluated.to_dense())
        query, key = torch.arange(shape[0])[:, None].expand(shape), torch.arange(shape[1])[None].expand(shape)
        seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key)
        np.testing.assert_array_equal(seen.numpy(), dense[queries])


def test_most_blocks_of_a_row_of_many_pairs_are_skipped() -> None:
    # Eight spans of 1024 tokens in a row of 8192: 64 x 64 blocks. In a span of 8 blocks, prompt 4, completions 2 each,
    # causal blocks are 10 of the prompt and 2 x (2 x 4 + 3) of the completions.
    mask = span_mask([Span.of(512, 256, 256)] * 8, torch.device("cpu"))
    assert mask.full_kv_num_blocks is not None
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() == 8 * (10 + 2 * 11)
    assert mask.kv_num_blocks.sum() == 64, "only the diagonal needs the mask"
    assert mask.sparsity() == pytest.approx(100 * (1 - 256 / 4096))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flex_attention_has_the_logps_of_the_masked_row(tiny_model: Path, dtype: str) -> None:
    row = build_row(ragged_pairs(9), "shared")
    by_attention = {}
    for attention in ("flex", "sdpa"):
        config = ModelConfig(path=str(tiny_model), attention=attention)
        scorer = Scorer(build_model(config, with_weights=True, dtype=getattr(torch, dtype)))
        with torch.no_grad():
            logps = pair_logps(scorer, row)
        by_attention[attention] = torch.cat((logps.chosen, logps.rejected))
    tokens = row.lengths.float().mean()
    assert ((by_attention["flex"] - by_attention["sdpa"]).abs() / tokens).max() < (1e-5 if dtype == "float32" else 0.02)


def test_the_cap_of_logits_is_a_constant_of_the_compiled_kernel() -> None:
    arguments: list[torch.Tensor] = []

    def keep_arguments(graph: Any, inputs: list[Any]) -> Any:
        arguments.extend(x for x in inputs if isinstance(x, torch.Tensor))
        return graph.forward

    attend = torch.compile(flex_attention, dynamic=True, backend=keep_arguments)
    query, mask = torch.randn(1, 2, 20, 16), span_mask([Span.of(8, 7, 5)], torch.device("cpu"))
    capped = attend(query, query, query, score_mod=_softcap(0.5), block_mask=mask)
    assert {x.dtype for x in arguments} == {torch.float32, torch.int32}, "no float64 scalar"
    uncapped = attend(query, query, query, block_mask=mask)
    assert (capped - uncapped).abs().max() > 0.1


def test_flex_gradients_on_a_cpu_are_rejected(tiny_model: Path) -> None:
    scorer = Scorer(build_model(ModelConfig(path=str(tiny_model), attention="flex"), with_weights=True))
    with pytest.raises(NotImplementedError, match=r"model\.attention: flex has no gradients on a CPU"):
        pair_losses(scorer, build_row(ragged_pairs(3), "shared"), preference)


def test_auto_is_flex_on_gpus_and_packed_elsewhere() -> None:
    assert [resolve_attention("auto", device) for device in ("cuda", "cpu")] == ["flex", "packed"]
    assert resolve_attention("sdpa", "cuda") == "sdpa"

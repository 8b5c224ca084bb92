"""Gathering sharded weights to rank 0 over gloo: whole on rank 0, and nothing larger than a shard elsewhere."""

import math
from typing import Any

import pytest
from torch.distributed.tensor import Shard

from tests.distributed.conftest import over
from tests.distributed.parts import (
    SHARDED,
    SHARDED_TWICE,
    gathered,
    gathered_from_two_dimensions,
    merged_by_an_engine,
    published,
    raised,
)
from tests.distributed.processes import run_ranks


@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2)], ids=str)
def test_rank_0_gets_each_tensor_and_other_ranks_allocate_no_more_than_a_shard(mesh: tuple[int, ...]):
    first, *others = run_ranks(math.prod(mesh), gathered, mesh)
    assert [(there, whole) for there, whole, _ in first] == [(True, True)] * len(SHARDED)
    assert all(largest >= math.prod(shape) for (shape, _), (*_, largest) in zip(SHARDED, first, strict=True))
    for found in others:
        for (shape, placement), (there, _, largest) in zip(SHARDED, found, strict=True):
            rows = shape[placement.dim] if isinstance(placement, Shard) else math.prod(shape)
            size = math.ceil(rows / mesh[-1]) * math.prod(shape) // rows
            assert not there
            assert largest <= size, (shape, "padded to the largest shard")


@pytest.mark.parametrize("mesh", [(2, 2), (3, 2), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_a_tensor_that_fsdp_and_tensor_parallelism_shard_is_whole_on_rank_0_only(mesh: tuple[int, ...]):
    """The first rank of each group of tensor parallelism, or of FSDP, holds the shards of its group on the way."""
    first, *others = run_ranks(math.prod(mesh), gathered_from_two_dimensions, mesh)
    assert [(there, whole) for there, whole, _ in first] == [(True, True)] * len(SHARDED_TWICE)
    shards, tensor = mesh[-2:]
    for rank, found in enumerate(others, start=1):
        replica, shard, part = rank // (shards * tensor), rank // tensor % shards, rank % tensor
        for (shape, placement), (there, _, largest) in zip(SHARDED_TWICE, found, strict=True):
            assert not there
            sizes = [-(-size // (tensor if placement.is_shard(dim) else 1)) for dim, size in enumerate(shape)]
            sizes[0] = -(-sizes[0] // shards)
            members = 1 if replica or (shard and part) else shards if part else tensor
            assert largest <= members * math.prod(sizes), (rank, shape, largest)


@pytest.mark.parametrize(
    ("ranks", "lora", "shard"),
    [
        (2, None, {}),
        (3, None, {}),
        (2, {"rank": 5}, {}),
        (3, {"rank": 5}, {}),
        (4, None, {"tensor_parallel": 2}),
    ],
    ids=["full", "full, 3 ranks", "adapters", "adapters, 3 ranks", "full, tensor parallel"],
)
def test_only_rank_0_gets_weights_to_publish_and_they_equal_the_full_tensors(
    config: dict[str, Any], ranks: int, lora: dict[str, Any] | None, shard: dict[str, Any]
):
    config["model"]["lora"] = lora
    (names, difference, every), *others = run_ranks(ranks, published, over(ranks, config, **shard))
    assert len(names) == every == 20, "two layers of nine, an embedding and a norm; the head is the embedding"
    assert difference == 0
    assert others == [([], 0.0, 20)] * (ranks - 1)


def test_an_engine_that_merges_the_adapters_has_the_weights_of_the_policy_bit_for_bit(config: dict[str, Any]):
    config["model"] |= {"dtype": "bfloat16", "lora": {"rank": 5, "alpha": 7, "targets": ["q_proj", "down_proj"]}}
    (names, difference, elements), other = run_ranks(2, merged_by_an_engine, over(2, config))
    layer = ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert sorted(names) == sorted(f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in layer)
    assert difference == 0
    parts = 5 * (128 + 256) + 3 + 5 * (192 + 128) + 3
    assert elements == 2 * parts, "A, B and the three parts of the scale of q_proj and of down_proj"
    assert other == ([], 0.0, 0)


def test_every_rank_gets_the_result_or_the_error_of_rank_0():
    assert run_ranks(2, raised) == [("rank 0", "rank 0")] * 2

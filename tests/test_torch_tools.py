"""torch's counter of operations and its distributed tensors know our operators."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import adasplash2


@pytest.mark.parametrize("first", ["adasplash2", "torch.utils.flop_counter"])
def test_operations_are_counted_as_those_of_sdpa(first: str) -> None:
    """Whichever is imported first; and neither imports the other."""
    code = f"""
import sys, torch
import {first}
assert ("torch.utils.flop_counter" in sys.modules) == (not {first == "adasplash2"})
import adasplash2
from torch.utils.flop_counter import FlopCounterMode
q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (9, 7, 7))
found = []
for attention in (adasplash2.entmax_attention, torch.nn.functional.scaled_dot_product_attention):
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v).sum().backward()
    found.append(counter.get_total_flops())
forward = 2 * 2 * 4 * 9 * 7 * 16
assert found[0] == forward + forward // 2 * 5, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def counted(attention: Callable[..., Tensor], *arguments: Any, **named: Any) -> int:
    """Operations of a call and its backward."""
    with FlopCounterMode(display=False) as counter:
        out = attention(*arguments, **named)
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("is_causal", "pairs"), [(False, 3 * 4 + 5 * 5), (True, 6 + 15)])
def test_packed_sequences_count_the_pairs_that_queries_see(is_causal: bool, pairs: int) -> None:
    q, k, v = (torch.randn(n, 4, 8, requires_grad=True) for n in (8, 9, 9))
    ends = [torch.tensor([0, at, n], dtype=torch.int32) for at, n in ((3, 8), (4, 9))]
    found = counted(adasplash2.entmax_attention_varlen, q, k, v, *ends, is_causal=is_causal)
    assert found == (2 + 5) * 2 * 4 * pairs * 8


def test_lengths_count_the_pairs_that_queries_see() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    found = counted(adasplash2.entmax_attention, q, k, k, kv_lengths=lengths)
    assert found == 2 * 2 * 4 * 5 * (7 + 3) * 8


def test_pages_that_are_full_of_room_are_not_counted() -> None:
    q, pages = torch.randn(2, 4, 1, 8), torch.randn(5, 4, 4, 8)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    found = counted(
        adasplash2.entmax_attention_with_kvcache,
        q,
        pages,
        pages,
        cache_lengths=torch.tensor([6, 2], dtype=torch.int32),
        block_table=table,
    )
    assert found == 2 * 2 * 4 * (6 + 2) * 8


def test_in_a_trace_every_query_counts_with_every_key() -> None:
    with FakeTensorMode():
        q = torch.randn(8, 4, 8)
        ends = torch.tensor([0, 3, 8], dtype=torch.int32)
        assert counted(adasplash2.entmax_attention_varlen, q, q, q, ends, ends) == 2 * 4 * 64 * 16


def test_what_is_not_loaded_stays_so() -> None:
    """Importing these parts of torch takes seconds."""
    code = """
import sys, adasplash2, torch
adasplash2.entmax_attention(*torch.randn(3, 1, 1, 4, 4))
for name in ("torch.utils.flop_counter", "torch.distributed.tensor"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def _attend_sharded(rank: int, devices: int, port: int) -> None:
    from torch import distributed
    from torch.distributed.tensor import (
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=devices)
    mesh = init_device_mesh("cpu", (devices,))
    torch.manual_seed(0)
    whole = [torch.randn(2, heads, 9, 8) for heads in (4, 2, 2)]
    operands = {
        "sinks": torch.randn(4),
        "alpha": torch.tensor([1.2, 1.5, 1.7, 2.0]),
    }

    def step(tensors: list[Any], said: dict[str, Any]) -> list[Any]:
        given = {n: t.detach() for n, t in said.items() if isinstance(t, Tensor)}
        leaves = [t.detach() for t in tensors] + list(given.values())
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in leaves]
        names = {**said, **given}
        out = adasplash2.entmax_attention(*leaves[:3], is_causal=True, enable_gqa=True, **names)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    cut_by = (Shard(0), Shard(1), Replicate())

    def compare(said: dict[str, Any], placement: Any, its_placement: Any) -> None:
        cut = [distribute_tensor(t, mesh, [placement]) for t in whole]
        theirs = {
            name: distribute_tensor(one, mesh, [its_placement]) if isinstance(one, Tensor) else one
            for name, one in said.items()
        }
        found = step(cut, theirs)
        # What is whole may be cut as its mask is: nothing moves for that.
        expected_at = (its_placement,) if placement == Replicate() else (placement,)
        assert found[0].placements == expected_at, found[0].placements
        for one, other in zip(found, step(whole, said), strict=True):
            torch.testing.assert_close(one.full_tensor(), other, rtol=1e-5, atol=1e-5)

    for placement in cut_by:
        for said in ({}, operands):
            compare(said, placement, Replicate())
        for sizes in ((1, 1), (2, 1), (1, 4), (2, 4)):
            added = torch.randn(*sizes, 9, 9)
            for mask in (added, added > -1.0):
                for its_placement in cut_by:
                    if its_placement == Replicate() or sizes[its_placement.dim] > 1:
                        compare({"attn_mask": mask}, placement, its_placement)
    lengths = {
        name: torch.tensor(values, dtype=torch.int32)
        for name, values in (("q_lengths", (9, 4)), ("kv_lengths", (5, 9)), ("kv_starts", (2, 0)))
    }
    for placement in cut_by:
        for name in lengths:
            compare({name: lengths[name]}, placement, Replicate())
    for placement, its_placement in ((Shard(0), Shard(0)), (Replicate(), Shard(0))):
        compare(lengths, placement, its_placement)
        compare({**lengths, "alpha": 1.0}, placement, its_placement)  # torch's own operators
    cut = [distribute_tensor(t, mesh, [Shard(0)]) for t in whole]
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        adasplash2.entmax_attention(*cut, added, enable_gqa=True)
    distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is not built with it")
def test_sharded_by_batch_and_heads() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_attend_sharded, (2, port), 2)

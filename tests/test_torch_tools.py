"""torch's counter of operations and its distributed tensors know our operators."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

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
        "attn_mask": torch.randn(1, 4, 9, 9),
        "sinks": torch.randn(4),
        "alpha": torch.tensor([1.2, 1.5, 1.7, 2.0]),
    }

    def step(tensors: list[Any], said: dict[str, Any]) -> list[Any]:
        leaves = [t.detach().requires_grad_() for t in (*tensors, *said.values())]
        names = dict(zip(said, leaves[3:], strict=True))
        out = adasplash2.entmax_attention(*leaves[:3], is_causal=True, enable_gqa=True, **names)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    for said in ({}, operands):
        expected = step(whole, said)
        for placement in (Shard(0), Shard(1), Replicate()):
            cut = [distribute_tensor(t, mesh, [placement]) for t in whole]
            everywhere = {n: distribute_tensor(t, mesh, [Replicate()]) for n, t in said.items()}
            found = step(cut, everywhere)
            assert found[0].placements == (placement,), found[0].placements
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.full_tensor(), other, rtol=1e-5, atol=1e-5)
    distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is not built with it")
def test_sharded_by_batch_and_heads() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_attend_sharded, (2, port), 2)

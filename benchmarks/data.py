"""Attention cases, and where they take their queries, keys and values from.

Each kind of data is a function from a case to query, key and value, the same at every call.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from harness.cases import CHECKED_LENGTH, ROOT, Case, Inputs, reference
from torch import Tensor

PLANNED_GROUPS = 4
"""Key heads whose blocks are planned; more heads repeat them. Planning goes block by block."""

TOLERANCE = 0.01
"""Most that the planned share of empty tiles may miss the one that was asked for."""

Tensors = tuple[Tensor, Tensor, Tensor]

CAPTURED = ROOT / "output" / "smollm2.pt"
"""What ``capture.py`` writes and :func:`real` reads."""

REAL_HEADS, REAL_HEADS_KV, REAL_HEAD_DIM = 9, 3, 64
"""SmolLM2-135M's."""

REAL_LAYERS = [0, 6, 18]
"""Of it: rows that keep many keys, some and few."""

CODES = 16
"""Entries of each of the two one-hot codes of a key block. A query that wants ``m`` of them in
the first code and ``n`` in the second sees ``m n`` of 256 kinds of blocks."""

GAP = 24.0
"""Score by which each code that does not fit lowers a key. alpha = 1.5 needs 2 below the row's
maximum for an exact zero; Gaussian scores of a million keys reach 5 either way; the rest serves
alphas down to 1.1."""


SINK = 1.5
"""Score of a sink: a row of alpha = 1.5 keeps what scores within 2 of its highest."""


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Self-attention; ``sharpness`` is a factor of the queries, and with it of the scores.

    ``block_sparsity`` and ``block`` are read by the data ``blocks``, ``layer`` by ``real``.
    """

    batch: int = 1
    heads: int = 8
    heads_kv: int = 8
    length: int
    head_dim: int = 64
    is_causal: bool = True
    sharpness: float = 1.0
    data: str = "gaussian"  # of DATA
    block_sparsity: float = 0.0
    block: int = 64
    layer: int = 0

    def __str__(self) -> str:
        shape = f"length {self.length}, {self.heads} heads of {self.head_dim}"
        return f"{self.dtype}, {shape}, {self.data_words()}"

    def shape(self) -> AttentionCase:
        return dataclasses.replace(self, sharpness=1.0, layer=0, block_sparsity=0.0)

    def data_words(self) -> str:
        """Its data, in words."""
        words = self.data
        if self.data == "real":
            words += f" layer {self.layer}"
        if self.data == "blocks":
            words += f" {100 * self.block_sparsity:g} %"
        return words + (f" x {self.sharpness:g}" if self.sharpness != 1.0 else "")

    def inputs(self) -> Inputs:
        tensors = DATA[self.data](self)
        shape = (*tensors[0].shape[:3], tensors[2].shape[3])
        generator = self.generator(2)
        grad_out = torch.randn(
            shape, generator=generator, device=self.device, dtype=self.torch_dtype
        )
        return Inputs(tensors, grad_out)

    def short(self) -> AttentionCase:
        return dataclasses.replace(self, batch=1, length=min(self.length, CHECKED_LENGTH))

    def prefix(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        # The first rows of causal attention see the first keys alone.
        if not self.is_causal:
            return None
        return tuple(t[:, :, :CHECKED_LENGTH] for t in tensors)

    def expected(self, tensors: Sequence[Tensor], alpha: float) -> Tensor:
        tensors = [t.cpu() for t in tensors]
        return reference.attention(*tensors, alpha=alpha, is_causal=self.is_causal).out

    def work(self) -> float:
        return float(self.batch * self.heads * self.length**2 * self.head_dim)


def attention_case(options: argparse.Namespace, **fields: Any) -> AttentionCase:
    """A case with what programs have options for, and ``fields``."""
    names = ("device", "dtype", "alpha", "heads", "head_dim")
    shared = {name: getattr(options, name) for name in names if name not in fields}
    return AttentionCase(**{"heads_kv": fields.get("heads") or options.heads, **shared, **fields})


def gaussian(case: AttentionCase) -> Tensors:
    """Independent standard normal entries; queries times the sharpness."""
    query, key, value = _normal(case)
    return query.mul_(case.sharpness), key, value


def sink(case: AttentionCase) -> Tensors:
    """Gaussian, and a first key that every query scores :data:`SINK` higher, as models have it."""
    query, key, value = gaussian(case)
    query[..., 0] = 1.0
    key[:, :, 0, 0] = SINK * case.head_dim**0.5
    return query, key, value


def blocks(case: AttentionCase) -> Tensors:
    """Tensors in whose entmax attention a share of the ``block x block`` tiles is empty.

    Each key block carries two one-hot codes, each query block asks for some entries of both; a key
    whose codes are both asked for scores at least :data:`GAP` above all others. Beside the
    codes entries are Gaussian, so that scores among the live blocks are too (standard deviation
    ``sharpness``) and supports spread over all of them.
    """
    query, key, value = _normal(case)
    plan = plan_blocks(case)
    dtype, device = query.dtype, query.device
    group = case.heads // case.heads_kv
    width = 2 * CODES
    # Scores are scale * q.k: the Gaussian rest has head_dim - width entries instead of head_dim.
    query[..., width:] *= case.sharpness * (case.head_dim / (case.head_dim - width)) ** 0.5
    size = (GAP * case.head_dim**0.5) ** 0.5
    key[..., :width] = size * _per_position(plan.has[:, ::group], case).to(device, dtype)
    query[..., :width] = size * _per_position(plan.asks, case).to(device, dtype)
    return query, key, value


class Plan(NamedTuple):
    """``has`` ``(1, heads, blocks, 2 * CODES)``: codes of the key blocks. ``asks``, same shape:
    what the query blocks ask for. ``live`` ``(1, heads, blocks, blocks)`` bool: tiles that are to
    have a probability above zero."""

    has: Tensor
    asks: Tensor
    live: Tensor

    def empty(self, is_causal: bool) -> float:
        """Share of the tiles, among those with an allowed pair, that are not live."""
        allowed = torch.ones(self.live.shape[-2:], dtype=torch.bool)
        allowed = allowed.tril() if is_causal else allowed
        return 1.0 - (self.live & allowed).sum().item() / (
            self.live.shape[1] * allowed.sum().item()
        )


def plan_blocks(case: AttentionCase) -> Plan:
    """Which tiles are live, as near to ``case.block_sparsity`` as the diagonal allows.

    Raises:
        ValueError: the length is no multiple of the block, or head_dim too small for the codes.
    """
    if case.length % case.block:
        raise ValueError(f"length must be a multiple of the block {case.block}, got {case.length}")
    if case.head_dim < 3 * CODES:
        raise ValueError(f"head_dim must be at least {3 * CODES}, got {case.head_dim}")
    return _plan(
        case.heads,
        case.heads // case.heads_kv,
        case.length // case.block,
        case.block_sparsity,
        case.is_causal,
    )


@functools.lru_cache(maxsize=4)
def _plan(heads: int, group: int, count: int, sparsity: float, is_causal: bool) -> Plan:
    generator = torch.Generator().manual_seed(7)
    if heads > (distinct := PLANNED_GROUPS * group):
        planned = _plan(distinct, group, count, sparsity, is_causal)
        again = torch.arange(heads) % distinct
        return Plan(*(t[:, again] for t in planned))
    has = torch.zeros(1, heads, count, 2 * CODES)
    asks = torch.zeros_like(has)
    live = torch.zeros(1, heads, count, count, dtype=torch.bool)
    for head in range(heads):
        if head % group == 0:
            codes = torch.randint(CODES, (2, count), generator=generator)
        has[0, head].scatter_(1, (codes + torch.tensor([[0], [CODES]])).T, 1.0)
        kinds = torch.zeros(CODES, CODES)  # key blocks seen so far, by their two codes
        if not is_causal:
            kinds.index_put_((codes[0], codes[1]), torch.ones(count), accumulate=True)
        owed = 0.0  # what earlier query blocks kept too few (above 0) or too many of
        for block in range(count):
            own = codes[:, block]
            if is_causal:
                kinds[own[0], own[1]] += 1
            # Its own codes come first, so that no causal row is without a live key; then others
            # in random order, as many of both as come nearest to the blocks that it should keep.
            orders = [_starting_with(int(code), generator) for code in own]
            kept = kinds[orders[0]][:, orders[1]].cumsum(0).cumsum(1)
            seen = block + 1 if is_causal else count
            wanted = max(0.0, (1.0 - sparsity) * seen + owed)
            first, second = divmod(int((kept - wanted).abs().argmin()), CODES)
            owed += (1.0 - sparsity) * seen - kept[first, second].item()
            asks[0, head, block, orders[0][: first + 1]] = 1.0
            asks[0, head, block, CODES + orders[1][: second + 1]] = 1.0
        live[0, head] = asks[0, head] @ has[0, head].T == 2.0
    return Plan(has, asks, live)


def _starting_with(first: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(CODES, generator=generator)
    return torch.cat([torch.tensor([first]), order[order != first]])


def _per_position(per_block: Tensor, case: AttentionCase) -> Tensor:
    return per_block.repeat_interleave(case.block, dim=2).expand(case.batch, -1, -1, -1)


def real(case: AttentionCase) -> Tensors:
    """The first positions of one layer of SmolLM2-135M reading a speech; queries times the
    sharpness.

    Raises:
        FileNotFoundError: ``capture.py`` has not been run.
        ValueError: the captured tensors are not those that the case describes.
    """
    layers = captured()
    if case.layer not in layers:
        raise ValueError(f"layer must be one of {sorted(layers)}, got {case.layer}")
    query, key, value = (t.to(case.device, case.torch_dtype) for t in layers[case.layer])
    found = (*query.shape[:2], key.shape[1], query.shape[3])
    wanted = (case.batch, case.heads, case.heads_kv, case.head_dim)
    if found != wanted:
        raise ValueError(f"batch, heads, heads_kv and head_dim must be {found}, got {wanted}")
    if case.length > query.shape[2]:
        raise ValueError(f"length must be at most {query.shape[2]}, got {case.length}")
    query, key, value = (t[:, :, : case.length].contiguous() for t in (query, key, value))
    return query * case.sharpness, key, value


def missing(case: AttentionCase) -> str | None:
    """Why a case has no data here; None where it has."""
    if case.data == "real":
        if not CAPTURED.exists():
            return f"{CAPTURED.name} is missing: run benchmarks/capture.py"
        if case.layer not in captured():
            return f"{CAPTURED.name} has the layers {sorted(captured())}"
        if case.length > (most := captured()[case.layer][0].shape[2]):
            return f"{CAPTURED.name} has {most} positions"
    if case.data == "blocks":
        if case.length % case.block or case.length == case.block:
            return f"the length is no multiple, above 1, of the block {case.block}"
        if case.head_dim < 3 * CODES:
            return f"codes of blocks need a head_dim of {3 * CODES} or more"
        reached = plan_blocks(case).empty(case.is_causal)
        if abs(reached - case.block_sparsity) > TOLERANCE:
            return (
                f"{100 * reached:.1f} % is the nearest to {100 * case.block_sparsity:g} % empty "
                "tiles that leaves a live one to each row of tiles"
            )
    return None


@functools.lru_cache(maxsize=1)
def captured() -> dict[int, Tensors]:
    """Query, key and value by layer, as ``capture.py`` left them."""
    if not CAPTURED.exists():
        raise FileNotFoundError(f"{CAPTURED} is missing: run benchmarks/capture.py")
    return torch.load(CAPTURED, weights_only=True)["layers"]


def _normal(case: AttentionCase) -> Tensors:
    generator = case.generator()

    def draw(heads: int) -> Tensor:
        shape = (case.batch, heads, case.length, case.head_dim)
        return torch.randn(shape, generator=generator, device=case.device, dtype=case.torch_dtype)

    return draw(case.heads), draw(case.heads_kv), draw(case.heads_kv)


DATA: dict[str, Callable[[AttentionCase], tuple[Tensor, Tensor, Tensor]]] = {
    "gaussian": gaussian,
    "sink": sink,
    "blocks": blocks,
    "real": real,
}
"""Where an attention case takes its tensors from. A new kind of data is one function more."""

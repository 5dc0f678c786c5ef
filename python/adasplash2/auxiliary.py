"""What an attention call knows beside its output: thresholds, supports, the probabilities."""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adasplash2 import dense, dispatch
from adasplash2.closed_form import nothing_forward
from adasplash2.contract import AttentionStats
from adasplash2.options import Options
from adasplash2.problem import Inputs, Problem, cut, span_of_keys, validated
from adasplash2.torch_fastpath import is_in_a_transform, is_in_memory, is_without_data

CHUNK = 2**20
"""Scores that are held at a time, in float64 some times over."""


@dataclass(frozen=True, eq=False)
class AttentionAux:
    """Comes with the output where ``return_aux`` asks for it. ``B, H, L`` are batch, query heads
    and query length: all dimensions of the output but the last, more than one or none in the place
    of ``B`` too; ``(1, heads_q, total_q)`` of packed and nested sequences. Nothing here has a
    gradient. What is found later is found from the tensors of the call: do not change these in
    place before.

    Attributes:
        tau: ``(B, H, L)``, threshold of ``(alpha-1) * s`` in float32, or float64 for float64;
            +inf for a row that sees nothing, NaN for a row with NaN.
    """

    tau: Tensor
    _inputs: Inputs = field(repr=False)
    _options: Options = field(repr=False)

    @functools.cached_property
    def support(self) -> Tensor:
        """``(B, H, L)`` int32: keys with a probability above zero, without dropout; none of a row
        with NaN. Found when it is first asked for, by a forward that counts, of whichever backend a
        call without gradients takes (:func:`adasplash2.attention_stats`).

        Raises:
            TypeError: in a transform or a trace, or of DTensors, where nothing can be counted.
        """
        return counted(self._inputs, self._options).support.view(self.tau.shape)

    def probabilities(self) -> Tensor:
        """The probabilities above zero, without dropout: a sparse CSR tensor
        ``(B * H * L, length_k)`` of float64, whose rows are those of ``tau.flatten()``; on a GPU to
        the digits of float32.

        Found anew from the scores in float64, of some queries of a key head at a time and the keys
        between the first and the last that these see. Time grows by the product of the lengths,
        memory by what is found, beside about 100 MiB and a key head in float64. A key at the very
        edge of the support may be in one of this and :attr:`support` alone; a row with NaN has all
        keys that it sees. With sinks the rows sum to less than 1.
        ``.to_dense().view(B, H, L, length_k)`` is what other attentions call their weights.

            >>> import torch, adasplash2
            >>> q = torch.randn(1, 2, 16, 8)
            >>> out, aux = adasplash2.entmax_attention(q, q, q, return_aux=True)
            >>> weights = aux.probabilities().to_dense().view(1, 2, 16, 16)
            >>> torch.allclose(weights.float() @ q, out, atol=1e-5)
            True
        """
        p = self._problem
        count = self.tau.new_zeros((p.batch, p.heads_q, p.length_q), dtype=torch.int64)
        place, value = _Growing(count), _Growing(count.double())
        strides = (p.heads_q * p.length_q * p.length_k, p.length_q * p.length_k, p.length_k, 1)
        rows = max(1, CHUNK // max(1, p.gqa_group * p.length_k))
        for b, h in itertools.product(range(p.batch), range(p.heads_kv)):
            heads = slice(h * p.gqa_group, (h + 1) * p.gqa_group)
            inputs = cut(self._inputs, slice(b, b + 1), slice(h, h + 1), heads)
            for first in range(0, p.length_q, rows):
                some = slice(first, min(first + rows, p.length_q))
                keys = span_of_keys(p, inputs, some)
                found = self._of(inputs, some, keys)
                kept = found != 0
                count[b : b + 1, heads, some] = kept.sum(dim=3)
                begins = b, heads.start, first, keys.start
                parts = zip(kept.nonzero().unbind(1), begins, strides, strict=True)
                place.append(sum((n + begin) * stride for n, begin, stride in parts))
                value.append(found[kept])
        # By row: chunks hold some rows of some heads.
        order = torch.argsort(place.all())
        column, count = place.all()[order] % max(1, p.length_k), count.flatten()
        crow = torch.cat([count.new_zeros(1), count.cumsum(0)])
        shape = (count.numel(), p.length_k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that sparse CSR is in beta
            return torch.sparse_csr_tensor(
                crow, column, value.all()[order], shape, check_invariants=False
            )

    @functools.cached_property
    def _problem(self) -> Problem:
        return validated(self._inputs, self._options, False)

    def _of(self, inputs: Inputs, rows: slice, keys: slice) -> Tensor:
        # Solved again: near alpha = 1, and far above it, tau has not the digits that the
        # probabilities have, which backends find from scores below the highest of their row.
        # Rows on a GPU are solved in float32 at most.
        problem = validated(inputs, self._options, False)
        dtype = torch.float64 if problem.device.type == "cpu" else problem.compute_dtype
        with torch.no_grad():
            return dense.probabilities(problem, inputs, dtype, rows, keys).double()


def counted(inputs: Inputs, options: Options) -> AttentionStats:
    """Run one attention forward that records what it did; no operator, no gradient."""
    problem = validated(inputs, options, False)
    named = zip(Inputs._fields, inputs, strict=True)
    inputs = Inputs._make(t if t is None else _in_memory(name, t) for name, t in named)
    if problem.is_empty:
        tau = nothing_forward(problem, inputs, 0).tau
        counts = torch.zeros_like(tau, dtype=torch.int32)
        empty_tiles = tau.new_zeros(tau.shape[:2], dtype=torch.float64)
        return AttentionStats(tau, counts, counts.clone(), empty_tiles, backend="none")
    chosen, config, _ = dispatch.choose(problem, options.backend or None)
    with torch.no_grad():
        return chosen.stats(problem, inputs, config)


def _in_memory(name: str, tensor: Tensor) -> Tensor:
    """What a kernel reads that no dispatcher prepares: neither negated lazily nor left out."""
    if is_in_memory(tensor):
        return tensor
    if is_in_a_transform(tensor) or is_without_data(tensor):
        raise TypeError(
            f"{name} must be a tensor with data, got one inside a transform or a trace: "
            "nothing can be counted in either"
        )
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        raise TypeError(f"{name} must lie on one device to be counted, got a DTensor")
    if tensor.device.type == "meta":
        return tensor  # which every backend refuses
    tensor = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class _Growing:
    """A tensor that grows at its end, by doubling. A small one kept from each chunk instead would
    lie between the large ones of the chunks, and memory that is free could not be used again."""

    def __init__(self, like: Tensor) -> None:
        self._all, self._count = like.new_empty(2**16), 0

    def append(self, more: Tensor) -> None:
        count = self._count + len(more)
        if count > len(self._all):
            larger = self._all.new_empty(max(count, 2 * len(self._all)))
            larger[: self._count] = self.all()
            self._all = larger
        self._all[self._count : count] = more
        self._count = count

    def all(self) -> Tensor:
        return self._all[: self._count]

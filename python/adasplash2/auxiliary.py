"""What an attention call knows beside its output: thresholds, supports, the probabilities."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adasplash2 import dense
from adasplash2.problem import Inputs, Problem

CHUNK = 2**24
"""Scores that are held at a time."""


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
    _problem: Problem = field(repr=False)
    _inputs: Inputs = field(repr=False)

    @functools.cached_property
    def support(self) -> Tensor:
        """``(B, H, L)`` int32: keys with a probability above zero. Found when it is first asked
        for."""
        return self.probabilities().crow_indices().diff().to(torch.int32).view(self.tau.shape)

    def probabilities(self) -> Tensor:
        """The probabilities above zero, without dropout: a sparse CSR tensor
        ``(B * H * L, length_k)`` of float64, whose rows are those of ``tau.flatten()``; on a GPU to
        the digits of float32.

        Found from the scores, some queries at a time: time grows by the product of the lengths,
        memory by what is found. ``.to_dense().view(B, H, L, length_k)`` is what other attentions
        call their weights. With sinks the rows sum to less than 1.

            >>> import torch, adasplash2
            >>> q = torch.randn(1, 2, 16, 8)
            >>> out, aux = adasplash2.entmax_attention(q, q, q, return_aux=True)
            >>> weights = aux.probabilities().to_dense().view(1, 2, 16, 16)
            >>> torch.allclose(weights.float() @ q, out, atol=1e-5)
            True
        """
        p = self._problem
        counts, columns, values = [], [], []
        rows = max(1, CHUNK // max(1, p.batch * p.heads_q * p.length_k))
        for first in range(0, max(p.length_q, 1), rows):  # once, also where there are none
            found = self._of_rows(slice(first, min(first + rows, p.length_q)))
            places = found.nonzero()
            counts.append((found != 0).sum(dim=3))
            columns.append(places)
            values.append(found[tuple(places.unbind(1))])
            places[:, 2] += first
        count = torch.cat(counts, dim=2).flatten()
        place, value = torch.cat(columns), torch.cat(values)
        # By row: chunks hold some rows of every head.
        row = (place[:, 0] * p.heads_q + place[:, 1]) * p.length_q + place[:, 2]
        order = torch.argsort(row, stable=True)
        crow = torch.cat([count.new_zeros(1), count.cumsum(0)])
        shape = (count.numel(), p.length_k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that sparse CSR is in beta
            return torch.sparse_csr_tensor(
                crow, place[order, 3], value[order], shape, check_invariants=False
            )

    def _of_rows(self, rows: slice) -> Tensor:
        # Solved again: near alpha = 1, and far above it, tau has not the digits that the
        # probabilities have, which backends find from scores below the highest of their row.
        # Rows on a GPU are solved in float32 at most.
        p = self._problem
        dtype = torch.float64 if p.device.type == "cpu" else p.compute_dtype
        with torch.no_grad():
            return dense.probabilities(p, self._inputs, dtype, rows).double()

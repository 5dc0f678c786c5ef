"""What a backend is: the functions that every package under ``adasplash2.backends`` has.

A backend is a module (its package's ``__init__``) with these functions at its top level. It
imports :mod:`adasplash2.problem`, :mod:`adasplash2.cache`, this module and what stands before them:
never what asks it, as the dispatcher does, and no other backend while it is loaded. Adding one
touches its own folder and one line of the registry.

A forward has three phases. It *scans* all keys for those that may be in the support of a row,
*solves* for the row's threshold on what is left, and *gathers* the values. What lets it leave keys
out is that the threshold of some of a row's scores is at most that of all: no key below it is in
the support, and the threshold of the keys that are left is the row's. So keys may be scanned in
parts, each for itself and in any order, if what the parts leave is solved once; as every backend
does where few queries read a long cache, and could where parts are on several devices. What passes
between phases is a backend's own affair: scores in lists, or numbers of tiles. What passes from a
forward to a backward, which gathers the same keys, is ``tau`` and ``saved``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from adasplash2.problem import Inputs, Problem, RowProblem

Config = Mapping[str, int | str]
"""What a backend may choose for a problem: block sizes, scans, instruction set. Kept on
disk as JSON."""


SAVED_ALIGNMENT = 16
"""Bytes on which ``tau`` and ``saved`` of a :class:`Kept` start; both are contiguous."""


class Forward(NamedTuple):
    """What an attention forward returns.

    ``out``: ``(batch, heads_q, length_q, head_dim_v)``, dtype of the query.
    ``tau``: ``(batch, heads_q, length_q)``, compute dtype; threshold of ``(alpha-1) * s``;
    ``+inf`` for a row without an allowed key and a sink, NaN for a poisoned row.
    ``saved``: 1-D uint8, what the backward of the same backend needs; its layout is the
    backend's own, its end may be unused. Empty where ``problem.needs_grad`` is False.
    """

    out: Tensor
    tau: Tensor
    saved: Tensor

    @property
    def kept(self) -> Kept:
        """What the backward gets of it."""
        return Kept(self.tau, self.saved)


class Kept(NamedTuple):
    """What an attention backward gets of its :class:`Forward`: not the output, which would live as
    long as the graph for nothing."""

    tau: Tensor
    saved: Tensor


class Gradients(NamedTuple):
    """What an attention backward returns. Query, key and value: in their shape and dtype.

    Of operands, None where they are not wanted. ``attn_mask``: in its shape and the compute dtype.
    The others: each row's part, ``(batch, heads_q, length_q)`` in the compute dtype, whose sums
    over what shares a number are its gradient.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scales: Tensor | None = None
    alphas: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionStats:
    """What one attention call did. ``B, H, L`` are batch, query heads and query length, as in
    :class:`adasplash2.AttentionAux`.

    Attributes:
        tau: ``(B, H, L)`` thresholds of ``(alpha-1) * s``, compute dtype.
        support: ``(B, H, L)`` int32, keys with a probability above zero.
        iterations: ``(B, H, L)`` int32, refinement steps of the threshold after the
            histogram start.
        empty_tiles: ``(B, H)`` float64, share of the 64x64 tiles with at least one allowed
            pair in which every probability is zero; 0 where there is no such pair.
        backend: name of the backend that ran.

    Example:
        >>> import torch, adasplash2
        >>> eye = 9.0 * torch.eye(4, 16)[None, None]  # each query is like one key
        >>> stats = adasplash2.attention_stats(eye, eye, eye)
        >>> stats.support, stats.empty_tiles, stats.backend
        (tensor([[[1, 1, 1, 1]]], dtype=torch.int32), tensor([[0.]], dtype=torch.float64), 'cpu')
    """

    tau: Tensor
    support: Tensor
    iterations: Tensor
    empty_tiles: Tensor
    backend: str


class Backend(Protocol):
    """The functions of a backend module."""

    @property
    def name(self) -> str:
        """Short name, as users give it to ``backend=``."""

    def unavailable(self) -> str | None:
        """Why nothing can run here, in a sentence; None where it can. Cheap.

        Raises:
            Exception: whatever keeps it from an answer. An answer is remembered, and so is an
                error that will come again; one that may pass, as a shortage of memory or of file
                descriptors does, is not.
        """

    def versions(self) -> Mapping[str, str]:
        """What compiled code and measured speeds depend on beside the device, the releases of
        adasplash2 and torch: libraries, a hash of the kernels' sources, settings such as threads.
        """

    def refusals(self, problem: Problem | RowProblem) -> list[str]:
        """All reasons why this problem cannot run here, a sentence each; empty: it can.

        Like ``configs``, the same for all problems of one :attr:`adasplash2.problem.Asked.kind`, of
        which one is asked; but for the numbers in sentences. ``tests/test_kinds.py`` holds it to
        that at lengths of all sorts: a limit that kinds do not have is a new part of them.
        """

    def refusals_anywhere(self, problem: Problem | RowProblem) -> list[str]:
        """Those of them that hold on every device: ``problem.device`` is not looked at. Neither it
        nor what the backend needs to run must be here."""

    def configs(self, problem: Problem | RowProblem) -> Sequence[Config]:
        """Configurations to choose from; the first is the default without tuning."""

    def notes(self, problem: Problem | RowProblem, inputs: Inputs, config: Config) -> Sequence[str]:
        """What is done to these tensors before ``config`` runs, a sentence each."""

    def precompile(self, problem: Problem | RowProblem, config: Config) -> None:
        """Compile into a disk cache what a forward of ``problem`` needs, and a backward where it
        has gradients. Launches nothing, and may run in another process than the call."""

    def saved_bound(self, problem: Problem) -> int:
        """Bytes that suffice for ``Forward.saved``, whatever the data and the configuration; 0
        where the device is not one of this backend's. Lengths and heads may be symbols."""

    def forward(
        self, problem: Problem, inputs: Inputs, config: Config, saved_bytes: int = -1
    ) -> Forward:
        """Attention output, thresholds and what the backward needs, in ``saved_bytes`` where that
        is positive; ``ValueError`` where it is too few."""

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        kept: Kept,
        grad_out: Tensor,
        config: Config,
        wanted: Collection[str] = (),
    ) -> Gradients:
        """Gradients of query, key and value, and those of the operands whose names are ``wanted``;
        ``ValueError`` where ``kept.saved`` cannot be what this backend saved."""

    def stats(self, problem: Problem, inputs: Inputs, config: Config) -> AttentionStats:
        """A forward that records what it did."""

    def rows_forward(
        self, problem: RowProblem, x: Tensor, config: Config, alphas: Tensor | None = None
    ) -> Tensor:
        """Entmax of each row of ``x`` ``(rows, length)``, whose last stride is 1; ``alphas``, where
        ``problem.alphas``, is contiguous ``(rows,)`` in the compute dtype. A row whose alpha is not
        in (1, 2] is NaN."""

    def rows_backward(
        self,
        problem: RowProblem,
        y: Tensor,
        grad_y: Tensor,
        config: Config,
        alphas: Tensor | None = None,
    ) -> Tensor:
        """Gradient of ``x`` from the output ``y`` and its gradient, both ``(rows, length)``."""

"""What a contender is: one way to solve a case, how it is called, and where it takes part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harness.cases import Case, Inputs, reference

FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"

MODES = (FORWARD, BOTH)
"""How a contender is called; the backward's own time is taken within :data:`BOTH`."""


def never(case: Case) -> None:
    """The refusal of a contender that runs every case."""


@dataclass(frozen=True)
class Contender:
    """One way to solve a case.

    Attributes:
        name: as ``--rivals``, tables and JSON have it.
        call: takes the case and its tensors, gives the output. A module's function, or a
            ``functools.partial`` of one, so that another process can be told of it.
        devices: where it runs at all.
        refusal: takes a case on one of them, says in a sentence what is against it, or None.
        softmax: whether it computes softmax instead of entmax.
        tunes: whether it compiles or tunes anew for each shape. It is then checked on the shape
            that is timed, not on the short case, and each shape is reckoned to cost that again.
        reference: what it computes, of a case and the tensors of its first positions, in float64;
            None where that is the case's softmax or entmax.
    """

    name: str
    call: Callable[..., Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")
    refusal: Callable[..., str | None] = never
    softmax: bool = False
    tunes: bool = False
    reference: Callable[..., Tensor] | None = None

    def why_not(self, case: Case) -> str | None:
        if case.device not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {case.device}"
        return self.refusal(case)

    def error(self, case: Case, inputs: Inputs) -> float:
        """Relative error of the output on a short case, against float64."""
        if self.tunes and (tensors := case.prefix(inputs.tensors)):
            (out,) = case.prefix(run(case, self, inputs, FORWARD))
        else:
            case = case.short()
            tensors, grad_out = case.inputs()
            out = run(case, self, Inputs(tensors, grad_out), BOTH)[0]
        if self.reference is not None:
            return reference.relative_error(out, self.reference(case, tensors))
        alpha = 1.0 if self.softmax else case.alpha
        return reference.relative_error(out, case.expected(tensors, alpha))


def run(
    case: Case,
    contender: Contender,
    inputs: Inputs,
    mode: str,
    mark: Callable[[], None] = lambda: None,
) -> tuple[Tensor, ...]:
    """One call: the output without gradients, or the output and all gradients; ``mark`` is called
    between forward and backward."""
    if mode == FORWARD:
        with torch.no_grad():
            return (contender.call(case, *inputs.tensors),)
    leaves = [t.detach().requires_grad_() for t in inputs.tensors]
    out = contender.call(case, *leaves)
    mark()
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out))


class LeftOut(NamedTuple):
    """A contender that does not take part in a case, and why."""

    case: Case
    contender: str
    reason: str

    def record(self) -> dict[str, object]:
        return {**self._asdict(), "case": asdict(self.case)}


def admit(
    cases: Iterable[Case], contenders: Iterable[Contender]
) -> tuple[list[tuple[Case, Contender]], list[LeftOut]]:
    """Who takes part in what, and who does not."""
    entrants: list[tuple[Case, Contender]] = []
    left_out: list[LeftOut] = []
    contenders = tuple(contenders)
    for case in cases:
        for contender in contenders:
            reason = contender.why_not(case)
            if reason is None:
                entrants.append((case, contender))
            else:
                left_out.append(LeftOut(case, contender.name, reason))
    return entrants, left_out

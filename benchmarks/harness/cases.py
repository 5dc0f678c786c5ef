"""What a case is: one problem with its seeded tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent

sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402, F401  (the float64 reference of the tests, for all that need it)

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

CHECKED_LENGTH = 512
"""Rows and keys of the short case on which a contender's error is found: dense float64 is quick."""


class Inputs(NamedTuple):
    """``tensors`` are what a contender is called with; ``grad_out`` has the output's shape."""

    tensors: tuple[Tensor, ...]
    grad_out: Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all problems have; a program's own case adds its shapes.

    ``alpha`` is that of the entmax contenders: softmax contenders ignore it.
    """

    device: str
    dtype: str  # of DTYPES
    alpha: float

    def __str__(self) -> str:
        """What tells it from the other cases of one run."""
        raise NotImplementedError

    def inputs(self) -> Inputs:
        """The tensors, the same at every call."""
        raise NotImplementedError

    def short(self) -> Case:
        """The same case cut to :data:`CHECKED_LENGTH`, and to one sequence."""
        raise NotImplementedError

    def expected(self, tensors: Sequence[Tensor], alpha: float) -> Tensor:
        """The exact output in float64."""
        raise NotImplementedError

    def prefix(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Tensors of a call, its output say, cut to the first :data:`CHECKED_LENGTH` positions;
        None where these are no case in themselves, since they depend on later ones."""
        return None

    def work(self) -> float:
        """Grows as the time of a dense solution does."""
        raise NotImplementedError

    def shape(self) -> Case:
        """What those who tune or compile for it do not do again for: the same for cases that
        differ in their numbers alone."""
        return self

    def generator(self, seed: int = 1) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

"""Where alpha comes from: learned by each head, or by a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adasplash2.options import check_alpha, check_count, check_dtype, shown

LOWEST, HIGHEST = 1.01, 1.99
"""Learned alphas stay between: inside (1, 2) by more than a rounding, where the map and its
gradient are those of sparse attention. 1 is softmax, which has no threshold."""


class LearnedAlpha(nn.Module):
    r"""An alpha of each head, learned: :math:`1.01 + 0.98\,\mathrm{sigmoid}(\mathrm{logit})`.

    Inside (1, 2) for whatever the logits become, with a gradient everywhere.

    Learning rate: Adam moves a logit by about its learning rate a step, and alpha by a quarter of
    that. At 3e-4 a thousand steps in one direction move alpha by 0.07: give ``logits`` ten times
    the rate of the weights, and no weight decay, which would pull alpha to 1.5.

        groups = [{"params": weights}, {"params": logits, "lr": 10 * lr, "weight_decay": 0.0}]

    Args:
        heads: how many alphas.
        start: where each one starts, from 1.02 to 1.98: a number, or one for each head. Nearer to
            the ends the logits hardly move.
        device, dtype: of the logits.

    Raises:
        TypeError, ValueError: ``heads`` is no integer of at least 1, ``start`` no such numbers, or
            ``dtype`` not floating.

    Example:
        >>> import torch, adasplash2
        >>> alpha = adasplash2.nn.LearnedAlpha(4)
        >>> q, k, v = torch.randn(3, 2, 4, 32, 8)
        >>> adasplash2.entmax_attention(q, k, v, alpha=alpha()).sum().backward()
        >>> alpha.logits.grad.shape
        torch.Size([4])

    Source:
        Correia, Niculae, Martins 2019, *Adaptively Sparse Transformers* (alpha by head, with a
        sigmoid; its gradient).
    """

    def __init__(
        self,
        heads: int,
        start: float | Tensor = 1.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = check_count("heads", heads, at_least=1)
        dtype = check_dtype(dtype)
        try:
            alphas = torch.as_tensor(start, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"start must be a number or a tensor of numbers, got {shown(start)}"
            ) from error
        if alphas.shape not in ((), (heads,)):
            raise ValueError(
                f"start must be a number or have the shape ({heads},), got {tuple(alphas.shape)}"
            )
        rounded = 1e-6  # what float32 makes of the limits
        if not bool(((alphas >= 1.02 - rounded) & (alphas <= 1.98 + rounded)).all()):
            raise ValueError(f"start must be from 1.02 to 1.98, got {shown(start)}")
        self.start = alphas.expand(heads).tolist()
        self.logits = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every alpha to its start."""
        share = (torch.tensor(self.start, dtype=torch.float64) - LOWEST) / (HIGHEST - LOWEST)
        with torch.no_grad():
            self.logits.copy_(torch.logit(share))

    def forward(self) -> Tensor:
        """The alphas ``(heads,)``, in float32, or float64 for float64."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return LOWEST + (HIGHEST - LOWEST) * torch.sigmoid(logits)

    def extra_repr(self) -> str:
        return f"{self.heads}"


class AlphaSchedule:
    """alpha from softmax (1) to its target over steps, for models that start from softmax weights.

    Used as torch's learning-rate schedulers: ``step()`` after each optimizer step. A compiled model
    has two graphs, of softmax and of all other alphas, if ``torch.compile`` is not told
    ``dynamic=True``, with which torch compiles each alpha anew where the first is 1.

    Args:
        driven: a module, all of whose modules with a fixed ``alpha`` (those of
            :mod:`adasplash2.nn`) follow; or a function that is given each alpha, as
            ``alpha_setter(model)`` of :mod:`adasplash2.integrations.transformers.schedule` returns
            one.
        steps: how many it takes from ``start`` to ``target``.
        target: where alpha ends.
        start: where it begins; 1 is softmax.
        warmup: steps at ``start`` before.
        shape: ``"linear"``, or ``"cosine"``, which begins and ends gently.

    Raises:
        TypeError, ValueError: an argument is not what it must be, ``driven`` has no alpha to drive,
            or one that is learned.

    Example:
        >>> import adasplash2
        >>> attention = adasplash2.nn.EntmaxMultiheadAttention(32, 4)
        >>> schedule = adasplash2.nn.AlphaSchedule(attention, steps=4, target=1.5)
        >>> attention.alpha
        1.0
        >>> for _ in range(3):
        ...     schedule.step()
        >>> attention.alpha
        1.375
    """

    def __init__(
        self,
        driven: nn.Module | Callable[[float], object],
        steps: int,
        target: float = 1.5,
        start: float = 1.0,
        warmup: int = 0,
        shape: str = "linear",
    ) -> None:
        self.steps = check_count("steps", steps, at_least=1)
        self.warmup = check_count("warmup", warmup)
        self.target, self.start = check_alpha(target), check_alpha(start)
        if shape not in ("linear", "cosine"):
            raise ValueError(f"shape must be 'linear' or 'cosine', got {shown(shape)}")
        self.shape = shape
        self._set = _setter(driven)
        self.last_step = 0
        self._set(self.alpha)

    @property
    def alpha(self) -> float:
        """alpha after ``last_step`` steps."""
        share = min(max(self.last_step - self.warmup, 0) / self.steps, 1.0)
        if share == 1.0:
            return self.target
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.start + share * (self.target - self.start)

    def step(self) -> None:
        """One step further; what is driven takes the new alpha."""
        self.last_step += 1
        self._set(self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """All but what is driven, as numbers and texts."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken; what is driven takes its alpha.

        Raises:
            ValueError: ``state_dict`` is none of an :class:`AlphaSchedule`.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(
                f"state_dict must have the keys {sorted(self.state_dict())}, got "
                f"{shown(sorted(state_dict))}"
            )
        vars(self).update(state_dict)
        self._set(self.alpha)


def _setter(driven: nn.Module | Callable[[float], object]) -> Callable[[float], object]:
    if isinstance(driven, nn.Module):
        modules = list(_with_alpha(driven))
        if not modules:
            raise ValueError(f"driven must hold modules with an alpha, {_kind(driven)} has none")
        for module in modules:
            if isinstance(module.alpha, nn.Module):
                raise ValueError(
                    f"driven must have a fixed alpha, but that of a {_kind(module)} is learned"
                )

        def set_alpha(alpha: float) -> None:
            for module in modules:
                module.alpha = alpha

        return set_alpha
    if not callable(driven):
        raise TypeError(f"driven must be a module or a function of alpha, got {_kind(driven)}")
    return driven


def _with_alpha(driven: nn.Module) -> Iterator[Any]:
    return (module for module in driven.modules() if hasattr(module, "alpha"))


def _kind(value: object) -> str:
    return type(value).__name__

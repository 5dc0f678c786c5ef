"""What lets attention hold at lengths that it was not trained at: a scale that follows the length,
and positions that do."""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adasplash2.options import check_count, check_dtype, check_finite, shown

GAMMA_RANGE = 2.0
"""``gamma`` is within plus and minus this: the definition's."""


class LengthScale(nn.Module):
    r"""A factor of the scores of each query, by head, that may grow with the keys it sees.

    For a query with features :math:`x` that sees :math:`n` keys, in each head,

    .. math:: \delta + \beta \, (\log (n + 1))^{\gamma}, \quad
              \beta = \mathrm{softplus}(x \cdot w_\beta), \quad \gamma = 2 \tanh(x \cdot w_\gamma).

    It multiplies the usual :math:`1 / \sqrt{\mathrm{head\_dim}}`. ``n + 1`` keeps the logarithm
    above zero for a query that sees one key. All ``w`` start at zero, where the factor is
    ``delta + log(2)`` for every query; with the default ``delta`` that is 1, so that a model starts
    as it would without. ``delta=1`` is the paper's.

    Args:
        features: of each query, the last dimension of ``x``.
        heads: of the queries.
        delta: the part that does not follow the length.
        device, dtype: of the weights.

    Raises:
        TypeError, ValueError: ``features`` or ``heads`` is no integer of at least 1, ``delta`` is
            no finite number, or ``dtype`` not floating.

    Example:
        >>> import torch, adasplash2
        >>> x = torch.randn(2, 64, 32)                       # (batch, length, features)
        >>> scale = adasplash2.nn.LengthScale(32, heads=4)(x, torch.arange(1, 65)) / 8**0.5
        >>> q, k, v = torch.randn(3, 2, 4, 64, 8)
        >>> adasplash2.entmax_attention(q, k, v, is_causal=True, scale=scale).shape
        torch.Size([2, 4, 64, 8])

    Source:
        Vasylenko, Pitorro, Martins, Treviso 2025, *Long-Context Generalization with Sparse
        Attention* (ASEntmax).
    """

    def __init__(
        self,
        features: int,
        heads: int,
        delta: float = 1.0 - math.log(2.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = check_count("features", features, at_least=1)
        self.heads = check_count("heads", heads, at_least=1)
        self.delta = check_finite("delta", delta)
        dtype = check_dtype(dtype)
        self.weight = nn.Parameter(torch.empty(2 * heads, features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zeros."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, seen: Tensor | int) -> Tensor:
        """The factors ``(batch, heads, length)``, in float32, or float64 for float64.

        Args:
            x: ``(batch, length, features)``.
            seen: how many keys each query sees: a number, or a tensor that broadcasts to
                ``(batch, heads, length)``. Below 1 counts as 1.

        Raises:
            TypeError, ValueError: ``x`` or ``seen`` is none of these.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[-1] != self.features:
            raise ValueError(
                f"x must have the shape (batch, length, {self.features}), got {tuple(x.shape)}"
            )
        if isinstance(seen, Tensor):
            sizes = x.shape[0], self.heads, x.shape[1]
            behind = sizes[3 - seen.dim() :]
            if seen.dim() > 3 or any(
                n not in (1, m) for n, m in zip(seen.shape, behind, strict=True)
            ):
                raise ValueError(
                    f"seen must be a number or have a shape that broadcasts to {sizes}, (batch, "
                    f"heads, length), got {tuple(seen.shape)}"
                )
        elif not isinstance(seen, (numbers.Real, torch.SymInt)):
            raise TypeError(f"seen must be a number or a torch.Tensor, got {shown(seen)}")
        beta, gamma = F.linear(x, self.weight).unflatten(-1, (2, self.heads)).unbind(-2)
        compute = torch.promote_types(beta.dtype, torch.float32)
        beta, gamma = (t.to(compute).transpose(1, 2) for t in (beta, gamma))
        n = torch.as_tensor(seen, device=x.device).to(compute).clamp(min=1.0)
        return self.delta + F.softplus(beta) * torch.log(n + 1.0) ** (
            GAMMA_RANGE * torch.tanh(gamma)
        )

    def extra_repr(self) -> str:
        return f"{self.features}, heads={self.heads}, delta={self.delta:g}"


def nape_slopes(
    heads: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Tensor:
    """``alibi_slopes`` of NAPE: the first half of the heads know nothing of positions (NoPE, a
    slope of 0), the others have ALiBi with slopes that fall evenly from 1: ``1 - i / count`` for
    ``i`` from 0 on.

    A slope of 1 sees the last few keys, and a small one some dozens, at every length. ALiBi's own
    slopes are flatter: they begin at ``2 ** (-8 / count)``.

    Of an odd number of heads the one in the middle has no slope. Causal masks are what tells the
    first half of the heads any order, so that it is meant for causal attention.

    Args:
        heads: at least 1.
        device, dtype: of what is returned.

    Returns:
        ``(heads,)``.

    Raises:
        TypeError, ValueError: ``heads`` is no integer of at least 1, or ``dtype`` not floating.

    Example:
        >>> import adasplash2
        >>> adasplash2.nn.nape_slopes(4)
        tensor([0.0000, 0.0000, 1.0000, 0.5000])

    Sources:
        Vasylenko, Pitorro, Martins, Treviso 2025, *Long-Context Generalization with Sparse
        Attention* (NAPE); Press, Smith, Lewis 2022, *Train Short, Test Long* (ALiBi).
    """
    heads, dtype = check_count("heads", heads, at_least=1), check_dtype(dtype)
    sloped = heads // 2
    place = torch.arange(heads, device=device, dtype=torch.float64) - (heads - sloped)
    return torch.where(place < 0, 0.0, 1.0 - place / max(sloped, 1)).to(dtype)

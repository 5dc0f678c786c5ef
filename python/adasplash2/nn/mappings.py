"""The mappings as modules."""

from __future__ import annotations

from torch import Tensor, nn

from adasplash2.functional import entmax
from adasplash2.options import check_alpha


class Entmax(nn.Module):
    """:func:`adasplash2.entmax` along ``dim``, for :class:`torch.nn.Sequential`.

    Args:
        alpha: a number of at least 1; 1 is softmax. An attribute, which
            :class:`adasplash2.nn.AlphaSchedule` drives.
        dim: the dimension along which probabilities sum to 1.

    Raises:
        TypeError, ValueError: ``alpha`` is no such number. ``dim`` and the input are checked where
            it is called, as there.

    Example:
        >>> import torch, adasplash2
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 5), adasplash2.nn.Entmax(1.5))
        >>> torch.allclose(model(torch.randn(3, 8)).sum(-1), torch.ones(3))
        True

    Source:
        Peters, Niculae, Martins 2019, *Sparse Sequence-to-Sequence Models*.
    """

    def __init__(self, alpha: float = 1.5, dim: int = -1) -> None:
        super().__init__()
        self.alpha, self.dim = check_alpha(alpha), dim

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of ``x``."""
        return entmax(x, self.alpha, self.dim)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, dim={self.dim}"


class Sparsemax(nn.Module):
    """:func:`adasplash2.sparsemax` along ``dim``: :class:`Entmax` at ``alpha = 2``.

    Example:
        >>> import torch, adasplash2
        >>> adasplash2.nn.Sparsemax()(torch.tensor([1.0, 0.5, -1.0]))
        tensor([0.7500, 0.2500, 0.0000])

    Source:
        Martins, Astudillo 2016, *From Softmax to Sparsemax*.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of ``x``."""
        return entmax(x, 2.0, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

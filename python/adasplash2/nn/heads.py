"""A learned factor of each head's scores, in weights that a model has already."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adasplash2.options import check_count, check_dtype, check_finite


class HeadScale(nn.Module):
    r"""A parametrisation of a projection to queries: each head's part times a factor, learned as
    :math:`\exp(\mathrm{log\_factor})`.

    For models that start from softmax weights. With alpha above 1 the same scores keep few keys,
    and a model that weighed many then says what it has not learned. A smaller scale gives the keys
    back, and each head needs another one. Weights would take thousands of steps to shrink, a factor
    takes tens: SmolLM2-135M's loss, before any step, is 3.16 with softmax, 4.66 with alpha 1.5 and
    3.41 with that and 0.35 of the scale (held-out speeches, 512 tokens).

    Learning rate: Adam moves the logarithm of a factor by about its learning rate a step: give
    ``log_factor`` 1e-2, whatever the weights have, and no weight decay.

    A model whose queries are normalised after the projection (QK-norm) does not feel it.

    Args:
        heads: of the queries; the weight's rows are split evenly among them, in order.
        start: the factor that each head starts with.
        device, dtype: of the logarithms.

    Raises:
        TypeError, ValueError: ``heads`` is no integer of at least 1, ``start`` no number above 0,
            or ``dtype`` not floating; when used, a weight whose rows are no multiple of ``heads``.

    Example:
        >>> import torch, adasplash2
        >>> from torch.nn.utils import parametrize
        >>> projection = torch.nn.Linear(64, 4 * 16)  # of a layer whose alpha becomes 1.5
        >>> scale = adasplash2.nn.HeadScale(heads=4, start=0.5)
        >>> _ = parametrize.register_parametrization(projection, "weight", scale)
        >>> projection(torch.randn(2, 64)).sum().backward()
        >>> scale.log_factor.grad.shape
        torch.Size([4])

        After training, the factors become part of the weights:

        >>> _ = parametrize.remove_parametrizations(projection, "weight")
        >>> type(projection)
        <class 'torch.nn.modules.linear.Linear'>
    """

    def __init__(
        self,
        heads: int,
        start: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = check_count("heads", heads, at_least=1)
        self.start = check_finite("start", start)
        if self.start <= 0.0:
            raise ValueError(f"start must be above 0, got {start}")
        self.log_factor = nn.Parameter(torch.empty(heads, device=device, dtype=check_dtype(dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its start."""
        with torch.no_grad():
            self.log_factor.fill_(math.log(self.start))

    def forward(self, weight: Tensor) -> Tensor:
        """``weight``, ``(heads * head_dim, ...)``, with each head's rows multiplied."""
        if weight.shape[0] % self.heads:
            raise ValueError(
                f"the rows of weight must be a multiple of heads={self.heads}, "
                f"got {tuple(weight.shape)}"
            )
        by_head = weight.unflatten(0, (self.heads, -1))
        factor = self.log_factor.exp().to(weight.dtype)
        scaled: Tensor = factor.view(-1, *[1] * (by_head.dim() - 1)) * by_head
        return scaled.flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.heads}"

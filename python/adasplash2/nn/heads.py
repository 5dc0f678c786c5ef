"""A learned factor of each head's scores, in weights that a model has already, and where to start
it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adasplash2.functional import attention_stats, entmax_attention, entmax_attention_varlen
from adasplash2.options import check_alpha, check_count, check_dtype, check_finite, shown

CANDIDATES = tuple(2.0 ** (-step / 4) for step in range(21))
"""Factors that :class:`ScaleMatcher` tries: from 1 to 1/32."""


class HeadScale(nn.Module):
    r"""A parametrisation of a projection to queries: each head's part times a factor, learned as
    :math:`\exp(\mathrm{log\_factor})`.

    For models that start from softmax weights. With alpha above 1 the same scores keep few keys,
    and a model that weighed many then says what it has not learned. A smaller scale gives the keys
    back, and each head needs another one. Weights would take thousands of steps to shrink, a factor
    takes tens. SmolLM2-135M's loss, before any step, is 3.16 with softmax, 4.66 with alpha 1.5,
    3.41 with that and 0.35 of the scale (held-out speeches, 512 tokens); each head's own from
    :class:`ScaleMatcher` does better (3.23 of 768 tokens, where 0.35 for all gives 3.41).

    Learning rate: Adam moves the logarithm of a factor by about its learning rate a step: give
    ``log_factor`` 1e-2, whatever the weights have, and no weight decay.

    A model whose queries are normalised after the projection (QK-norm) does not feel it.

    Args:
        heads: of the queries; the weight's rows are split evenly among them, in order.
        start: the factor that each head starts with: a number, or ``(heads,)``.
        device, dtype: of the logarithms.

    Raises:
        TypeError, ValueError: ``heads`` is no integer of at least 1, ``start`` neither a number
            above 0 nor one for each head, or ``dtype`` not floating; when used, a weight whose rows
            are no multiple of ``heads``.

    Example:
        >>> import torch, adasplash2
        >>> from torch.nn.utils import parametrize
        >>> projection = torch.nn.Linear(64, 4 * 16)  # of a layer whose alpha becomes 1.5
        >>> scale = adasplash2.nn.HeadScale(heads=4, start=0.5)
        >>> _ = parametrize.register_parametrization(projection, "weight", scale)
        >>> projection(torch.randn(2, 64)).sum().backward()
        >>> scale.log_factor.grad.shape
        torch.Size([4])

        A bias of the projection is no part of its weight: give it the factors too, or have none.

        Other weights are written to what is parametrised: there is no ``right_inverse``, which
        would divide the weight by the factors when they are registered, so that they did nothing.

        >>> with torch.no_grad():
        ...     _ = projection.parametrizations.weight.original.normal_()

        After training, the factors become part of the weights:

        >>> _ = parametrize.remove_parametrizations(projection, "weight")
        >>> type(projection)
        <class 'torch.nn.modules.linear.Linear'>
    """

    def __init__(
        self,
        heads: int,
        start: float | Tensor = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = check_count("heads", heads, at_least=1)
        self.start = _check_start(start, heads)
        self.log_factor = nn.Parameter(torch.empty(heads, device=device, dtype=check_dtype(dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its start."""
        with torch.no_grad():
            self.log_factor.copy_(torch.as_tensor(self.start).log())

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


class ScaleMatcher:
    r"""Finds where each head's :class:`HeadScale` should start: the factor with which its output is
    nearest to softmax's, by squared error over all that it has seen, or a larger one that is nearly
    as good: the larger the factor, the fewer keys are kept.

    An observer of attention, as :class:`AttentionMonitor` is: it looks at the queries, keys and
    values of a model that still attends with softmax. A few sequences of what the model is for,
    as long as they will be, tell enough. Every call costs 21 forwards of its attention, and as many
    counts of empty tiles where they are worth something.

    Args:
        alpha: that the model will have.
        tolerance: by how much the squared error may be above the least one, in parts of softmax's
            squared output. SmolLM2-135M keeps 29 keys of 768 with 0, 22 with 0.03, 20 with 0.06,
            and its loss before any step is 3.23, 3.27, 3.32 (softmax 3.12).
        tile_value: what empty tiles (64x64, without a probability above zero) are worth: of each
            head the squared error, in parts of softmax's squared output, minus this times its share
            of empty tiles is the least. So heads whose tiles empty soon pay for it, and those whose
            tiles never do stay near to softmax.

    Raises:
        TypeError, ValueError: ``alpha`` is no number above 1, or ``tolerance`` or ``tile_value``
            none of at least 0; when used, packed sequences with a ``tile_value``: their tiles are
            not counted.

    Example:
        >>> import torch, adasplash2
        >>> from torch.nn.utils import parametrize
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from adasplash2.integrations.transformers import apply
        >>> config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16,
        ...                      num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(config)
        >>> matcher = adasplash2.nn.ScaleMatcher(alpha=1.5)
        >>> _ = apply(model, alpha=1.0, observer=matcher)
        >>> _ = model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]))
        >>> for number, layer in enumerate(model.model.layers):
        ...     scale = adasplash2.nn.HeadScale(4, matcher.factors(number))
        ...     _ = parametrize.register_parametrization(layer.self_attn.q_proj, "weight", scale)
        >>> print(apply(model, alpha=1.5))
        2 of 2 attention layers run adasplash2-1.5
    """

    def __init__(self, alpha: float = 1.5, tolerance: float = 0.0, tile_value: float = 0.0) -> None:
        self.alpha = check_alpha(alpha)
        if self.alpha == 1.0:
            raise ValueError("alpha must be above 1: softmax is what is matched, got 1.0")
        self.tolerance = _check_at_least_0("tolerance", tolerance)
        self.tile_value = _check_at_least_0("tile_value", tile_value)
        # Of each layer: squared errors (candidates, heads), and below them squared outputs.
        self._sums: dict[int, Tensor] = {}
        # And the shares of empty tiles (candidates, heads), of each call and sequence.
        self._empty: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(
        self,
        layer: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        arguments: dict[str, Any],
    ) -> None:
        """The observer: adds the errors of a call to those of its layer."""
        packed = "cu_seqlens_q" in arguments
        if packed and self.tile_value:
            raise ValueError(
                f"tile_value must be 0 for packed sequences, whose empty tiles are not counted, "
                f"got {self.tile_value}"
            )
        attend = entmax_attention_varlen if packed else entmax_attention
        said = arguments | {"dropout_p": 0.0, "alpha": 1.0}
        scale = said.pop("scale", None)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        target = attend(query, key, value, scale=scale, **said).float()
        said["alpha"] = self.alpha
        others = [n for n in range(target.dim()) if n != 1]  # heads stay
        differences = (
            attend(query, key, value, scale=factor * scale, **said) - target
            for factor in CANDIDATES
        )
        sums = torch.stack([x.square().sum(others) for x in (*differences, target)]).cpu()
        self._sums[layer or 0] = self._sums.get(layer or 0, 0.0) + sums
        if self.tile_value:
            shares = (
                attention_stats(query, key, value, scale=factor * scale, **said).empty_tiles
                for factor in CANDIDATES
            )
            self._empty.setdefault(layer or 0, []).append(torch.stack(list(shares), dim=1).cpu())

    def factors(self, layer: int = 0) -> Tensor:
        """Where each head of a layer should start: float32 ``(heads,)`` on the CPU.

        Raises:
            KeyError: no call of this layer was seen.
        """
        return torch.tensor(CANDIDATES)[self._chosen(layer)]

    def empty_tiles(self, layer: int = 0) -> Tensor:
        """The share of empty tiles that each head of a layer has with its factor: ``(heads,)``.

        Raises:
            KeyError: no call of this layer was seen.
            ValueError: without a ``tile_value`` they are not counted.
        """
        if not self.tile_value:
            raise ValueError("tile_value must be above 0: else empty tiles are not counted")
        chosen = self._chosen(layer)
        return self._shares(layer).gather(0, chosen[None])[0]

    def _shares(self, layer: int) -> Tensor:
        return torch.cat(self._empty[layer]).mean(dim=0)

    def _chosen(self, layer: int) -> Tensor:
        """Which candidate each head has, ``(heads,)``."""
        if layer not in self._sums:
            seen = sorted(self._sums)
            raise KeyError(f"layer {layer} was not seen by this ScaleMatcher; seen: {seen}")
        errors, outputs = self._sums[layer][:-1], self._sums[layer][-1]
        if self.tile_value:
            errors = errors - self.tile_value * outputs * self._shares(layer)
        good = errors <= errors.min(dim=0).values + self.tolerance * outputs
        return good.float().argmax(dim=0)  # the first, the largest


def _check_at_least_0(name: str, number: float) -> float:
    number = check_finite(name, number)
    if number < 0.0:
        raise ValueError(f"{name} must be at least 0, got {number}")
    return number


def _check_start(start: float | Tensor, heads: int) -> float | Tensor:
    """``start``, a number or one for each head, all above 0."""
    if not isinstance(start, Tensor):
        number = check_finite("start", start)
        if number <= 0.0:
            raise ValueError(f"start must be above 0, got {start}")
        return number
    if start.shape != (heads,) or not start.is_floating_point():
        raise ValueError(
            f"start must be a number or of shape (heads,) = ({heads},), got {start.dtype} "
            f"{tuple(start.shape)}"
        )
    if start.is_meta:
        raise TypeError(f"start must be a number or a tensor of numbers, got {shown(start)}")
    if not bool(((start > 0.0) & start.isfinite()).all()):
        raise ValueError(f"start must be above 0 and finite, got {start.tolist()}")
    return start.detach().clone()

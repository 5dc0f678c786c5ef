"""What is asked: one attention call or one row mapping, validated once.

Everything right of this module (backends, dispatcher, ops) reads a :class:`Problem`
or a :class:`RowProblem` and never looks at raw arguments again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adasplash2.options import Options, check_alpha, check_dim, check_scale

MAX_HEAD_DIM = 256
"""Largest ``head_dim`` of queries, keys and values; what the kernels' registers are cut for."""

FLOAT32_MAX_ALPHA = 32.0
"""Beyond it distances from a threshold fall below float32's numbers as a rule."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""dtypes read as they are; bfloat16 and float16 are computed in float32."""


class Inputs(NamedTuple):
    """The tensors of one attention call, each ``(batch, heads, length, head_dim)``.

    Later operands (bias, mask, slopes, lengths) become further optional fields here.
    """

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class ScoreTransform:
    """How ``q . k`` becomes a score, and which keys a query may see.

    ``s_ij = scale * (q_i . k_j)`` over the keys ``j`` that query ``i`` may see. With
    ``is_causal`` these are ``j <= i`` (top-left aligned, as torch's SDPA aligns it).
    Windows, slopes, bias and packed lengths become further fields, read in the one place
    per language where a score is formed.
    """

    scale: float
    is_causal: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """One validated attention call, without its data."""

    batch: int
    heads_q: int
    heads_kv: int
    length_q: int
    length_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    alpha: float
    scores: ScoreTransform
    needs_grad: bool
    strided: tuple[str, ...] = field(default=(), compare=False)
    """Names of the inputs whose ``head_dim`` stride is not 1 (backends copy those once). Never a
    reason to decide otherwise, so that forward and backward of one call always decide alike."""

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads_q // self.heads_kv

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the arithmetic and of ``tau``: float64 for float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """Whether no query may see any key: with ``is_causal`` too the first sees the first."""
        return not (self.length_k and self.length_q and self.heads_q and self.batch)

    @property
    def allowed_pairs(self) -> int:
        """(query, key) pairs that the masks allow, summed over batch and query heads."""
        per_head = self.length_q * self.length_k
        if self.scores.is_causal:
            seen = min(self.length_q, self.length_k)
            per_head = seen * (seen + 1) // 2 + (self.length_q - seen) * self.length_k
        return self.batch * self.heads_q * per_head

    def allowed_tiles(self, side: int) -> int:
        """Tiles of ``side`` queries by ``side`` keys with an allowed pair, of one head."""
        rows, columns = -(-self.length_q // side), -(-self.length_k // side)
        if self.scores.is_causal:  # tile (i, j) holds one where j <= i
            return sum(min(i + 1, columns) for i in range(rows))
        return rows * columns


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One validated ``entmax`` call: ``rows`` rows of ``length`` scores each."""

    rows: int
    length: int
    dtype: torch.dtype
    device: torch.device
    alpha: float
    needs_grad: bool


def float32_refusals(problem: Problem | RowProblem) -> list[str]:
    """Reasons against large alphas where thresholds are kept in float32.

    ``n`` equal scores lie ``n^(1 - alpha)`` above theirs, and above alpha = 2 the inverse of that
    is what their gradients are multiplied by.
    """
    if problem.alpha > FLOAT32_MAX_ALPHA:
        return [f"alpha must be at most {FLOAT32_MAX_ALPHA:g} here, got {problem.alpha:g}"]
    if isinstance(problem, RowProblem) or not problem.needs_grad or problem.length_k < 2:
        return []
    largest = 1.0 + 126.0 / math.log2(problem.length_k)
    if problem.alpha <= max(2.0, largest):
        return []
    return [
        f"alpha must be at most {largest:.4g} for gradients over {problem.length_k} keys, which "
        f"leave float32 beyond it, got {problem.alpha:g}"
    ]


def attention_problem(inputs: Inputs, *, needs_grad: bool, **options: Any) -> Problem:
    """:func:`validated`, with the fields of :class:`Options` as keywords."""
    return validated(inputs, Options(**options), needs_grad)


def validated(inputs: Inputs, options: Options, needs_grad: bool) -> Problem:
    """Validate one attention call. ``options.backend`` is not looked at: a problem is the same
    whatever runs it.

    Raises:
        TypeError: an argument is not of the type it must be (a tensor, a number, a floating
            dtype that is supported).
        ValueError: rank, shape, device, head counts, ``alpha`` or ``scale`` do not fit. The
            message names the argument, what came and what is allowed.
    """
    # A loop asks the same again and again: what has been validated is looked up. A compiler asks
    # once, and warns of look-ups that it cannot see into.
    if not torch.compiler.is_compiling():
        query, key, value = inputs
        try:
            return _looked_up(
                _described(query), _described(key), _described(value), needs_grad, *options
            )
        except (AttributeError, RuntimeError, TypeError):
            pass  # no strided tensors, sizes that are symbols, or an error that comes again below
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        check_tensor(name, tensor)
    q, k, v = map(_described, inputs)
    return _validate(q, k, v, needs_grad, *options)


_Described = tuple[torch.Size, torch.dtype, torch.device, bool]
"""A tensor without its data: shape, dtype, device, whether its last stride is 1."""


def _described(tensor: Tensor) -> _Described:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()[-1:] == (1,)


def _validate(
    query: _Described,
    key: _Described,
    value: _Described,
    needs_grad: bool,
    *said: Any,
) -> Problem:
    """:func:`validated` without the data; ``said`` are the :class:`Options`."""
    options = Options._make(said)
    shapes = {name: t[0] for name, t in zip(Inputs._fields, (query, key, value), strict=True)}
    _check_dtype("query", query[1])
    for name, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), "
                f"got {len(shape)} with shape {tuple(shape)}"
            )
    batch, heads_q, length_q, head_dim = shapes["query"]
    _, dtype, device, _ = query
    for name, (shape, its_dtype, its_device, _) in (("key", key), ("value", value)):
        if its_dtype != dtype:
            raise TypeError(f"{name} must have the dtype of query ({dtype}), got {its_dtype}")
        if its_device != device:
            raise ValueError(f"{name} must be on the device of query ({device}), got {its_device}")
        if shape[0] != batch:
            raise ValueError(f"{name} must have the batch of query ({batch}), got {shape[0]}")
    _, heads_kv, length_k, key_dim = shapes["key"]
    _, value_heads, value_length, head_dim_v = shapes["value"]
    if key_dim != head_dim:
        raise ValueError(f"key must have the head_dim of query ({head_dim}), got {key_dim}")
    if value_heads != heads_kv or value_length != length_k:
        raise ValueError(
            f"value must have the heads and length of key ({heads_kv}, {length_k}), "
            f"got ({value_heads}, {value_length})"
        )
    for name, width in (("query", head_dim), ("value", head_dim_v)):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head_dim of 1 to {MAX_HEAD_DIM}, got {width}")
    if heads_kv != heads_q:
        if not options.enable_gqa:
            raise ValueError(
                f"key must have the heads of query ({heads_q}), got {heads_kv}; "
                "pass enable_gqa=True to let query heads share key heads"
            )
        if heads_kv == 0 or heads_q % heads_kv:
            raise ValueError(
                f"query must have a multiple of the heads of key ({heads_kv}), got {heads_q}"
            )
    alpha = check_alpha(options.alpha)
    scale = _check_factor(alpha, check_scale(options.scale, head_dim), dtype)
    return Problem(
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        length_q=length_q,
        length_k=length_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        device=device,
        alpha=alpha,
        scores=ScoreTransform(scale=scale, is_causal=bool(options.is_causal)),
        needs_grad=needs_grad,
        strided=tuple(
            name
            for name, t in zip(Inputs._fields, (query, key, value), strict=True)
            if t[0][3] > 1 and not t[3]
        ),
    )


# Types count: True equals 1.0 and is no number here.
_looked_up = functools.lru_cache(maxsize=1024, typed=True)(_validate)


def row_problem(x: Tensor, *, alpha: float, needs_grad: bool) -> RowProblem:
    """Validate one ``entmax`` call over the last dimension of ``x``.

    Raises:
        TypeError, ValueError: as :func:`validated`.
    """
    check_tensor("x", x)
    check_dim(-1, x.dim())
    length = x.shape[-1]
    return RowProblem(
        rows=math.prod(x.shape[:-1]),
        length=length,
        dtype=x.dtype,
        device=x.device,
        alpha=check_alpha(alpha),
        needs_grad=needs_grad,
    )


def _check_factor(alpha: float, scale: float, dtype: torch.dtype) -> float:
    """``scale``, of which the kernels make one factor with ``alpha`` in the compute dtype."""
    limit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    if abs(scale) * max(1.0, alpha - 1.0) > limit:
        raise ValueError(
            f"scale times alpha - 1 must be at most {limit:.3g} for {dtype}, got scale {scale:g} "
            f"with alpha {alpha:g}"
        )
    return scale


def check_tensor(name: str, tensor: object) -> None:
    """Refuse what no shape can make right.

    Raises:
        TypeError: ``tensor`` is no tensor, not strided, nested, or of a dtype outside
            :data:`DTYPES`.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    _check_dtype(name, tensor.dtype)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a tensor of one shape, got a nested tensor")


def check_like(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse what is not strided, of this shape and dtype, and on this device.

    Raises:
        TypeError: another dtype or layout.
        ValueError: another shape or device.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must have the dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        allowed = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {dtype}")

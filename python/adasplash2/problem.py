"""What is asked: one attention call or one row mapping, validated once.

Everything right of this module (backends, dispatcher, ops) reads a :class:`Problem`
or a :class:`RowProblem` and never looks at raw arguments again.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def attention_problem(
    inputs: Inputs,
    *,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    needs_grad: bool,
) -> Problem:
    """Validate one attention call.

    Raises:
        TypeError: an argument is not of the type it must be (a tensor, a number, a floating
            dtype that is supported).
        ValueError: rank, shape, device, head counts, ``alpha`` or ``scale`` do not fit. The
            message names the argument, what came and what is allowed.
    """
    query, key, value = inputs
    # A loop asks the same again and again: what has been validated is looked up. A compiler asks
    # once, and warns of look-ups that it cannot see into.
    if not torch.compiler.is_compiling():
        try:
            return _validated(
                _described(query),
                _described(key),
                _described(value),
                alpha,
                scale,
                is_causal,
                enable_gqa,
                needs_grad,
            )
        except (AttributeError, RuntimeError, TypeError):
            pass  # no strided tensors, sizes that are symbols, or an error that comes again below
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        check_tensor(name, tensor)
    q, k, v = map(_described, inputs)
    return _validate(q, k, v, alpha, scale, is_causal, enable_gqa, needs_grad)


_Described = tuple[torch.Size, torch.dtype, torch.device, bool]
"""A tensor without its data: shape, dtype, device, whether its last stride is 1."""


def _described(tensor: Tensor) -> _Described:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()[-1:] == (1,)


def _validate(
    query: _Described,
    key: _Described,
    value: _Described,
    alpha: float,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    needs_grad: bool,
) -> Problem:
    """:func:`attention_problem` without the data."""
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
        if not enable_gqa:
            raise ValueError(
                f"key must have the heads of query ({heads_q}), got {heads_kv}; "
                "pass enable_gqa=True to let query heads share key heads"
            )
        if heads_kv == 0 or heads_q % heads_kv:
            raise ValueError(
                f"query must have a multiple of the heads of key ({heads_kv}), got {heads_q}"
            )
    alpha = check_alpha(alpha)
    scale = _check_factor(alpha, check_scale(scale, head_dim), dtype)
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
        scores=ScoreTransform(scale=scale, is_causal=bool(is_causal)),
        needs_grad=needs_grad,
        strided=tuple(
            name
            for name, t in zip(Inputs._fields, (query, key, value), strict=True)
            if t[0][3] > 1 and not t[3]
        ),
    )


# Types count: True equals 1.0 and is no number here.
_validated = functools.lru_cache(maxsize=1024, typed=True)(_validate)


def row_problem(x: Tensor, *, alpha: float, needs_grad: bool) -> RowProblem:
    """Validate one ``entmax`` call over the last dimension of ``x``.

    Raises:
        TypeError, ValueError: as :func:`attention_problem`.
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


def check_alpha(alpha: float) -> float:
    """``alpha`` as a float.

    Raises:
        TypeError: ``alpha`` is not a real number.
        ValueError: ``alpha`` is NaN, infinite or below 1.
    """
    if type(alpha) is float and 1.0 <= alpha < math.inf:  # every call comes by, some twice
        return alpha
    number = _as_float("alpha", alpha, "a real number of at least 1")
    if not 1.0 <= number < math.inf:  # also refuses NaN
        raise ValueError(f"alpha must be a finite number of at least 1, got {shown(alpha)}")
    return number


def check_alpha_above_one(alpha: float) -> float:
    """:func:`check_alpha` where softmax, ``alpha = 1``, has no place.

    Raises:
        TypeError, ValueError: as :func:`check_alpha`, and for 1.
    """
    alpha = check_alpha(alpha)
    if alpha == 1.0:
        raise ValueError("alpha must be greater than 1 here (1 is softmax), got 1.0")
    return alpha


def _check_factor(alpha: float, scale: float, dtype: torch.dtype) -> float:
    """``scale``, of which the kernels make one factor with ``alpha`` in the compute dtype."""
    limit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    if abs(scale) * max(1.0, alpha - 1.0) > limit:
        raise ValueError(
            f"scale times alpha - 1 must be at most {limit:.3g} for {dtype}, got scale {scale:g} "
            f"with alpha {alpha:g}"
        )
    return scale


def check_scale(scale: float | None, head_dim: int) -> float:
    """``scale``, or ``1 / sqrt(head_dim)`` where it is None.

    Raises:
        TypeError: ``scale`` is not a real number or None.
        ValueError: ``scale`` is NaN or infinite.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    number = scale if type(scale) is float else _as_float("scale", scale, "a real number or None")
    if not -math.inf < number < math.inf:  # also refuses NaN
        raise ValueError(f"scale must be finite, got {shown(scale)}")
    return number


def _as_float(name: str, value: object, allowed: str) -> float:
    """A Python or NumPy number, or a tensor of no dimensions, as a float; infinite where no float
    is large enough."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be {allowed}: it has no gradient, pass {name}.detach()")
    # First what a tracer knows. Symbols are numbers that a graph is traced with.
    number: Any = value if isinstance(value, (int, float)) else _item(value)
    if isinstance(number, bool) or not isinstance(number, (numbers.Real, *_SYMBOLS)):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    try:
        return float(number)
    except OverflowError:  # of an integer or a fraction
        return -math.inf if number < 0.0 else math.inf


_SYMBOLS = torch.SymInt, torch.SymFloat


def check_flag(name: str, value: object) -> bool:
    """``value`` as a bool.

    Raises:
        TypeError: it is neither True nor False, nor NumPy's.
    """
    flag = value if isinstance(value, (bool, Tensor)) else _item(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return flag


def check_dim(dim: int, dims: int) -> int:
    """``dim`` of a tensor of ``dims`` dimensions, counted from the end: -1 is the last.

    Raises:
        TypeError: ``dim`` is no integer.
        IndexError: there is no such dimension.
    """
    if type(dim) is not int:
        number: Any = _item(dim)
        try:
            dim = operator.index(None if isinstance(number, bool) else number)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"dim must be an int, got {shown(dim)}") from None
    if dims == 0:
        raise ValueError("x must have at least 1 dimension, got a 0-dimensional tensor")
    if not -dims <= dim < dims:
        raise IndexError(f"dim must be from {-dims} to {dims - 1}, got {shown(dim)}")
    return dim if dim < 0 else dim - dims


def _item(value: Any) -> object:
    """What NumPy's scalars, and arrays and tensors of no dimensions, hold; else ``value``."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        try:
            item: object = value.item()
        except RuntimeError:  # a tensor without a number: of a trace, a transform, the meta device
            raise TypeError(
                f"a number must be known here, got a tensor without one: {type(value).__name__} on "
                f"{getattr(value, 'device', 'no device')}; pass a Python number"
            ) from None
        return item
    return value


def shown(value: object) -> str:
    """``repr`` for a message: short, and never an error (integers beyond 4,300 digits are one)."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


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

"""The options: what a caller may say beside the tensors, once for every function and operator.

A new option is one more field of :class:`Options`. It then has its place in the operators' schema,
in what is validated and remembered, and in what backward is told; the public signature in
:mod:`adasplash2.functional` and its docstring name it for users.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from adasplash2 import backends as registry


class Options(NamedTuple):
    """Of one attention call, in the order in which operators take them.

    Attributes:
        alpha: above 1, or 1 for softmax.
        scale: of the scores; ``1 / sqrt(head_dim)`` where None.
        is_causal: query ``i`` sees keys ``j <= i``.
        enable_gqa: query heads may share key heads.
        backend: name of the backend to run; ``""`` leaves the choice to the dispatcher.
    """

    alpha: float = 1.5
    scale: float | None = None
    is_causal: bool = False
    enable_gqa: bool = False
    backend: str = ""


_SCHEMA_TYPES = {float: "Scalar", float | None: "Scalar?", bool: "bool", str: "str"}

SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Options).items()
)
""":class:`Options` as arguments of an operator."""


def check_options(
    *, alpha: float, scale: float | None, is_causal: bool, enable_gqa: bool, backend: str | None
) -> Options:
    """What a caller said, as Python's own types: an operator's schema would refuse the rest in the
    dispatcher's words rather than ours.

    Raises:
        TypeError: an option is not of its type.
        ValueError: ``alpha`` or ``scale`` is out of range, or there is no backend of that name.
    """
    return Options(
        alpha=check_alpha(alpha),
        scale=None if scale is None else check_scale(scale, head_dim=1),
        is_causal=check_flag("is_causal", is_causal),
        enable_gqa=check_flag("enable_gqa", enable_gqa),
        backend=check_backend(backend),
    )


def check_backend(backend: str | None, source: str = "") -> str:
    """The name of a backend, or ``""`` for None.

    Raises:
        TypeError: ``backend`` is neither a text nor None.
        ValueError: the registry has no backend of that name.
    """
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be the name of a backend or None, got {shown(backend)}")
    if backend not in registry.REGISTRY:
        known = ", ".join(repr(name) for name in registry.REGISTRY)
        raise ValueError(f"backend must be None or one of {known}, got {backend!r}{source}")
    return backend


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
    number: Any = value if isinstance(value, (int, float)) else _item(value, name)
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
    if value is True or value is False:
        return value
    flag = value if isinstance(value, Tensor) else _item(value, name)
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
        number: Any = _item(dim, "dim")
        try:
            dim = operator.index(None if isinstance(number, bool) else number)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"dim must be an int, got {shown(dim)}") from None
    if dims == 0:
        raise ValueError("x must have at least 1 dimension, got a 0-dimensional tensor")
    if not -dims <= dim < dims:
        raise IndexError(f"dim must be from {-dims} to {dims - 1}, got {shown(dim)}")
    return dim if dim < 0 else dim - dims


def _item(value: Any, name: str) -> object:
    """What NumPy's scalars, and arrays and tensors of no dimensions, hold; else ``value``."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        try:
            item: object = value.item()
        except RuntimeError:  # a tensor without a number: of a trace, a transform, the meta device
            raise TypeError(
                f"{name} must be known here, got a tensor without a number: {type(value).__name__} "
                f"on {getattr(value, 'device', 'no device')}; pass a Python number"
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

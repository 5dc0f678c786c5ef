"""The options: what a caller may say beside the tensors, once for every function and operator.

:class:`Said` has what users say, by the names of arguments; :class:`Options` what is left of it
once it is checked, in Python's own types. A field of :class:`Options` has its place in the
operators' schema, in what is validated and remembered, and in what backward is told. What is a
tensor is a field of :class:`Said` and of :class:`adasplash2.problem.Inputs`. All that a new option
needs beside is told in ``CONTRIBUTING.md``.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, NamedTuple, TypedDict, get_type_hints

import torch
from torch import Tensor

from adasplash2 import backends as registry
from adasplash2.torch_fastpath import is_mapped

NOTHING = 0
"""Default of numbers that are of no effect: not 0.0, since compilers make symbols of floats, where
graphs are dynamic, and begin anew when they find them compared."""


class Said(NamedTuple):
    """What a caller says beside query, key and value: the arguments of
    :func:`adasplash2.entmax_attention`, as they came. :class:`ScoreOptions` come last, so that the
    others can be given in their places: calls are faster so. Tensors stand together."""

    dropout_p: float = NOTHING
    is_causal: bool = False
    scale: float | Tensor | None = None
    enable_gqa: bool = False
    causal_align: str = "top-left"
    attn_mask: Tensor | None = None
    q_lengths: Tensor | None = None
    kv_lengths: Tensor | None = None
    kv_starts: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    alpha: float | Tensor = 1.5
    window: tuple[int, int] | None = None
    softcap: float = NOTHING
    backend: str | None = None

    def has_tensors(self) -> bool:
        """Whether one of those that are nothing but tensors is given."""
        for tensor in self[_FIRST_TENSOR:_BEHIND_TENSORS]:  # noqa: SIM110 (any() takes three times as long)
            if tensor is not None:
                return True
        return False


def _tensors(types: dict[str, Any]) -> tuple[int, int]:
    """Where the fields begin and end that are nothing but tensors.

    Raises:
        TypeError: others stand between them: :meth:`Said.has_tensors` would miss one.
    """
    kinds = [kind == Tensor | None for kind in types.values()]
    begin, end = kinds.index(True), len(kinds) - kinds[::-1].index(True)
    if not all(kinds[begin:end]):
        raise TypeError(f"what is a tensor must stand together, got {', '.join(types)}")
    return begin, end


_FIRST_TENSOR, _BEHIND_TENSORS = _tensors(get_type_hints(Said))


class ScoreOptions(TypedDict, total=False):
    """What every function of attention takes by name, as said in
    :func:`adasplash2.entmax_attention`; with the defaults of :class:`Said`."""

    alpha: float | Tensor
    window: tuple[int, int] | None
    alibi_slopes: Tensor | None
    softcap: float
    sinks: Tensor | None
    backend: str | None


class Options(NamedTuple):
    """Of one attention call, in the order in which operators take them.

    Attributes:
        alpha: above 1, or 1 for softmax.
        scale: of the scores; ``1 / sqrt(head_dim)`` where None.
        is_causal: query ``i`` sees keys ``j <= i``.
        enable_gqa: query heads may share key heads.
        backend: name of the backend to run; ``""`` leaves the choice to the dispatcher.
        causal_align: ``"top-left"`` or ``"bottom-right"``: where the diagonal of causal masks,
            windows and slopes begins, or ends.
        window_left, window_right: keys before and behind the diagonal that are seen; -1 for all.
        softcap: scores are kept within it; 0 for no limit.
        dropout_p: probability with which a probability is dropped.
    """

    alpha: float = 1.5
    scale: float | None = None
    is_causal: bool = False
    enable_gqa: bool = False
    backend: str = ""
    causal_align: str = "top-left"
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0


FIRST = 5
"""How many options operators take first, without defaults. Those that came later stand behind all
arguments that operators had by then, with defaults, so that graphs of older releases stay valid."""

_SCHEMA_TYPES = {
    float: "Scalar",
    float | None: "Scalar?",
    bool: "bool",
    int: "SymInt",
    str: "str",
}


_TYPES = get_type_hints(Options)

NUMBERS = tuple(name for name, kind in _TYPES.items() if kind in (float, float | None))
"""Options that compilers make symbols of, see :mod:`adasplash2.ops`."""

MAY_BE_NONE = frozenset(name for name in NUMBERS if _TYPES[name] is not float)
"""Those of them that need not be said."""


def _schema() -> tuple[str, str]:
    parts = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in _TYPES.items()]
    defaults = Options()[FIRST:]
    shown = [f'"{value}"' if isinstance(value, str) else f"{value}" for value in defaults]
    later = [f"{part}={value}" for part, value in zip(parts[FIRST:], shown, strict=True)]
    return ", ".join(parts[:FIRST]), ", ".join(later)


SCHEMA, LATER_SCHEMA = _schema()
""":class:`Options` as arguments of an operator, the first of them and the others."""

ALIGNMENTS = "top-left", "bottom-right"


def check_options(said: Said) -> tuple[Options, Tensor | None, Tensor | None]:
    """What a caller said, as Python's own types: an operator's schema would refuse the rest in the
    dispatcher's words rather than ours. With the options come ``alpha`` and ``scale``, where they
    are tensors as :func:`tensor_or_number` has it.

    Raises:
        TypeError: an option is not of its type.
        ValueError: an option is out of range, or there is no backend of that name.
    """
    alphas, number_alpha = tensor_or_number(said.alpha, 1.5)
    scales, number_scale = tensor_or_number(said.scale, None)
    left, right = check_window(said.window)
    options = Options(  # all fields: compilers make symbols of defaults
        alpha=check_alpha(number_alpha),
        scale=None if number_scale is None else check_scale(number_scale, head_dim=1),
        is_causal=check_flag("is_causal", said.is_causal),
        enable_gqa=check_flag("enable_gqa", said.enable_gqa),
        backend=check_backend(said.backend),
        causal_align=check_alignment(said.causal_align),
        window_left=left,
        window_right=right,
        softcap=check_softcap(said.softcap),
        dropout_p=check_dropout(said.dropout_p),
    )
    return options, alphas, scales


def tensor_or_number(value: Any, otherwise: Any) -> tuple[Tensor | None, Any]:
    """A tensor of numbers, or one that has a gradient or that ``vmap`` maps over, and what stands
    in its place; or None and the number."""
    if type(value) is float or value is None:  # as most calls have it
        return None, value
    if isinstance(value, Tensor) and (value.dim() > 0 or value.requires_grad or is_mapped(value)):
        return value, otherwise
    return None, value


WIDEST_WINDOW = 2**30
"""Of a side: more keys than any sequence has."""


def check_window(window: tuple[int, int] | None) -> tuple[int, int]:
    """``(left, right)``, -1 where a side is open.

    Raises:
        TypeError: ``window`` is neither None nor a pair of integers.
        ValueError: a side is below -1.
    """
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be None or a pair (left, right), got {shown(window)}")
    sides = tuple(_as_int("window", side) for side in window)
    if min(sides) < -1:
        raise ValueError(f"window must have sides of at least -1 (open), got {shown(window)}")
    # Places are 32-bit numbers in kernels, to which a side is added.
    left, right = (min(s, WIDEST_WINDOW) if isinstance(s, int) else s for s in sides)
    return left, right


def check_count(name: str, value: int, at_least: int = 0) -> int:
    """An integer of at least ``at_least``.

    Raises:
        TypeError, ValueError: it is not.
    """
    number = _as_int(name, value)
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {shown(value)}")
    return number


def check_finite(name: str, value: float) -> float:
    """A finite number.

    Raises:
        TypeError, ValueError: it is not.
    """
    number = _as_float(name, value, "a real number")
    if not -math.inf < number < math.inf:  # also refuses NaN
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return number


def check_alignment(causal_align: str) -> str:
    """``"top-left"`` or ``"bottom-right"``.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if not isinstance(causal_align, str):
        raise TypeError(f"causal_align must be a text, got {shown(causal_align)}")
    if causal_align not in ALIGNMENTS:
        raise ValueError(
            f"causal_align must be {' or '.join(map(repr, ALIGNMENTS))}, got {shown(causal_align)}"
        )
    return causal_align


def check_softcap(softcap: float) -> float:
    """A finite number of at least 0; 0 is no limit.

    Raises:
        TypeError, ValueError: it is not.
    """
    if softcap is NOTHING:  # as most calls have it
        return 0.0
    number = _as_float("softcap", softcap, "a real number of at least 0")
    if not 0.0 <= number < math.inf:  # also refuses NaN
        raise ValueError(f"softcap must be finite and at least 0 (none), got {shown(softcap)}")
    return number


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    """A number in [0, 1).

    Raises:
        TypeError, ValueError: it is not.
    """
    if dropout_p is NOTHING:  # as most calls have it
        return 0.0
    number = _as_float(name, dropout_p, "a real number in [0, 1)")
    if not 0.0 <= number < 1.0:  # also refuses NaN
        raise ValueError(f"{name} must be in [0, 1), got {shown(dropout_p)}")
    return number


def _as_int(name: str, value: object) -> int:
    """A Python or NumPy integer, or a symbol of a graph that is being traced."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    number: Any = _item(value, name)
    try:
        return operator.index(None if isinstance(number, bool) else number)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be of integers, got {shown(value)}") from None


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
        TypeError: it is neither True nor False, nor NumPy's or a trace's.
    """
    if value is True or value is False:
        return value
    if isinstance(value, (bool, torch.SymBool)):
        # A comparison of sizes in a trace is known by branching; bool() leaves it a symbol.
        return True if value else False  # noqa: SIM210
    flag = value if isinstance(value, Tensor) else _item(value, name)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return flag


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """A floating dtype; torch's default for None.

    Raises:
        TypeError: it is none.
    """
    if dtype is None:
        return torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype or None, got {shown(dtype)}")
    return dtype


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

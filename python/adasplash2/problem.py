"""What is asked: one attention call or one row mapping, validated once.

Everything right of this module (backends, dispatcher, ops) reads a :class:`Problem`
or a :class:`RowProblem` and never looks at raw arguments again.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, dataclass, field, fields
from operator import attrgetter
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from adasplash2.options import Options, check_alpha, check_dim, check_scale
from adasplash2.torch_fastpath import beside

MAX_HEAD_DIM = 256
"""Largest ``head_dim`` of queries, keys and values; what the kernels' registers are cut for."""

FLOAT32_MAX_ALPHA = 32.0
"""Beyond it distances from a threshold fall below float32's numbers as a rule."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""dtypes read as they are; bfloat16 and float16 are computed in float32."""


class Inputs(NamedTuple):
    """The tensors of one attention call: first those that every call has, then *operands*, which
    are None where they are not used.

    Dimensions of operands are of the size named or 1, which holds for all; none is expanded in
    memory. Numbers are in the compute dtype, except those of ``attn_mask``.

    Attributes:
        query, key, value: ``(batch, heads, length, head_dim)``.
        attn_mask: ``(batch, heads_q, length_q, length_k)``; bool (True may be seen), or added to
            the scores, in the dtype of ``query`` or float32.
        alibi_slopes: ``(batch, heads_q)`` or ``(batch, heads_q, length_q)``, times the distance
            taken from a score.
        sinks: ``(batch, heads_q)``, one more score of each row, without a value.
        scales: ``(batch, heads_q, length_q)``, in the place of the number ``scale``.
        alphas: ``(batch, heads_q)``, in the place of the number ``alpha``; in (1, 2].
        ranges: int32 ``(3, batch, length_q)``: first key and end of the keys that a query may see,
            and the key whose distance is 0 (what ``i'`` is, see :class:`ScoreTransform`). Neither
            of the first two falls from one query to the next. They hold all that causal masks,
            windows, lengths and packed sequences say, in whose place they stand.
        dropout_seed: int64 ``(batch,)``.
        block_table: int32 ``(batch, pages)``, for a paged cache: ``key`` and ``value`` are ``(pages
            there are, heads, page_size, head_dim)``, and key ``j`` of a sequence is number ``j %
            page_size`` of page ``block_table[j // page_size]``. Numbers of no page stand for the
            nearest one: behind a sequence's end anything may stand.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scales: Tensor | None = None
    alphas: Tensor | None = None
    ranges: Tensor | None = None
    dropout_seed: Tensor | None = None
    block_table: Tensor | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self[:3]

    def operands(self) -> tuple[Tensor | None, ...]:
        """All that may be None."""
        return self[3:]

    def given(self) -> tuple[Tensor, ...]:
        """All that are not None."""
        return tuple(t for t in self if t is not None) if self.has_operands() else self[:3]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """All that are given, each as ``function`` makes it."""
        return Inputs._make(t if t is None else function(t) for t in self)

    def has_operands(self) -> bool:
        """Whether one is given."""
        for operand in self[3:]:  # noqa: SIM110 (any() takes three times as long)
            if operand is not None:
                return True
        return False


TENSORS = Inputs._fields[:3]
OPERANDS = Inputs._fields[3:]

DIFFERENTIABLE = ("attn_mask", "alibi_slopes", "sinks", "scales", "alphas")
"""Operands that may have a gradient."""


class Operand(NamedTuple):
    """What is known of an operand before a call: ``spread`` says which of its dimensions are not of
    size 1."""

    name: str
    dtype: torch.dtype
    spread: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ScoreTransform:
    """How ``q . k`` becomes a score, and which keys a query may see: what numbers say of it. The
    rest are operands, see :class:`Inputs`.

    In this order: ``s_ij = scale * (q_i . k_j)``; with a softcap ``c``, ``c * tanh(s / c)``; plus
    an additive mask; minus ``slope * |i' - j|``. Query ``i`` sees the keys ``j`` with ``i' - left
    <= j <= i' + right``, where ``i'`` is ``i``, or ``i + length_k - length_q`` where
    ``bottom_right``. What computes this is ``src/cpp/score.h``, ``score.cuh`` and ``score.py`` in
    the backends' ``kernels``, and for softmax ``softmax.py``.

    Dropout is drawn anew wherever it is needed: ``p_ij`` of sequence ``b`` and head ``h`` is
    dropped where the first word of Philox-4x32 with 10 rounds (Salmon et al. 2011) is below
    ``floor(dropout_p 2^32)``; its key is the two halves of ``dropout_seed[b]``, the lower first,
    its counter ``(j, i, b heads_q + h, 0)``.

    Attributes:
        scale: 1 where ``scales`` are an operand.
        is_causal: ``j <= i'``.
        window: ``left`` and ``right``, -1 where that side is open.
        bottom_right: said only where something depends on ``i'``.
        softcap: 0 where there is none.
        dropout_p: of a probability, after which the others are divided by ``1 - dropout_p``.
    """

    scale: float
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0

    @property
    def left(self) -> int:
        """Keys before ``i'`` that are seen; -1 for all."""
        return self.window[0]

    @property
    def right(self) -> int:
        """Keys behind ``i'`` that are seen; -1 for all."""
        return 0 if self.is_causal else self.window[1]


Kind = tuple[Any, ...]
"""What problems that are decided alike have in common, see :attr:`Asked.kind`."""


class Asked:
    """What :class:`Problem` and :class:`RowProblem` have in common."""

    __slots__ = ("_features", "_kind")
    _features: tuple[str, ...]
    _kind: Kind

    @property
    def features(self) -> tuple[str, ...]:
        """What is asked beyond plain and causal attention: public names of arguments. Found once:
        backends ask with every call."""
        try:
            return self._features
        except AttributeError:
            object.__setattr__(self, "_features", tuple(self._asked()))
            return self._features

    def _asked(self) -> Iterator[str]:
        raise NotImplementedError

    @property
    def kind(self) -> Kind:
        """What decides who runs this and how: problems of one kind get one decision.

        All fields that are compared, so that no new one is forgotten, but for what backends may not
        decide by: ``scale``, the values of ``softcap`` and ``dropout_p``, and how large sizes and
        windows are beyond what :func:`rounded` tells of them. So a sequence that grows is of a new
        kind twice from one power of two to the next. A backend may ask whether a length, the width
        of a window or the number of all query rows is below a power of two or at it; the number of
        queries exactly up to :data:`FEW`, that of key heads only by ``gqa_group``. Where it must
        ask more, sizes are in the kind as they are: see :func:`_is_exact`.
        """
        try:
            return self._kind
        except AttributeError:
            object.__setattr__(self, "_kind", _kind_of(self))
            return self._kind


@dataclass(frozen=True, slots=True)
class Problem(Asked):
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
    """1.5 where ``alphas`` are an operand."""
    scores: ScoreTransform
    needs_grad: bool
    operands: tuple[Operand, ...] = ()
    """Those that are given, in the order of :class:`Inputs`."""
    page_size: int = 0
    """Keys of a page; 0 where there is no ``block_table``. ``length_k`` is what its pages hold."""
    strided: tuple[str, ...] = field(default=(), compare=False)
    """Names of the inputs whose ``head_dim`` stride is not 1 (backends copy those once). Never a
    reason to decide otherwise, so that forward and backward of one call always decide alike."""

    @property
    def gqa_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads_q // self.heads_kv if self.heads_kv else 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the arithmetic and of ``tau``: float64 for float64, else float32."""
        return compute_dtype(self.dtype)

    @property
    def shift(self) -> int:
        """``i' - i``, where there are no ``ranges``."""
        return self.length_k - self.length_q if self.scores.bottom_right else 0

    def operand(self, name: str) -> Operand | None:
        """What is known of an operand; None where it is not given."""
        for operand in self.operands:
            if operand.name == name:
                return operand
        return None

    def _asked(self) -> Iterator[str]:
        yield from _features_of(self.scores)
        yield from (shown_as(o.name) for o in self.operands if o.name not in PLAIN)

    @property
    def is_empty(self) -> bool:
        """Whether there is no pair of a query and a key."""
        return not (self.length_k and self.length_q and self.heads_q and self.batch)

    def visible(self, i: int) -> tuple[int, int]:
        """First key and end of the keys that query ``i`` may see, where there are no ``ranges``."""
        at, (left, right) = i + self.shift, (self.scores.left, self.scores.right)
        begin = min(max(0, at - left), self.length_k) if left >= 0 else 0
        end = max(begin, min(self.length_k, at + right + 1)) if right >= 0 else self.length_k
        return begin, end

    @property
    def allowed_pairs(self) -> int:
        """(query, key) pairs that causal masks and windows allow, summed over batch and query
        heads. Of ``ranges`` and ``attn_mask``, which are data, nothing is known."""
        s, n = self.scores, self.length_q * self.length_k
        if s.left < 0 and s.right < 0:
            return self.batch * self.heads_q * n
        # Pairs before the end of what is seen, less those before its beginning.
        ends = _sum_of_clamped(self.shift + s.right + 1, self.length_q, self.length_k)
        begins = _sum_of_clamped(self.shift - s.left, self.length_q, self.length_k)
        seen = (ends if s.right >= 0 else n) - (begins if s.left >= 0 else 0)
        return self.batch * self.heads_q * max(0, seen)

    def allowed_tiles(self, side: int) -> int:
        """Tiles of ``side`` queries by ``side`` keys with a pair that causal masks and windows
        allow, of one head."""
        rows, columns = -(-self.length_q // side), -(-self.length_k // side)
        if self.scores.left < 0 and self.scores.right < 0:
            return rows * columns
        found = 0
        for block in range(rows):
            begin = self.visible(block * side)[0]
            end = self.visible(min(self.length_q, (block + 1) * side) - 1)[1]
            found += max(0, -(-end // side) - begin // side) if end > begin else 0
        return found


Problems = list[Problem | None]
"""Of a call that comes again and again, without and with gradients; None until they are known."""

PLAIN = {
    *("scale", "is_causal"),  # every backend's
    "dropout_seed",  # comes with dropout_p
    *("rows", "length", "dtype", "device", "alpha", "needs_grad"),  # of rows
}
"""Fields and operands that are no features. All others are, by their names: what no backend has
heard of is refused by all, see :func:`unsupported`."""

_SHOWN = {
    "bottom_right": "causal_align",
    "scales": "scale as a tensor",
    "alphas": "alpha as a tensor",
    "ranges": "lengths or packed sequences",
}


def shown_as(name: str) -> str:
    """What users call a field of :class:`ScoreTransform` or an operand."""
    return _SHOWN.get(name, name)


FEATURES = {
    name: shown_as(name)
    for name in (*(number.name for number in fields(ScoreTransform)), *OPERANDS)
    if name not in PLAIN
}
"""All that :attr:`Problem.features` may have, by the names of fields and operands."""


def _features_of(said: ScoreTransform | RowProblem) -> list[str]:
    """Fields that are not what they are by default."""
    named = _DEFAULTS.get(type(said)) or _defaults(type(said))
    return [shown_as(name) for name, default in named if getattr(said, name) != default]


def _defaults(kind: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((one.name, one.default) for one in fields(kind) if one.name not in PLAIN)


ALL = slice(None)


def places(problem: Problem, inputs: Inputs, rows: slice) -> Tensor:
    """``i'`` of the queries ``rows``; broadcasts to ``(batch, heads_q, rows)``."""
    if inputs.ranges is not None:
        return inputs.ranges[2][:, None, rows]
    queries = torch.arange(problem.length_q, device=problem.device)[rows] + problem.shift
    return beside(queries, inputs.query)


def seen_keys(problem: Problem, inputs: Inputs, rows: slice, part: slice = ALL) -> Tensor:
    """Which keys of a ``part`` the queries ``rows`` may see: bool, broadcasts to ``(batch, heads_q,
    rows, keys)``. For what is looked at: kernels know it by themselves."""
    said, mask = problem.scores, inputs.attn_mask
    keys = beside(torch.arange(problem.length_k, device=problem.device)[part], inputs.query)
    distance = keys - places(problem, inputs, rows)[..., None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if inputs.ranges is not None:
        begin, end = (inputs.ranges[i][:, None, rows, None] for i in (0, 1))
        seen = (keys >= begin) & (keys < end)
    else:
        if said.left >= 0:
            seen = seen & (distance >= -said.left)
        if said.right >= 0:
            seen = seen & (distance <= said.right)
    if mask is not None:  # what is added as -inf hides a key too, whatever its score
        mask = part_of(part_of(mask, 2, rows), 3, part)
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    return seen


def span_of_keys(problem: Problem, inputs: Inputs, rows: slice) -> slice:
    """From the first to the last key that one of these queries may see, whatever a mask hides."""
    if inputs.ranges is not None:
        begins, ends = inputs.ranges[:2, :, rows]
        seeing = ends > begins
        if not seeing.any():
            return slice(0, 0)
        return slice(int(begins[seeing].min()), int(ends[seeing].max()))
    return slice(problem.visible(rows.start)[0], problem.visible(rows.stop - 1)[1])


def allowed_tiles(problem: Problem, inputs: Inputs, side: int) -> Tensor:
    """Tiles of ``side`` queries by ``side`` keys with a pair that may be seen: ``(batch,
    heads_q)``, of which either is 1 where it holds for all."""
    if inputs.ranges is None and inputs.attn_mask is None:
        return torch.full((1, 1), problem.allowed_tiles(side), device=problem.device)
    count = torch.zeros((1, 1), dtype=torch.int64, device=problem.device)
    for first in range(0, problem.length_q, side):
        rows = slice(first, min(first + side, problem.length_q))
        seen = seen_keys(problem, inputs, rows).any(dim=-2)
        seen = torch.nn.functional.pad(seen, (0, -problem.length_k % side))
        count = count + seen.unflatten(-1, (-1, side)).any(dim=-1).sum(dim=-1)
    return count


def unpaged(inputs: Inputs) -> Inputs:
    """The keys and values of a paged cache as tensors of their own, a copy."""
    table = inputs.block_table
    if table is None:
        return inputs

    def joined(pages: Tensor) -> Tensor:
        count, heads, size, width = pages.shape
        found = pages[table.clamp(0, count - 1).long()]  # (batch, pages, heads, size, width)
        return found.transpose(1, 2).reshape(table.shape[0], heads, table.shape[1] * size, width)

    key, value = joined(inputs.key), joined(inputs.value)
    return inputs._replace(key=key, value=value, block_table=None)


def part_of(tensor: Tensor, dim: int, part: slice) -> Tensor:
    """``part`` of a dimension, of which one may stand for all."""
    return tensor if tensor.shape[dim] == 1 else tensor[(slice(None),) * dim + (part,)]


BATCH_AND_HEADS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(TENSORS, (0, 1)),
    **dict.fromkeys(DIFFERENTIABLE, (0, 1)),
    "ranges": (1, None),
    "dropout_seed": (0, None),
}
"""Which dimension of an input is of the batch, and which of heads. Pages are not cut: see
:func:`unpaged`."""


def cut(inputs: Inputs, entries: slice, heads_kv: slice, heads: slice) -> Inputs:
    """Some batch entries, key heads and the query ``heads`` that share these."""
    given = {name: t for name, t in zip(Inputs._fields, inputs, strict=True) if t is not None}
    parts: dict[str, Tensor] = {}
    for name, tensor in given.items():
        of_batch, of_heads = BATCH_AND_HEADS[name]
        part = part_of(tensor, of_batch, entries)
        if of_heads is not None:
            part = part_of(part, of_heads, heads_kv if name in ("key", "value") else heads)
        parts[name] = part
    return inputs._replace(**parts)


SDPA = frozenset(("attn_mask", "dropout_p"))
"""Features that torch's SDPA knows, each alone or with the other."""


def is_known_to_sdpa(problem: Problem) -> bool:
    """Whether torch's SDPA computes all that is asked, where alpha is 1, and on a GPU by a kernel
    that does not make all scores: none of these knows float64, and one fails for a mask that says
    the same of all keys (torch 2.11)."""
    mask = problem.operand("attn_mask")
    if unsupported(problem, SDPA) or (mask is not None and problem.scores.is_causal):
        return False
    if problem.device.type != "cuda":
        return True
    return problem.dtype != torch.float64 and (mask is None or mask.spread[-1])


def unsupported(problem: Problem | RowProblem, supported: Collection[str] = ()) -> list[str]:
    """Reasons of a backend that computes the features ``supported``, by their public names, which
    it lists itself."""
    asked = problem.features
    return [f"{name} is computed by other backends only" for name in asked if name not in supported]


def _sum_of_clamped(first: int, count: int, limit: int) -> int:
    """The sum of ``first``, ``first + 1``, ... (``count`` numbers), each kept in ``[0, limit]``."""
    below = max(0, min(count, -first))
    above = max(0, min(count, first + count - 1 - limit))
    inside = max(0, count - below - above)
    start = first + below
    return inside * start + inside * (inside - 1) // 2 + above * limit


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class RowProblem(Asked):
    """One validated ``entmax`` call: ``rows`` rows of ``length`` scores each."""

    rows: int
    length: int
    dtype: torch.dtype
    device: torch.device
    alpha: float
    """1.5 where there are ``alphas``."""
    needs_grad: bool
    alphas: bool = False
    """Whether each row has its own alpha, in (1, 2]."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no score."""
        return not self.rows * self.length

    def _asked(self) -> Iterator[str]:
        yield from _features_of(self)


_DEFAULTS: dict[type, tuple[tuple[str, Any], ...]] = {
    kind: _defaults(kind) for kind in (ScoreTransform, RowProblem)
}


# Kinds

FEW = 16
"""Queries that may be few for a cache: up to so many a kind has their number."""


def rounded(size: int) -> int:
    """A power of two as it is; of the numbers between two of them the first, for all."""
    return size if size & (size - 1) == 0 else (1 << (size.bit_length() - 1)) + 1


def _is_exact(problem: Problem) -> bool:
    """Whether backends ask for sizes as they are: where 32 bits may not hold the rows of all heads,
    padded to a few more, and of gradients above alpha = 2 (:func:`float32_refusals`)."""
    heads, longest = problem.batch * problem.heads_q, max(problem.length_q, problem.length_k)
    return heads * max(longest, 128) >= 2**30 or (problem.alpha > 2.0 and problem.needs_grad)


_SIZES = "batch", "heads_q", "heads_kv", "length_q", "length_k"
_OF_SIZES = "group", "is_exact", "all_rows", "length_q", "length_k"


def _sizes(problem: Problem) -> tuple[int, ...]:
    """What a kind has of ``_SIZES``, by the names ``_OF_SIZES``."""
    length_q, length_k = problem.length_q, problem.length_k
    all_rows, is_exact = problem.batch * problem.heads_q * length_q, _is_exact(problem)
    if not is_exact:
        all_rows, length_k = rounded(all_rows), rounded(length_k)
        length_q = length_q if length_q <= FEW else rounded(length_q)
    return problem.gqa_group, is_exact, all_rows, length_q, length_k


@functools.lru_cache(1024)
def _kind_of_scores(scores: ScoreTransform) -> Kind:
    return _kind_of(scores)


_IN_KINDS: dict[str, Callable[[Any], Any]] = {
    "rows": rounded,
    "length": rounded,
    "scores": _kind_of_scores,
    "scale": lambda scale: None,
    "window": lambda sides: tuple(side if side < 0 else rounded(side) for side in sides),
    "softcap": bool,
    "dropout_p": bool,
}
"""Fields that kinds do not have as they are, but for ``_SIZES``."""


def check_fields(scores: Any, problem: Any = Problem, rows: Any = RowProblem) -> None:
    """Rules, features and records know fields by their names alone, and what is not compared is in
    no kind, nor in what is kept by problem.

    Raises:
        TypeError: a field of ``scores`` has a name of those of ``problem``, of ``rows`` or of
            kinds, or one of all but ``strided`` is not compared.
    """
    own, *others = ([one.name for one in fields(of)] for of in (scores, problem, rows))
    if taken := {*own} & {*_OF_SIZES, *itertools.chain(*others)}:
        raise TypeError(f"a field of {scores.__name__} must have a name of its own, got {taken}")
    for of in (scores, problem, rows):
        for one in fields(of):
            if not one.compare and one.name != "strided":
                raise TypeError(f"{of.__name__}.{one.name} must be compared: calls differ by it")


check_fields(ScoreTransform)


@functools.cache
def _parts_of_kinds(of: Any) -> tuple[tuple[str, ...], Callable[[Any], Any], tuple[str, ...]]:
    """Of a dataclass the fields that kinds have as they are, what gets them, and the others."""
    names = [one.name for one in fields(of) if one.compare and one.name not in _SIZES]
    plain = tuple(name for name in names if name not in _IN_KINDS)
    return plain, attrgetter(*plain), tuple(name for name in names if name in _IN_KINDS)


def _kind_of(part: Any) -> Kind:
    of: Any = type(part)
    _, plain, others = _parts_of_kinds(of)
    ruled = [_IN_KINDS[name](getattr(part, name)) for name in others]
    sizes = _sizes(part) if isinstance(part, Problem) else ()
    return of, *plain(part), *ruled, *sizes


def said_by(kind: Kind) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default, as kinds have it, of all that a kind has, also of ``scores``."""
    of, *values = kind
    plain, _, others = _parts_of_kinds(of)
    defaults = {one.name: one.default for one in fields(of) if one.default is not MISSING}
    defaults |= {name: _IN_KINDS[name](defaults[name]) for name in others if name in defaults}
    names = *plain, *others, *(_OF_SIZES if issubclass(of, Problem) else ())
    for name, value in zip(names, values, strict=True):
        if name == "scores":
            yield from said_by(value)
        else:
            yield name, value, defaults.get(name)


P = ParamSpec("P")
R = TypeVar("R")


class ByKind(Generic[P, R]):
    """A function that finds the same for all problems of a kind, and for the same that is asked
    beside: it is found once. Of more than ``most`` all are forgotten, and found again."""

    def __init__(self, function: Callable[Concatenate[Any, P], R], most: int) -> None:
        self._function, self._most = function, most
        self._found: dict[tuple[Any, ...], R] = {}

    def __call__(self, problem: Problem | RowProblem, *others: P.args, **named: P.kwargs) -> R:
        key = (problem.kind, others, *named.items()) if named else (problem.kind, others)
        try:
            return self._found[key]
        except KeyError:
            pass
        found = self._function(problem, *others, **named)
        if len(self._found) >= self._most:
            self._found.clear()
        self._found[key] = found
        return found

    def __len__(self) -> int:
        return len(self._found)

    def cache_clear(self) -> None:
        """Forget all."""
        self._found.clear()


def by_kind(most: int) -> Callable[[Callable[Concatenate[Any, P], R]], ByKind[P, R]]:
    """Make a function a :class:`ByKind`; what is asked beside the problem can be hashed."""
    return lambda function: ByKind(function, most)


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
        query, key, value = inputs.tensors()
        try:
            tensors = described(query), described(key), described(value)
            operands = _described_operands(inputs) if inputs.has_operands() else ()
            types = tuple(map(type, options))
            return _looked_up(*tensors, operands, needs_grad, options, types)
        except (AttributeError, RuntimeError, TypeError):
            pass  # no strided tensors, sizes that are symbols, or an error that comes again below
    for name, tensor in zip(TENSORS, inputs, strict=False):
        check_tensor(name, tensor)
    q, k, v = map(described, inputs.tensors())
    return _validate(q, k, v, _described_operands(inputs), needs_grad, options)


Described = tuple[torch.Size, torch.dtype, torch.device, bool]
"""A tensor without its data: shape, dtype, device, whether its last stride is 1."""


def described(tensor: Tensor) -> Described:
    """All of a tensor that a problem depends on."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()[-1:] == (1,)


_DescribedOperand = tuple[str, torch.Size, torch.dtype, torch.device]


def _described_operands(inputs: Inputs) -> tuple[_DescribedOperand, ...]:
    return tuple(
        (name, tensor.shape, tensor.dtype, tensor.device)
        for name, tensor in zip(OPERANDS, inputs.operands(), strict=True)
        if tensor is not None
    )


_TOLD_OTHERWISE = {
    *("alpha", "scale", "is_causal", "enable_gqa", "backend"),
    *("causal_align", "window_left", "window_right"),
}
_OF_SCORES = tuple(name for name in Options._fields if name not in _TOLD_OTHERWISE)
"""Options that are fields of :class:`ScoreTransform` as they are: one that has no such field is an
error of every call."""


def _validate(
    query: Described,
    key: Described,
    value: Described,
    operands: tuple[_DescribedOperand, ...],
    needs_grad: bool,
    options: Options,
    types: tuple[type, ...] = (),
) -> Problem:
    """:func:`validated` without the data. ``types``, those of the options, are for looking it up:
    True equals 1.0 and is no number here."""
    shapes = {name: t[0] for name, t in zip(TENSORS, (query, key, value), strict=True)}
    _check_dtype("query", query[1])
    for name, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), "
                f"got {len(shape)} with shape {tuple(shape)}"
            )
    batch, heads_q, length_q, head_dim = shapes["query"]
    _, dtype, device, _ = query
    table = next((shape for name, shape, *_ in operands if name == "block_table"), None)
    for name, (shape, its_dtype, its_device, _) in (("key", key), ("value", value)):
        if its_dtype != dtype:
            raise TypeError(f"{name} must have the dtype of query ({dtype}), got {its_dtype}")
        if its_device != device:
            raise ValueError(f"{name} must be on the device of query ({device}), got {its_device}")
        if shape[0] != batch and table is None:
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
    page_size = 0
    if table is not None:
        if needs_grad:
            raise ValueError("block_table must be None where gradients are wanted: there are none")
        page_size, length_k = length_k, _paged_length(table, batch, shapes)
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
    if options.softcap > (limit := torch.finfo(compute_dtype(dtype)).max):
        raise ValueError(
            f"softcap must be at most {limit:.3g} for {dtype}, got {options.softcap:g}"
        )
    sizes = batch, heads_q, length_q, length_k
    known = tuple(_check_operand(*operand, sizes, dtype, device) for operand in operands)
    names = {operand.name for operand in known}
    has_ranges = "ranges" in names
    is_causal, window = bool(options.is_causal), (options.window_left, options.window_right)
    if has_ranges and (is_causal or window != (-1, -1)):
        raise ValueError("ranges stand in the place of is_causal and window, got both")
    if (options.dropout_p > 0.0) != ("dropout_seed" in names):
        raise ValueError("dropout_p and dropout_seed must be given together")
    if window[1] == 0:
        is_causal = True
    if is_causal:
        window = window[0], -1  # its right side is said
    placed = is_causal or window != (-1, -1) or "alibi_slopes" in names
    scores = ScoreTransform(
        scale=1.0 if "scales" in names else scale,
        is_causal=is_causal,
        window=window,
        bottom_right=options.causal_align == "bottom-right"
        and placed
        and not has_ranges
        and length_q != length_k,
        **{name: getattr(options, name) for name in _OF_SCORES},
    )
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
        alpha=1.5 if "alphas" in names else alpha,
        scores=scores,
        needs_grad=needs_grad,
        operands=known,
        page_size=page_size,
        strided=tuple(
            name
            for name, t in zip(TENSORS, (query, key, value), strict=True)
            if t[0][3] > 1 and not t[3]
        ),
    )


def _paged_length(table: torch.Size, batch: int, shapes: dict[str, torch.Size]) -> int:
    """Keys that the pages of a sequence hold.

    Raises:
        ValueError: the table's shape does not fit, or key and value have not the same pages, or
            pages without a key.
    """
    if len(table) != 2 or table[0] != batch:
        raise ValueError(f"block_table must have the shape ({batch}, pages), got {tuple(table)}")
    (count, _, page_size, _), (of_value, *_) = shapes["key"], shapes["value"]
    if of_value != count:
        raise ValueError(f"value must have the pages of key ({count}), got {of_value}")
    if table[1] and not (count and page_size):
        raise ValueError(
            f"key must have pages of at least one key, got {count} pages of {page_size}"
        )
    return table[1] * page_size


def _check_operand(
    name: str,
    shape: torch.Size,
    its_dtype: torch.dtype,
    its_device: torch.device,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Operand:
    """What is known of an operand of this shape; ``sizes`` are batch, heads_q, length_q, length_k.

    Raises:
        TypeError, ValueError: dtype, device or shape are not what :class:`Inputs` says.
    """
    public = {"scales": "scale", "alphas": "alpha"}.get(name, name)
    batch, heads_q, length_q, length_k = sizes
    full = {
        "attn_mask": (batch, heads_q, length_q, length_k),
        "alibi_slopes": (batch, heads_q, length_q)[: 3 if len(shape) == 3 else 2],
        "sinks": (batch, heads_q),
        "scales": (batch, heads_q, length_q),
        "alphas": (batch, heads_q),
        "ranges": (3, batch, length_q),
        "dropout_seed": (batch,),
        "block_table": shape,  # looked at by :func:`_paged_length`
    }[name]
    allowed = {
        "attn_mask": (torch.bool, dtype, torch.float32),
        "ranges": (torch.int32,),
        "block_table": (torch.int32,),
        "dropout_seed": (torch.int64,),
    }.get(name, (compute_dtype(dtype),))
    if its_dtype not in allowed:
        names = " or ".join(dict.fromkeys(str(one) for one in allowed))
        raise TypeError(f"{public} must have the dtype {names}, got {its_dtype}")
    if its_device != device:
        raise ValueError(f"{public} must be on the device of query ({device}), got {its_device}")
    exact = 3, None, length_q  # of ranges, whose first and last dimension are never 1 for all
    fits = len(shape) == len(full) and all(
        n == m or (n == 1 and not (name == "ranges" and exact[place] is not None))
        for place, (n, m) in enumerate(zip(shape, full, strict=True))
    )
    if not fits:
        raise ValueError(
            f"{public} must have a shape that broadcasts to {tuple(full)}, got {tuple(shape)}"
        )
    return Operand(name, its_dtype, tuple(n != 1 for n in shape))


_looked_up = functools.lru_cache(maxsize=1024)(_validate)


def row_problem(
    x: Tensor, *, alpha: float, needs_grad: bool, alphas: Tensor | None = None
) -> RowProblem:
    """Validate one ``entmax`` call over the last dimension of ``x``. ``alphas``, in the compute
    dtype, has as many dimensions, the last of size 1 and the others as in ``x`` or 1.

    Raises:
        TypeError, ValueError: as :func:`validated`.
    """
    check_tensor("x", x)
    check_dim(-1, x.dim())
    length = x.shape[-1]
    if alphas is not None:
        alpha = 1.5
        _check_row_alphas(alphas, x)
    return RowProblem(
        rows=math.prod(x.shape[:-1]),
        length=length,
        dtype=x.dtype,
        device=x.device,
        alpha=check_alpha(alpha),
        needs_grad=needs_grad,
        alphas=alphas is not None,
    )


def _check_row_alphas(alphas: Tensor, x: Tensor) -> None:
    rows = *x.shape[:-1], 1
    fits = alphas.dim() == x.dim() and all(
        n in (1, m) for n, m in zip(alphas.shape, rows, strict=True)
    )
    if not fits:
        raise ValueError(
            f"alpha must broadcast to the shape {rows} of the rows, got {tuple(alphas.shape)}"
        )
    check_like("alpha", alphas, alphas.shape, compute_dtype(x.dtype), x.device)


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
    check_strided(name, tensor)


def check_strided(name: str, tensor: Tensor) -> None:
    """Refuse what is sparse, and sequences of several lengths.

    Raises:
        TypeError: ``tensor`` is.
    """
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

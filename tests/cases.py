"""The attention cases that every backend runs, and how close each must come.

A case is a line of :data:`CASES`. Shapes are small: the whole table takes a minute on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import adasplash2

FLOAT32, FLOAT64 = torch.float32, torch.float64
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
DTYPES = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)
ALPHAS = (1.1, 1.25, 1.5, 1.75, 2.0, 3.0)


class Tolerance(NamedTuple):
    """Largest relative error (norms over whole tensors) of a well-conditioned case."""

    out: float
    gradient: float


# bfloat16 and float16 are computed in float32 and held to the rounding of the result instead.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    FLOAT64: Tolerance(out=1e-10, gradient=1e-10),
    FLOAT32: Tolerance(out=1e-5, gradient=1e-4),
}
CPU_TOLERANCES: dict[torch.dtype, Tolerance] = {
    FLOAT64: Tolerance(out=2e-14, gradient=1e-13),
    FLOAT32: Tolerance(out=5e-6, gradient=5e-6),
}
"""Of the CPU backend, which sums with compensation and in no dtype but the one it computes in."""


def tolerances(backend: str) -> dict[torch.dtype, Tolerance]:
    return CPU_TOLERANCES if backend == "cpu" else TOLERANCES


DENSE_FACTOR = 2.0
"""An ill-conditioned float32 case may err this many times as much as dense float32 does."""

DENSE_ORDERS = 4
"""Orders of summation in which dense float32 is evaluated; the worst counts."""

FLOAT32_FLOOR = torch.finfo(FLOAT32).eps
"""Error, relative to a sum of absolute terms, that float32 is always allowed: one rounding."""

ROUNDING_FACTOR = 1.5
"""A 16-bit result may err this many times as much as the exact result rounded to its dtype."""


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor


@dataclass(frozen=True)
class Case:
    """One call of ``entmax_attention``; ``heads_kv`` and ``head_dim_v`` None: as for queries."""

    name: str
    length_q: int = 129
    length_k: int = 129
    head_dim: int = 16
    head_dim_v: int | None = None
    heads_q: int = 2
    heads_kv: int | None = None
    batch: int = 1
    dtype: torch.dtype = FLOAT32
    alpha: float = 1.5
    is_causal: bool = False
    scale: float | None = None
    sharpness: float = 1.0  # factor of the queries
    data: str = "gaussian"  # of DATA
    layout: str = "contiguous"  # of LAYOUTS

    @property
    def well_conditioned(self) -> bool:
        """Whether float32 can resolve it: scores of order one, finite slope at the support's
        edge."""
        return self.alpha <= 2.0 and self.sharpness <= 1.0 and self.data != "one_huge"

    @property
    def is_finite(self) -> bool:
        """Whether every input is finite."""
        return self.data not in NOT_FINITE

    @property
    def options(self) -> dict[str, float | bool | None]:
        """Arguments that the reference and the library share."""
        return {"alpha": self.alpha, "is_causal": self.is_causal, "scale": self.scale}

    def inputs(self, device: str = "cpu") -> Inputs:
        """The tensors, the same at every call; ``grad_out`` in the layout of the output."""
        generator = torch.Generator().manual_seed(1)
        heads_kv = self.heads_kv or self.heads_q
        head_dim_v = self.head_dim_v or self.head_dim

        def gaussian(heads: int, length: int, width: int) -> Tensor:
            shape = (self.batch, heads, length, width)
            return torch.randn(shape, generator=generator, dtype=FLOAT64)

        query = self.sharpness * gaussian(self.heads_q, self.length_q, self.head_dim)
        key = gaussian(heads_kv, self.length_k, self.head_dim)
        value = gaussian(heads_kv, self.length_k, head_dim_v)
        grad_out = gaussian(self.heads_q, self.length_q, head_dim_v)
        DATA[self.data](query, key, value)
        lay_out = LAYOUTS[self.layout]
        return Inputs(*(lay_out(t.to(device, self.dtype)) for t in (query, key, value, grad_out)))


# What is done to Gaussian queries, keys and values, in place.


def _gaussian(query: Tensor, key: Tensor, value: Tensor) -> None:
    pass


def _equal(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Every key scores alike, though not zero, and keys differ."""
    query[..., 1:] = 0.0
    key[..., 0] = 0.7


def _ties(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Each key four times."""
    length = key.shape[2]
    key[:] = key[:, :, torch.arange(length) // 4].clone()


def _one_huge(query: Tensor, key: Tensor, value: Tensor) -> None:
    """One key that outscores all others by thousands, for every other query."""
    query[:, :, :, 0] = 0.0
    query[:, :, ::2, 0] = 1.0
    key[:, :, key.shape[2] // 3, 0] = 1e4


def _sink(query: Tensor, key: Tensor, value: Tensor) -> None:
    """A first key that every query keeps beside others."""
    query[..., 0] = 1.0
    key[:, :, 0] = 0.0
    key[:, :, 0, 0] = 2.5 * math.sqrt(key.shape[3])


def _local(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Queries keep keys of their own block of 64 positions alone: most tiles are empty."""
    for tensor in (query, key):
        block = torch.arange(tensor.shape[2]) // 64 % tensor.shape[3]
        tensor += 8.0 * torch.nn.functional.one_hot(block, tensor.shape[3])


def _minus_infinity(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Every third key scores -inf, the first among them: a causal first row has nothing else."""
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, :, ::3, 0] = -math.inf


def _huge_negative(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Every third key scores about -1e4."""
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, :, ::3, 0] = -1e5


def _mixed(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Every other query is flat: it keeps most keys, its neighbours few."""
    query[:, :, ::2] *= 1e-3


def _nan_query(query: Tensor, key: Tensor, value: Tensor) -> None:
    query[:, 0, query.shape[2] // 2, -1] = math.nan


def _inf_query(query: Tensor, key: Tensor, value: Tensor) -> None:
    query[:, 0, query.shape[2] // 2, -1] = math.inf


def _nan_key(query: Tensor, key: Tensor, value: Tensor) -> None:
    key[:, 0, key.shape[2] // 2, -1] = math.nan


def _nan_value(query: Tensor, key: Tensor, value: Tensor) -> None:
    value[:, 0, value.shape[2] // 2, -1] = math.nan


DATA: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "gaussian": _gaussian,
    "equal": _equal,
    "ties": _ties,
    "one_huge": _one_huge,
    "sink": _sink,
    "local": _local,
    "minus_infinity": _minus_infinity,
    "huge_negative": _huge_negative,
    "mixed": _mixed,
    "nan_query": _nan_query,
    "inf_query": _inf_query,
    "nan_key": _nan_key,
    "nan_value": _nan_value,
}
NOT_FINITE = ("minus_infinity", "nan_query", "inf_query", "nan_key", "nan_value")


# How a tensor lies in memory. What is between its entries is NaN, so that reading it shows.


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor


def _length_before_heads(tensor: Tensor) -> Tensor:
    """As projections leave it: (batch, length, heads, head_dim), transposed."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(tensor: Tensor) -> Tensor:
    """A window of something larger in every dimension, at an odd offset."""
    batch, heads, length, width = tensor.shape
    buffer = tensor.new_full((batch + 1, heads + 2, length + 5, width + 3), math.nan)
    window = buffer[1:, 1:-1, 2:-3, 1:-2]
    window.copy_(tensor)
    return window


def _inner_stride(tensor: Tensor) -> Tensor:
    """Every other column."""
    buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan)
    buffer[..., ::2] = tensor
    return buffer[..., ::2]


def _columns_first(tensor: Tensor) -> Tensor:
    """head_dim before length, as after ``mT``."""
    return tensor.mT.contiguous().mT


def _expanded(tensor: Tensor) -> Tensor:
    """One batch entry and head for all: strides of zero."""
    return tensor[:1, :1].expand(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "length_before_heads": _length_before_heads,
    "sliced": _sliced,
    "inner_stride": _inner_stride,
    "columns_first": _columns_first,
    "expanded": _expanded,
}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table() -> Iterator[Case]:
    for dtype in DTYPES:
        for alpha in ALPHAS:
            for is_causal in (False, True):
                kind = "causal" if is_causal else "full"
                yield Case(
                    f"grid-{_short(dtype)}-alpha{alpha:g}-{kind}",
                    dtype=dtype,
                    alpha=alpha,
                    is_causal=is_causal,
                )

    lengths = ((1, 1), (2, 2), (1, 200), (200, 1), (2, 7), (7, 2), (63, 65), (65, 63))
    for length_q, length_k in (*lengths, (64, 128), (129, 257), (257, 129), (7, 600), (600, 7)):
        for is_causal in (False, True):
            yield Case(
                f"lengths-{length_q}x{length_k}-{'causal' if is_causal else 'full'}",
                length_q=length_q,
                length_k=length_k,
                is_causal=is_causal,
                dtype=FLOAT64 if length_q == 2 else FLOAT32,
            )

    for heads_q, heads_kv in ((4, 2), (6, 2), (8, 1)):
        for is_causal in (False, True):
            case = Case(
                f"gqa-{heads_q}to{heads_kv}-{'causal' if is_causal else 'full'}",
                heads_q=heads_q,
                heads_kv=heads_kv,
                batch=2,
                length_q=70,
                length_k=97,
                is_causal=is_causal,
            )
            yield case
            yield replace(case, name=case.name + "-bfloat16", dtype=BFLOAT16, alpha=2.0)

    for head_dim in (1, 3, 16, 40, 64, 80, 128, 256):
        for dtype in (FLOAT32, BFLOAT16):
            yield Case(
                f"head_dim-{head_dim}-{_short(dtype)}",
                head_dim=head_dim,
                length_q=65,
                length_k=200,
                dtype=dtype,
                is_causal=dtype == BFLOAT16,
            )
    for head_dim, head_dim_v, dtype in (
        (3, 5, FLOAT64),
        (1, 256, FLOAT16),
        (256, 1, FLOAT32),
        (64, 80, FLOAT32),
        (80, 64, BFLOAT16),
        (17, 33, FLOAT32),
    ):
        yield Case(
            f"head_dim-{head_dim}-value-{head_dim_v}-{_short(dtype)}",
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            is_causal=True,
        )
    # One row's `u` and `ds` outweigh all others, so that their rounding to 16 bits does not average
    # out: of Gaussian cases as small as this, the worst.
    dominated = Case("dominated-float16", length_q=45, length_k=45, head_dim=8, dtype=FLOAT16,
                     alpha=3.0, is_causal=True)  # fmt: skip
    yield dominated
    yield replace(dominated, name="dominated-bfloat16", dtype=BFLOAT16)
    yield Case("scale-0.3", scale=0.3)
    yield Case("scale-negative", scale=-0.25, is_causal=True)
    yield Case("scale-zero", scale=0.0, is_causal=True)

    for layout in LAYOUTS:
        if layout == "contiguous":
            continue
        for dtype in (FLOAT32, BFLOAT16, FLOAT64):
            yield Case(
                f"layout-{layout}-{_short(dtype)}",
                layout=layout,
                dtype=dtype,
                batch=2,
                heads_q=4,
                heads_kv=2,
                length_q=65,
                length_k=70,
                head_dim=24,
                head_dim_v=19,
                is_causal=dtype == BFLOAT16,
            )

    for alpha in (1.25, 1.5, 2.0, 3.0):
        for sharpness in (1e-3, 1e3):
            for dtype in (FLOAT32, FLOAT64):
                yield Case(
                    f"sharpness-{sharpness:g}-alpha{alpha:g}-{_short(dtype)}",
                    alpha=alpha,
                    sharpness=sharpness,
                    dtype=dtype,
                    length_k=300,
                )
        for data in DATA:
            if data == "gaussian":
                continue
            yield Case(f"{data}-alpha{alpha:g}", alpha=alpha, data=data, is_causal=alpha != 2.0)
    for data in ("minus_infinity", "huge_negative", "nan_query", "ties"):
        yield Case(f"{data}-bfloat16", data=data, dtype=BFLOAT16, is_causal=True)
        yield Case(f"{data}-float64", data=data, dtype=FLOAT64, is_causal=True)
    for data in ("inf_query", "nan_key", "nan_value"):
        yield Case(f"{data}-bfloat16", data=data, dtype=BFLOAT16, alpha=2.0, heads_q=4, heads_kv=2)
    # Rows of one key, whose weight `u` is off one as their large scores are rounded.
    yield Case("huge_negative-alpha1.25-bfloat16", data="huge_negative", alpha=1.25,
               dtype=BFLOAT16, is_causal=True)  # fmt: skip
    # Keys that nearly all of many rows keep, and what is not finite among their sums.
    sink = Case("sink-long", data="sink", length_q=1100, length_k=1100, is_causal=True, heads_q=1)
    grouped = replace(sink, heads_q=4, heads_kv=1, head_dim=64)
    yield sink
    yield replace(grouped, name="sink-long-gqa-bfloat16", dtype=BFLOAT16)
    yield replace(grouped, name="sink-long-gqa-float16", dtype=FLOAT16, alpha=2.0)
    yield replace(sink, name="nan_key-long-bfloat16", data="nan_key", dtype=BFLOAT16)
    yield replace(sink, name="nan_value-long", data="nan_value", heads_q=2)

    # Flat rows: supports of over 512, over 1,024 and about half of all keys.
    flat = Case("flat", length_q=70, length_k=1500, sharpness=0.01)
    yield flat
    yield replace(flat, name="flat-float64", dtype=FLOAT64, length_q=33)
    yield replace(flat, name="flat-alpha1.25", alpha=1.25, sharpness=0.1, length_q=33)
    yield replace(flat, name="flat-alpha1.1", alpha=1.1, length_q=9)
    yield replace(flat, name="flat-alpha1.75", alpha=1.75, sharpness=1e-3, length_q=9)
    yield replace(flat, name="flat-alpha2", alpha=2.0, sharpness=1e-4, length_k=3000)
    yield replace(flat, name="flat-alpha2-half", alpha=2.0, sharpness=1e-3, length_k=2100)
    yield replace(flat, name="flat-alpha3", alpha=3.0, sharpness=1e-7, length_q=33)
    yield replace(flat, name="flat-causal", length_q=1500, is_causal=True, heads_q=1)
    yield replace(
        flat, name="flat-causal-bfloat16", length_q=1200, is_causal=True, heads_q=1, dtype=BFLOAT16
    )
    yield replace(flat, name="flat-float16", dtype=FLOAT16, head_dim=40)
    yield replace(flat, name="flat-gqa", heads_q=6, heads_kv=2, batch=2, head_dim_v=7, length_q=65)
    yield replace(flat, name="flat-mixed", data="mixed", sharpness=1.0, length_q=129)
    yield replace(flat, name="flat-mixed-causal", data="mixed", sharpness=1.0, length_q=1500,
                  heads_q=1, is_causal=True)  # fmt: skip
    # Some lists get as long as they may be, beside rows that keep few.
    full = replace(flat, data="mixed", sharpness=1.0, length_q=16, heads_q=1)
    yield replace(full, name="flat-mixed-nearly-full", length_k=1780)
    yield replace(full, name="flat-mixed-full", length_k=2300)
    yield replace(full, name="flat-mixed-full-float64", length_k=2300, dtype=FLOAT64)
    yield replace(flat, name="flat-minus-infinity", data="minus_infinity")
    yield replace(flat, name="flat-minus-infinity-bfloat16", data="minus_infinity", dtype=BFLOAT16,
                  head_dim=64, is_causal=True, length_q=1500, heads_q=1)  # fmt: skip
    yield replace(flat, name="flat-nan-query", data="nan_query")
    yield replace(flat, name="flat-nan-value", data="nan_value", alpha=2.0, sharpness=1e-3)
    yield replace(flat, name="flat-equal", data="equal", sharpness=1.0)
    yield replace(flat, name="flat-equal-long", data="equal", length_q=9, length_k=6000, heads_q=1)
    yield replace(flat, name="flat-sliced", layout="sliced", head_dim=13, length_q=65)
    # Shorter than a scan that keeps few is good for, with columns that are no whole vectors.
    short = replace(flat, name="flat-short", length_k=130, head_dim=48, head_dim_v=41)
    yield short
    yield replace(short, name="flat-short-causal", length_q=130, is_causal=True, sharpness=0.4)
    # Rows that keep more than lists hold, but few of their keys: on the way to a threshold many
    # scores are passed, so that steps err, and 16-bit types end before they do not.
    part = replace(flat, name="part", sharpness=0.3, length_k=4096, head_dim=64)
    yield replace(part, name="part-bfloat16", dtype=BFLOAT16, length_q=130)
    yield replace(part, name="part-float16", dtype=FLOAT16)
    yield replace(part, name="part-causal-bfloat16", dtype=BFLOAT16, length_q=2048, length_k=2048,
                  heads_q=1, is_causal=True)  # fmt: skip
    # About as many keys as a list holds, so that some rows are flat and others not.
    yield replace(flat, name="nearly-flat", sharpness=0.08, length_q=129, length_k=900)


CASES: tuple[Case, ...] = tuple(_table())


def named(*names: str) -> tuple[Case, ...]:
    """Cases of the table, by their names."""
    table = {case.name: case for case in CASES}
    return tuple(table[name] for name in names)


interpreted = pytest.mark.interpreted
"""Marks what Triton's interpreter runs, where a case takes seconds: ``interpreted(alpha=2.0)`` the
parametrisations with this value, or one of these where a tuple is given; ``interpreted()`` all."""


def usable_backends() -> list[str]:
    """Names of the backends that run here."""
    return [status.name for status in adasplash2.available_backends() if status.usable]


def device_of(backend: str) -> str:
    """Where a backend's tensors live; Triton's interpreter takes those of the CPU."""
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"

"""Bad input, one argument at a time: the type of the error, and a message that names the
argument, what came and what is allowed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import adasplash2
from adasplash2 import ops, options
from adasplash2.options import Options
from adasplash2.problem import Inputs

NAN, INF = float("nan"), float("inf")


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


GOOD = {"query": tensor(2, 4, 5, 8), "key": tensor(2, 4, 6, 8), "value": tensor(2, 4, 6, 7)}

NO_NUMBERS = {
    "bool": np.bool_(True),
    "array": np.ones(1),
    "complex": np.complex64(1.5),
    "decimal": Decimal("1.5"),
    "bool tensor": torch.tensor(True),
    "complex tensor": torch.tensor(1.5j),
    "trained": torch.tensor(1.5, requires_grad=True),
    "type": float,
}
NO_FLAGS = {"float": 1.0, "none": None, "array": np.ones(1, bool), "tensor": torch.tensor(True)}
NO_TENSORS: dict[str, tuple[Any, str]] = {
    "numpy": (np.ones((2, 4, 5, 8), np.float32), "ndarray"),
    "nested": (torch.nested.nested_tensor([tensor(4, 5, 8), tensor(4, 6, 8)]), "nested"),
    "jagged": (
        torch.nested.nested_tensor([tensor(5, 8), tensor(6, 8)], layout=torch.jagged),
        "strided",
    ),
    "mkldnn": (tensor(2, 4, 5, 8).to_mkldnn(), "strided"),
    "csr": (tensor(5, 8).to_sparse_csr(), "strided"),
    "quantized": (torch.quantize_per_tensor(tensor(2, 4, 5, 8), 0.1, 0, torch.qint8), "float32"),
    "float8": (tensor(2, 4, 5, 8).to(torch.float8_e4m3fn), "float32"),
}

BAD_ATTENTION = [
    # case, arguments, error, what the message says in this order
    ("query none", {"query": None}, TypeError, "query", "torch.Tensor", "NoneType"),
    ("key list", {"key": [1.0]}, TypeError, "key", "torch.Tensor", "list"),
    ("value number", {"value": 1.0}, TypeError, "value", "torch.Tensor", "float"),
    ("query rank", {"query": tensor(4, 5, 8)}, ValueError, "query", "4 dim", "3", "(4, 5, 8)"),
    ("key rank", {"key": tensor(1, 2, 4, 6, 8)}, ValueError, "key", "4 dimensions", "5"),
    ("value rank", {"value": tensor(6)}, ValueError, "value", "4 dimensions", "1"),
    *(
        (f"{name} {dtype}", {name: GOOD[name].to(dtype)}, TypeError, name, "float32", str(dtype))
        for name in GOOD
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ),
    ("query sparse", {"query": GOOD["query"].to_sparse()}, TypeError, "query", "strided", "sparse"),
    ("key dtype", {"key": GOOD["key"].double()}, TypeError, "key", "float32", "float64"),
    ("value dtype", {"value": GOOD["value"].half()}, TypeError, "value", "float32", "float16"),
    ("key device", {"key": GOOD["key"].to("meta")}, ValueError, "key", "cpu", "meta"),
    ("value device", {"value": GOOD["value"].to("meta")}, ValueError, "value", "cpu", "meta"),
    ("key batch", {"key": tensor(3, 4, 6, 8)}, ValueError, "key", "batch", "2", "3"),
    ("value batch", {"value": tensor(1, 4, 6, 7)}, ValueError, "value", "batch", "2", "1"),
    ("key head_dim", {"key": tensor(2, 4, 6, 9)}, ValueError, "key", "head_dim", "8", "9"),
    ("value heads", {"value": tensor(2, 2, 6, 7)}, ValueError, "value", "(4, 6)", "(2, 6)"),
    ("value length", {"value": tensor(2, 4, 5, 7)}, ValueError, "value", "(4, 6)", "(4, 5)"),
    (
        "head_dim 0",
        {"query": tensor(2, 4, 5, 0), "key": tensor(2, 4, 6, 0)},
        ValueError,
        *("query", "1 to 256", "0"),
    ),
    (
        "head_dim 257",
        {"query": tensor(2, 4, 5, 257), "key": tensor(2, 4, 6, 257)},
        ValueError,
        *("query", "1 to 256", "257"),
    ),
    ("head_dim_v 0", {"value": tensor(2, 4, 6, 0)}, ValueError, "value", "1 to 256", "0"),
    ("head_dim_v 257", {"value": tensor(2, 4, 6, 257)}, ValueError, "value", "1 to 256", "257"),
    (
        "heads without gqa",
        {"key": tensor(2, 2, 6, 8), "value": tensor(2, 2, 6, 7)},
        ValueError,
        *("key", "4", "2", "enable_gqa=True"),
    ),
    (
        "heads not divisible",
        {"key": tensor(2, 3, 6, 8), "value": tensor(2, 3, 6, 7), "enable_gqa": True},
        ValueError,
        *("query", "multiple", "3", "4"),
    ),
    (
        "no key heads",
        {"key": tensor(2, 0, 6, 8), "value": tensor(2, 0, 6, 7), "enable_gqa": True},
        ValueError,
        *("query", "multiple", "0", "4"),
    ),
    *(
        (f"alpha {alpha}", {"alpha": alpha}, ValueError, "alpha", "at least 1", repr(alpha))
        for alpha in (0.99, 0.0, -1.5, NAN, INF, -INF)
    ),
    *(
        (f"alpha {alpha!r}", {"alpha": alpha}, TypeError, "alpha", "real number", repr(alpha))
        for alpha in ("1.5", None, True, 1.5j, tensor(1))
    ),
    *(
        (f"scale {scale}", {"scale": scale}, ValueError, "scale", "finite", repr(scale))
        for scale in (NAN, INF, -INF)
    ),
    *(
        (f"scale {scale!r}", {"scale": scale}, TypeError, "scale", "real number", repr(scale))
        for scale in ("1", False, 1j)
    ),
    *(
        (f"huge {name}", {name: 10**digits}, ValueError, name, "finite", got)
        for name in ("alpha", "scale")
        for digits, got in ((400, "1000"), (5000, "a int"))
    ),
    *(
        (f"{name} {kind}", {name: value}, TypeError, name, "real number")
        for name in ("alpha", "scale")
        for kind, value in NO_NUMBERS.items()
    ),
    *(
        (f"{name} {kind}", {name: value}, TypeError, name, "True or False")
        for name in ("is_causal", "enable_gqa")
        for kind, value in NO_FLAGS.items()
    ),
    *(
        (f"{name} {kind}", {name: value}, TypeError, name, word)
        for name in ("query", "key", "value")
        for kind, (value, word) in NO_TENSORS.items()
    ),
    ("backend empty", {"backend": ""}, ValueError, "backend", "'cpu'", "''"),
    ("backend surrogate", {"backend": "\ud800"}, ValueError, "backend", "'cpu'"),
    ("is_causal", {"is_causal": 1}, TypeError, "is_causal", "True or False", "1"),
    ("enable_gqa", {"enable_gqa": None}, TypeError, "enable_gqa", "True or False", "None"),
    ("backend type", {"backend": 3}, TypeError, "backend", "name", "3"),
    ("backend name", {"backend": "nowhere"}, ValueError, "backend", "'cpu'", "'nowhere'"),
]


def says(*words: str) -> str:
    return ".*".join(re.escape(word) for word in words)


def cases(table: list[Any], *, without: str = "") -> Any:
    rows = [pytest.param(row[1], row[2], row[3:], id=row[0]) for row in table if row[0] != without]
    return pytest.mark.parametrize(("arguments", "error", "words"), rows)


@cases(BAD_ATTENTION)
def test_attention_refuses(
    arguments: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error, match=says(*words)):
        adasplash2.entmax_attention(**{**GOOD, **arguments})


@cases(BAD_ATTENTION)
def test_softmax_attention_refuses_alike(
    arguments: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error, match=says(*words)):
        adasplash2.entmax_attention(**{"alpha": 1, **GOOD, **arguments})


@pytest.mark.parametrize("function", [adasplash2.attention_stats, adasplash2.explain])
@cases(BAD_ATTENTION)
def test_stats_and_explain_refuse_alike(
    function: Any, arguments: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error, match=says(*words)):
        function(**{**GOOD, **arguments})


def test_the_good_arguments_are_good() -> None:
    assert adasplash2.entmax_attention(**GOOD).shape == (2, 4, 5, 7)


NUMBERS = {
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.float16": np.float16,
    "np array": np.array,
    "tensor": torch.tensor,
    "float32 tensor": lambda number: torch.tensor(number, dtype=torch.float32),
    "fraction": Fraction,
}


@pytest.mark.parametrize("kind", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_of_any_kind_are_numbers(kind: Any) -> None:
    options = {"alpha": 1.25, "scale": 0.5}
    given = {name: kind(value) for name, value in options.items()}
    for function in (adasplash2.entmax_attention, lambda **o: adasplash2.attention_stats(**o).tau):
        assert torch.equal(function(**GOOD, **given), function(**GOOD, **options))
    x = torch.randn(3, 5)
    assert torch.equal(adasplash2.entmax(x, kind(1.25)), adasplash2.entmax(x, 1.25))
    assert torch.equal(adasplash2.entmax(x, kind(1.0)), torch.softmax(x, -1))


@pytest.mark.parametrize("kind", [np.int64, np.int8, torch.tensor, np.array])
def test_integers_of_any_kind_are_integers(kind: Any) -> None:
    x = torch.randn(3, 5)
    assert torch.equal(adasplash2.entmax15(x, kind(0)), adasplash2.entmax15(x, 0))
    assert torch.equal(adasplash2.entmax(x, kind(2), kind(-2)), adasplash2.sparsemax(x, 0))


def test_numpys_bools_are_bools() -> None:
    for flag in (True, False):
        given = adasplash2.entmax_attention(**GOOD, is_causal=np.bool_(flag))
        assert torch.equal(given, adasplash2.entmax_attention(**GOOD, is_causal=flag))


def test_statistics_of_tensors_of_special_kinds() -> None:
    """No dispatcher prepares what they read: signs that are lazy, zeros without memory."""
    query, key, value = (torch.randn(t.shape) for t in GOOD.values())
    for special in (torch._neg_view(query), torch._efficientzerotensor(query.shape)):
        plain = torch.empty(query.shape).copy_(special)
        found, expected = (adasplash2.attention_stats(q, key, value).tau for q in (special, plain))
        assert torch.equal(found, expected)


def test_options_go_by_keyword() -> None:
    with pytest.raises(TypeError, match="positional"):
        adasplash2.entmax_attention(*GOOD.values(), 1.5)  # type: ignore[misc]


def test_stats_have_no_softmax() -> None:
    with pytest.raises(ValueError, match=says("alpha", "greater than 1", "softmax", "1.0")):
        adasplash2.attention_stats(**GOOD, alpha=1)


def test_operators_have_no_softmax() -> None:
    with pytest.raises(ValueError, match=says("alpha", "greater than 1")):
        ops.attention_forward(*GOOD.values(), 1.0, None, False, False, "", 0)
    with pytest.raises(ValueError, match=says("alpha", "greater than 1")):
        ops.entmax_forward(tensor(2, 3), 1.0, -1, "", False)


BAD_ENTMAX = [
    ("x none", {"x": None}, TypeError, "x", "torch.Tensor", "NoneType"),
    ("x int", {"x": tensor(3, dtype=torch.int32)}, TypeError, "x", "float32", "int32"),
    ("x sparse", {"x": tensor(3).to_sparse()}, TypeError, "x", "strided", "sparse"),
    ("x scalar", {"x": torch.tensor(1.0)}, ValueError, "x", "at least 1", "0"),
    ("dim 2", {"dim": 2}, IndexError, "dim", "-2 to 1", "2"),
    ("dim -3", {"dim": -3}, IndexError, "dim", "-2 to 1", "-3"),
    ("dim float", {"dim": 1.0}, TypeError, "dim", "int", "1.0"),
    ("dim bool", {"dim": True}, TypeError, "dim", "int", "True"),
    ("alpha 0.5", {"alpha": 0.5}, ValueError, "alpha", "at least 1", "0.5"),
    ("alpha nan", {"alpha": NAN}, ValueError, "alpha", "at least 1", "nan"),
    ("alpha str", {"alpha": "2"}, TypeError, "alpha", "real number", "'2'"),
    ("dim none", {"dim": None}, TypeError, "dim", "int", "None"),
    ("dim np.bool_", {"dim": np.bool_(True)}, TypeError, "dim", "int"),
    ("dim np.float32", {"dim": np.float32(1)}, TypeError, "dim", "int"),
    ("dim bool tensor", {"dim": torch.tensor(True)}, TypeError, "dim", "int"),
    ("dim array", {"dim": np.zeros(1, int)}, TypeError, "dim", "int"),
    ("dim huge", {"dim": 10**5000}, IndexError, "dim", "-2 to 1", "a int"),
    ("alpha huge", {"alpha": 10**400}, ValueError, "alpha", "finite", "1000"),
    *((f"x {kind}", {"x": x}, TypeError, "x", word) for kind, (x, word) in NO_TENSORS.items()),
    ("backend empty", {"backend": ""}, ValueError, "backend", "'cpu'", "''"),
    ("backend type", {"backend": b"cpu"}, TypeError, "backend", "name", "b'cpu'"),
    ("backend name", {"backend": "nowhere"}, ValueError, "backend", "'cpu'", "'nowhere'"),
]


@cases(BAD_ENTMAX)
def test_entmax_refuses(
    arguments: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error, match=says(*words)):
        adasplash2.entmax(**{"x": tensor(2, 3), **arguments})


@pytest.mark.parametrize("function", [adasplash2.entmax15, adasplash2.sparsemax])
def test_short_names_refuse_alike(function: Any) -> None:
    with pytest.raises(IndexError, match=says("dim", "-1 to 0", "5")):
        function(tensor(3), dim=5)
    with pytest.raises(TypeError, match=says("x", "torch.Tensor")):
        function([1.0, 2.0])


def test_tracing_refuses_with_the_same_words() -> None:
    """Fake tensors go through the same checks, so torch.compile fails before any kernel."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match=says("key", "head_dim", "8", "9")):
        adasplash2.entmax_attention(
            torch.ones(2, 4, 5, 8), torch.ones(2, 4, 6, 9), torch.ones(2, 4, 6, 9)
        )


@pytest.mark.parametrize("function", [adasplash2.attention_stats, adasplash2.explain])
def test_what_answers_about_a_call_is_in_no_graph(function: Any) -> None:
    """In our words where there must be one graph; else the graph breaks and the answer comes."""
    torch._dynamo.reset()
    x = tensor(1, 2, 4, 6)
    words = f"{function.__name__} works in neither a trace nor a transform"

    def ask(x: torch.Tensor) -> Any:
        return function(x, x, x)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        torch.compile(ask, backend="eager", fullgraph=True)(x)
    with pytest.raises(TypeError, match=words):
        torch.func.vmap(ask)(x[None])
    assert isinstance(torch.compile(ask, backend="eager")(x), type(ask(x)))


def test_a_scale_beyond_the_range_is_refused() -> None:
    query = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match=r"scale times alpha - 1 must be at most 3\.4e\+38"):
        adasplash2.entmax_attention(query, query, query, scale=1e308)
    wide = query.double()
    assert adasplash2.entmax_attention(wide, wide, wide, scale=1e300).isfinite().all()


def test_numbers_without_a_value_are_refused_in_words() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match="alpha must be known here"):
        adasplash2.entmax(x, torch.tensor(1.5, device="meta"))
    with pytest.raises(TypeError, match="alpha must be known here"):
        torch.vmap(lambda alpha: adasplash2.entmax(x, alpha))(torch.tensor([1.2, 1.5]))


def test_every_public_function_knows_the_meta_device() -> None:
    """Autocast does not."""
    query = torch.empty(1, 2, 8, 4, device="meta")
    assert adasplash2.entmax_attention(query, query, query, alpha=1).shape == query.shape
    assert adasplash2.explain(query, query, query).chosen is None
    with pytest.raises(adasplash2.BackendRefused):
        adasplash2.attention_stats(query, query, query)


def test_every_function_of_a_call_takes_its_arguments() -> None:
    def asked(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(function).parameters)

    taken = asked(adasplash2.entmax_attention)
    assert asked(adasplash2.attention_stats) == asked(adasplash2.explain) == taken
    assert set(taken) == {*Inputs._fields, *Options._fields}
    for name in Options._fields:
        default = None if name == "backend" else Options._field_defaults[name]
        assert taken[name].default == default
        assert f" {name}" in options.SCHEMA
    for function in (adasplash2.attention_stats, adasplash2.explain):
        with pytest.raises(TypeError, match="no_such"):
            function(*GOOD.values(), no_such=1)
        with pytest.raises(TypeError, match="value"):
            function(*list(GOOD.values())[:2])

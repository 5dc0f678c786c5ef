"""Bad input, one argument at a time: the type of the error, and a message that names the
argument, what came and what is allowed."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import adasplash2
from adasplash2 import functional, lowering, ops, options
from adasplash2.lowering import lowered
from adasplash2.options import Options, Said, ScoreOptions
from adasplash2.problem import TENSORS, Inputs, validated

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

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(3), torch.ones(4)])
ONES = torch.ones(5, 6)

BAD_ATTENTION = [
    # case, arguments, error, what the message says in this order
    ("query none", {"query": None}, TypeError, "query", "torch.Tensor", "NoneType"),
    ("key list", {"key": [1.0]}, TypeError, "key", "torch.Tensor", "list"),
    ("value number", {"value": 1.0}, TypeError, "value", "torch.Tensor", "float"),
    *(
        (f"{name} none with {said}", {name: None, said: given}, TypeError, name, "NoneType")
        for name in ("query", "key", "value")
        for said, given in (
            ("attn_mask", ONES),
            ("scale", tensor(4)),
            ("kv_lengths", torch.zeros(2, dtype=torch.int32)),
            ("dropout_p", 0.5),
        )
    ),
    ("query rank", {"query": tensor(8)}, ValueError, "query", "at least 2 dim", "1", "(8,)"),
    ("key rank", {"key": tensor(8)}, ValueError, "key", "at least 2 dimensions", "1"),
    ("value rank", {"value": tensor(6)}, ValueError, "value", "at least 2 dimensions", "1"),
    ("leading", {"key": tensor(3, 3, 4, 6, 8)}, ValueError, "leading", "(1, 2)", "(3, 3)"),
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
    ("value batch", {"value": tensor(3, 4, 6, 7)}, ValueError, "value", "batch", "2", "3"),
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
        for alpha in ("1.5", None, True, 1.5j)
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
        if kind != "trained"
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
        if (name, kind) != ("query", "jagged")
    ),
    ("jagged of 3", {"query": NO_TENSORS["jagged"][0]}, ValueError, "query", "4 dimensions"),
    # What came after SDPA's tensors
    ("mask list", {"attn_mask": [True]}, TypeError, "attn_mask", "torch.Tensor", "list"),
    ("mask int", {"attn_mask": ONES.int()}, TypeError, "attn_mask", "torch.bool", "int32"),
    ("mask double", {"attn_mask": ONES.double()}, TypeError, "attn_mask", "float32", "float64"),
    ("mask sparse", {"attn_mask": ONES.to_sparse()}, TypeError, "attn_mask", "strided"),
    *(
        (f"{name} sparse", {name: torch.ones(4).to_sparse()}, TypeError, name, "strided", "sparse")
        for name in ("alibi_slopes", "sinks", "scale", "alpha")
    ),
    *(
        (f"{name} nested", {name: NESTED}, TypeError, name, "one shape", "nested")
        for name in ("attn_mask", "kv_lengths")
    ),
    ("mask shape", {"attn_mask": ONES[:, :4]}, ValueError, "(2, 4, 5, 6)", "got (5, 4)"),
    ("mask rank", {"attn_mask": ONES[None, None, None]}, ValueError, "attn_mask", "broadcast"),
    ("mask meta", {"attn_mask": ONES.to("meta")}, ValueError, "attn_mask", "cpu", "meta"),
    (
        "two causal masks",
        {"attn_mask": causal_lower_right(5, 6), "is_causal": True},
        ValueError,
        *("is_causal", "False", "causal mask"),
    ),
    (
        "causal mask of another side",
        {"attn_mask": causal_upper_left(5, 6), "causal_align": "bottom-right"},
        ValueError,
        *("causal_align", "'top-left'", "attn_mask", "'bottom-right'"),
    ),
    (
        "causal mask of other lengths",
        {"attn_mask": causal_lower_right(4, 6)},
        ValueError,
        *("attn_mask", "(5, 6)", "(4, 6)"),
    ),
    ("window -2", {"window": (-2, 0)}, ValueError, "window", "-1", "-2"),
    ("window 3", {"window": 3}, TypeError, "window", "pair", "3"),
    ("window triple", {"window": (1, 2, 3)}, TypeError, "window", "pair", "(1, 2, 3)"),
    ("window float", {"window": (1.0, 0)}, TypeError, "window", "integers", "1.0"),
    ("window bool", {"window": (True, 0)}, TypeError, "window", "integers", "True"),
    ("align", {"causal_align": "middle"}, ValueError, "causal_align", "'top-left'", "'middle'"),
    ("align type", {"causal_align": 1}, TypeError, "causal_align", "text", "1"),
    ("softcap -1", {"softcap": -1.0}, ValueError, "softcap", "at least 0", "-1.0"),
    ("softcap huge", {"softcap": 4e38}, ValueError, "softcap", "3.4e+38", "4e+38"),
    ("mask numpy", {"attn_mask": np.ones((5, 6), bool)}, TypeError, "attn_mask", "Tensor"),
    ("softcap nan", {"softcap": NAN}, ValueError, "softcap", "finite", "nan"),
    ("softcap text", {"softcap": "30"}, TypeError, "softcap", "real number", "'30'"),
    ("softcap bool", {"softcap": False}, TypeError, "softcap", "real number", "False"),
    *(
        (f"dropout {p}", {"dropout_p": p}, ValueError, "dropout_p", "[0, 1)", repr(p))
        for p in (1.0, -0.1, NAN, 1)
    ),
    ("dropout text", {"dropout_p": "0"}, TypeError, "dropout_p", "real number", "'0'"),
    ("dropout none", {"dropout_p": None}, TypeError, "dropout_p", "real number", "None"),
    *(
        row
        for name, public in (
            ("alibi_slopes", "alibi_slopes"),
            ("sinks", "sinks"),
            ("alpha", "alpha"),
        )
        for row in (
            (f"{name} shape", {name: tensor(3)}, ValueError, public, "(4,)", "(3,)"),
            (f"{name} rank", {name: tensor(4, 1)}, ValueError, public, "(4,)", "(4, 1)"),
            (f"{name} int", {name: tensor(4).int()}, TypeError, public, "floating", "int32"),
            (f"{name} meta", {name: tensor(4).to("meta")}, ValueError, name[:5], "cpu", "meta"),
        )
    ),
    ("slopes list", {"alibi_slopes": [1.0]}, TypeError, "alibi_slopes", "torch.Tensor", "list"),
    *(
        (f"slopes {wrong}", {"alibi_slopes": tensor(4) * wrong}, ValueError, "alibi_slopes", got)
        for wrong, got in ((-1.0, "-1.0"), (NAN, "nan"), (INF, "inf"), (-INF, "-inf"))
    ),
    (
        "a slope of many",
        {"alibi_slopes": torch.tensor([0.5, NAN, 1.0, 2.0])},
        ValueError,
        *("alibi_slopes", "finite and at least 0", "nan"),
    ),
    ("scale shape", {"scale": tensor(3)}, ValueError, "scale", "(4,)", "(2, 4, 5)", "got (3,)"),
    ("scale of rows alone", {"scale": tensor(5)}, ValueError, "each head, (4,)", "two", "(5,)"),
    ("scale rank", {"scale": tensor(1, 2, 4, 5)}, ValueError, "scale", "(1, 2, 4, 5)"),
    ("scale int", {"scale": tensor(4).int()}, TypeError, "scale", "floating", "int32"),
    *(
        row
        for name, most in (("q_lengths", 5), ("kv_lengths", 6), ("kv_starts", 6))
        for row in (
            (f"{name} list", {name: [1, 2]}, TypeError, name, "torch.Tensor", "list"),
            (f"{name} long", {name: tensor(2).long()}, TypeError, name, "int32", "int64"),
            (f"{name} shape", {name: tensor(3).int()}, ValueError, name, "(2,)", "(3,)"),
            (f"{name} meta", {name: tensor(2).int().to("meta")}, ValueError, name, "cpu", "meta"),
            (f"{name} large", {name: 7 * tensor(2).int()}, ValueError, name, f"{most}", "7"),
            (f"{name} below 0", {name: -tensor(2).int()}, ValueError, name, "0", "-1"),
        )
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


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        *(("is_causal", True, 1), ("is_causal", False, 0.0), ("enable_gqa", True, 1)),
        *(("alpha", 1.0, True), ("dropout_p", 0, False), ("softcap", 0, False)),
        ("scale", 1.0, True),
    ],
)
def test_a_call_that_is_known_is_known_by_its_types(name: str, right: Any, wrong: Any) -> None:
    for _ in range(2):
        adasplash2.entmax_attention(**{**GOOD, name: right})
        with pytest.raises(TypeError, match=name):
            adasplash2.entmax_attention(**{**GOOD, name: wrong})


def test_a_call_that_is_known_is_known_by_its_tensors() -> None:
    query, key, value = (GOOD[name] for name in ("query", "key", "value"))
    others = [
        (query[:, :, :3], key, value),
        (query, key[:, :, :4], value[:, :, :4]),
        (query.double(), key.double(), value.double()),
        (query.mT.contiguous().mT, key, value),
    ]
    for tensors in ((query, key, value), *others, (query, key, value), *others):
        out = adasplash2.entmax_attention(*tensors, enable_gqa=True)
        exact = adasplash2.entmax_attention(*(t.double() for t in tensors), enable_gqa=True)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    for tensors in ((query.double(), key, value), (query[..., :7], key, value)):
        with pytest.raises((TypeError, ValueError), match="key must have"):
            adasplash2.entmax_attention(*tensors, enable_gqa=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adasplash2.entmax_attention(query, key.bfloat16(), value, enable_gqa=True)
    assert out.dtype == torch.bfloat16


def test_what_is_known_of_a_call() -> None:
    """Its problems, once it has run without and with gradients; of a number of calls."""
    lowering._plain.cache_clear()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in GOOD.items()}
    for number in range(1, 9):
        alpha = 1.0 + number / 8
        asked = lowered(**GOOD, said=Said(alpha=alpha)).problems
        assert asked == [None, None]
        problems = [validated(Inputs(**GOOD), Options(alpha), grad) for grad in (False, True)]
        adasplash2.entmax_attention(**GOOD, alpha=alpha)
        assert asked == [problems[0], None]
        adasplash2.entmax_attention(**leaves, alpha=alpha)
        assert asked == problems
        assert lowered(**leaves, said=Said(alpha=alpha)).problems is asked
    info = lowering._plain.cache_info()
    assert (info.currsize, info.maxsize) == (8, 1024)


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


def test_what_sdpa_has_not_goes_by_keyword() -> None:
    sdpa = inspect.signature(_sdpa)
    ours = list(inspect.signature(adasplash2.entmax_attention).parameters.values())
    for mine, its in zip(ours, sdpa.parameters.values(), strict=False):
        assert (mine.name, mine.default) == (its.name, its.default)
    later = ours[len(sdpa.parameters) :]
    assert {parameter.kind for parameter in later} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="positional"):
        adasplash2.entmax_attention(*GOOD.values(), None, 0.0, False, None, False, 1.5)  # type: ignore[misc]


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> None:
    """As torch documents it: it has no signature that Python can read."""


def test_stats_have_no_softmax() -> None:
    with pytest.raises(ValueError, match=says("alpha", "greater than 1", "softmax", "1.0")):
        adasplash2.attention_stats(**GOOD, alpha=1)


def test_the_operator_of_rows_has_no_softmax() -> None:
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
    ("alpha shape", {"alpha": tensor(3)}, ValueError, "alpha", "(2, 1)", "(3,)"),
    ("alpha wide", {"alpha": tensor(2, 3)}, ValueError, "alpha", "(2, 1)", "(2, 3)"),
    ("alpha rank", {"alpha": tensor(1, 2, 1)}, ValueError, "alpha", "(2, 1)", "(1, 2, 1)"),
    ("alpha shape in dim", {"alpha": tensor(2, 1), "dim": 0}, ValueError, "(1, 3)", "(2, 1)"),
    ("alpha int", {"alpha": tensor(2).int()}, TypeError, "alpha", "floating", "int32"),
    ("alpha bool", {"alpha": tensor(2).bool()}, TypeError, "alpha", "floating", "bool"),
    ("alpha meta", {"alpha": tensor(2).to("meta")}, ValueError, "alpha", "cpu", "meta"),
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
    for name in ("softcap", "dropout_p"):
        with pytest.raises(TypeError, match=f"{name} must be known here"):
            torch.vmap(
                lambda given, name=name: adasplash2.entmax_attention(x, x, x, **{name: given})
            )(torch.tensor([0.2, 0.5]))


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
    assert asked(adasplash2.attention_stats) == asked(adasplash2.explain)
    told = asked(adasplash2.explain)
    packing = {name: told.pop(name) for name in functional.PACKING}
    assert told == {k: v for k, v in taken.items() if k != "return_aux"}
    where_packed = get_type_hints(adasplash2.entmax_attention_varlen)
    for name, parameter in packing.items():
        assert name in where_packed
        assert (parameter.kind, parameter.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    # Operands and options whose public names are others, and what is said of a cache alone.
    others = {"scales", "alphas", "ranges", "dropout_seed", "window_left", "window_right"}
    others |= {"block_table"} & set(asked(adasplash2.entmax_attention_with_kvcache))
    said = {"window", "q_lengths", "kv_lengths", "kv_starts", "return_aux"}
    assert set(taken) == {*Inputs._fields, *Options._fields} - others | said
    for name in Options._fields:
        if name in taken:
            default = None if name == "backend" else Options._field_defaults[name]
            assert taken[name].default == default
        assert f" {name}" in f"{options.SCHEMA}, {options.LATER_SCHEMA}"
    for function in (adasplash2.attention_stats, adasplash2.explain):
        with pytest.raises(TypeError, match="no_such"):
            function(*GOOD.values(), no_such=1)
        with pytest.raises(TypeError, match="value"):
            function(*list(GOOD.values())[:2])


def cu(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


NOT_TAKEN = {
    "entmax_attention_varlen": {
        *("q_lengths", "kv_lengths", "kv_starts"),  # each sequence has its own
    },
    "entmax_attention_with_kvcache": {
        *("attn_mask", "dropout_p"),  # of training
        *("causal_align", "enable_gqa"),  # said by what it is
        *("q_lengths", "kv_lengths"),  # cache_lengths
    },
}
"""Options of a call that other functions leave out: these alone."""


def test_the_list_of_options_is_one() -> None:
    """:class:`Said` and the signatures that are written out: names, defaults, types."""

    def parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(function).parameters)

    taken = parameters(adasplash2.entmax_attention)
    said = {name: taken[name] for name in taken if name not in (*TENSORS, "return_aux")}
    assert {name: p.default for name, p in said.items()} == Said._field_defaults
    types = get_type_hints(Said)
    assert {name: get_type_hints(adasplash2.entmax_attention)[name] for name in said} == types
    assert get_type_hints(ScoreOptions).items() <= types.items()
    for function, without in NOT_TAKEN.items():
        its, hints = (of(getattr(adasplash2, function)) for of in (parameters, get_type_hints))
        assert said.keys() - its.keys() == without
        for name in said.keys() & its.keys():
            assert its[name].default == said[name].default
            assert its[name].kind == said[name].kind or name in ("is_causal", "scale", "attn_mask")
            assert hints[name] == types[name]


@pytest.mark.parametrize("function", ["entmax_attention", *NOT_TAKEN])
def test_what_is_no_option_is_refused_in_the_words_of_python(function: str) -> None:
    """Also where another function has it, and before anything else is looked at."""
    called = getattr(adasplash2, function)
    places = 5 if "varlen" in function else 3
    for name in ("no_such", "options", *NOT_TAKEN.get(function, ())):
        if name in inspect.signature(called).parameters:
            continue
        words = rf"{function}\(\) got an unexpected keyword argument '{name}'"
        with pytest.raises(TypeError, match=words):
            called(*(None,) * places, **{name: None}, alpha=1.5)
    with pytest.raises(TypeError, match="multiple values for"):
        called(*(None,) * places, query=None)


EXAMPLES: dict[str, Any] = {
    **{"dropout_p": 0.5, "is_causal": True, "scale": 0.5, "enable_gqa": True, "alpha": 2.0},
    **{"causal_align": "bottom-right", "window": (3, 1), "softcap": 2.0, "backend": "cpu"},
    "attn_mask": torch.ones(1, 1, 1, 6, dtype=torch.bool),
    **{"alibi_slopes": torch.ones(4), "sinks": torch.ones(4)},
    **dict.fromkeys(("q_lengths", "kv_lengths", "kv_starts"), cu(1, 2)),
}
"""Of each option, what is not its default."""


@pytest.mark.parametrize("name", Said._fields)
def test_nothing_that_is_said_is_lost(name: str) -> None:
    """Each option alone changes what is asked of backends."""
    tensors = tensor(2, 4, 5, 8), tensor(2, 4, 6, 8), tensor(2, 4, 6, 8)
    inputs, options, *_ = lowered(*tensors, Said())
    changed, told, *_ = lowered(*tensors, Said(**{name: EXAMPLES[name]}))
    is_given = [operand is not None for operand in changed.operands()]
    assert told != options or is_given != [operand is not None for operand in inputs.operands()]


def test_an_option_that_is_a_tensor_stands_among_the_others() -> None:
    types = get_type_hints(Said)
    options._tensors(types)
    with pytest.raises(TypeError, match="must stand together"):
        options._tensors({**types, "warmth": torch.Tensor | None})


@pytest.mark.parametrize(("function", "name"), [
    (function, name)
    for function in ("entmax_attention", *NOT_TAKEN)
    for name in Said._fields
    if name not in NOT_TAKEN.get(function, ())
])  # fmt: skip
def test_functions_pass_on_what_is_said(
    monkeypatch: pytest.MonkeyPatch, function: str, name: str
) -> None:
    heard: list[Said] = []

    def hear(*args: Any) -> None:
        heard.append(args[-1])
        raise InterruptedError

    for one in ("lowered", "lowered_packed", "lowered_cached"):
        monkeypatch.setattr(functional, one, hear)
    call = getattr(adasplash2, function)
    with torch.no_grad(), pytest.raises(InterruptedError):
        call(*(None,) * (5 if "varlen" in function else 3), **{name: EXAMPLES[name]})
    with torch.no_grad(), pytest.raises(InterruptedError):
        call(*(None,) * (5 if "varlen" in function else 3))
    assert getattr(heard[0], name) is EXAMPLES[name]
    assert heard[0]._replace(**{name: getattr(heard[1], name)}) == heard[1]


PACKED: dict[str, Any] = {
    "query": tensor(9, 4, 8),
    "key": tensor(11, 2, 8),
    "value": tensor(11, 2, 7),
    "cu_seqlens_q": torch.tensor([0, 4, 4, 9], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 6, 7, 11], dtype=torch.int32),
    "enable_gqa": True,
}


BAD_PACKED = [
    ("query rank", {"query": tensor(1, 9, 4, 8)}, ValueError, "query", "3 dimensions", "4"),
    ("query list", {"query": [1.0]}, TypeError, "query", "torch.Tensor", "list"),
    *(
        row
        for name, total in (("cu_seqlens_q", 9), ("cu_seqlens_k", 11))
        for row in (
            (f"{name} list", {name: [0, total]}, TypeError, name, "torch.Tensor", "list"),
            (f"{name} long", {name: cu(0, 2, 3, total).long()}, TypeError, name, "int32", "int64"),
            (f"{name} meta", {name: cu(0, 2, 3, total).to("meta")}, ValueError, name, "cpu"),
            (f"{name} rank", {name: cu(0, total)[None]}, ValueError, name, "sequences + 1"),
            (f"{name} short", {name: cu()}, ValueError, name, "sequences + 1", "(0,)"),
            (f"{name} none", {name: cu(0)}, ValueError, name, f"total of {total}", "[0]"),
            (f"{name} begin", {name: cu(1, 2, 3, total)}, ValueError, name, "begin with 0", "1"),
            (f"{name} end", {name: cu(0, 2, 3, 4)}, ValueError, name, f"total of {total}", "4"),
            (f"{name} falls", {name: cu(0, 5, 3, total)}, ValueError, name, "never fall", "5, 3"),
        )
    ),
    ("sequences", {"cu_seqlens_k": cu(0, 11)}, ValueError, "cu_seqlens_k", "(4,)", "(2,)"),
    ("max_seqlen_q", {"max_seqlen_q": -1}, ValueError, "max_seqlen_q", "at least 0", "-1"),
    ("max_seqlen_k", {"max_seqlen_k": 1.5}, TypeError, "max_seqlen_k", "integers", "1.5"),
    ("window", {"window": (-2, 0)}, ValueError, "window", "-1"),
    *(
        (f"slopes {shape}", {"alibi_slopes": tensor(*shape)}, ValueError, "alibi_slopes", words)
        for shape, words in (
            ((2, 4), "(4,) or (3, 4), (sequences, heads), got (2, 4)"),
            ((3, 2), "(4,) or (3, 4), (sequences, heads), got (3, 2)"),
            ((3,), "(4,) or (3, 4), (sequences, heads), got (3,)"),
            ((1, 3), "(4,) or (3, 4), (sequences, heads), got (1, 3)"),
            ((3, 4, 1), "(4,) or (3, 4), (sequences, heads), got (3, 4, 1)"),
        )
    ),
    ("slopes below", {"alibi_slopes": -tensor(3, 4)}, ValueError, "alibi_slopes", "at least 0"),
    ("slopes int", {"alibi_slopes": tensor(3, 4).int()}, TypeError, "alibi_slopes", "floating"),
    *(
        (f"scale {shape}", {"scale": tensor(*shape)}, ValueError, "scale", "(3, 4, 1)", got)
        for shape, got in (((2, 4, 1), "got (2, 4, 1)"), ((3, 4, 9), "got (3, 4, 9)"))
    ),
    *(
        (f"scale {shape}", {"scale": tensor(*shape)}, ValueError, "scale", "(3, 4, 1)", words)
        for shape, words in (
            ((3, 4), "(sequences, heads, 1), where each sequence has its own"),
            ((4, 8), "(4, 9), (heads, queries), got (4, 8)"),
        )
    ),
    ("gqa", {"enable_gqa": False}, ValueError, "key", "enable_gqa=True"),
]


@cases(BAD_PACKED)
def test_packed_attention_refuses(
    arguments: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error, match=says(*words)):
        adasplash2.entmax_attention_varlen(**{**PACKED, **arguments})


@pytest.mark.parametrize("function", [adasplash2.attention_stats, adasplash2.explain])
@cases([
    *BAD_PACKED,
    ("no cu_seqlens_k", {"cu_seqlens_k": None}, TypeError, "cu_seqlens_k", "Tensor", "NoneType"),
    ("no cu_seqlens_q", {"cu_seqlens_q": None}, TypeError, "cu_seqlens_q", "Tensor", "NoneType"),
    (
        "lengths alone",
        {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 5},
        *(TypeError, "cu_seqlens_q", "Tensor", "NoneType"),
    ),
    *(
        (name, {name: cu(1, 2, 3)}, ValueError, name, "None for packed sequences", "Tensor")
        for name in ("q_lengths", "kv_lengths", "kv_starts")
    ),
])  # fmt: skip
def test_what_answers_about_packed_attention_refuses_alike(
    arguments: dict[str, Any], error: type[Exception], words: list[str], function: Any
) -> None:
    with pytest.raises(error, match=says(*words)):
        function(**{**PACKED, **arguments})


@pytest.mark.parametrize("function", [adasplash2.attention_stats, adasplash2.explain])
@pytest.mark.parametrize(("args", "said", "words"), [
    (3, {"causal": True}, "got an unexpected keyword argument 'causal'"),
    (2, {}, "missing a required argument: 'value'"),
    (9, {}, "too many positional arguments"),
    (3, {"query": None}, "multiple values for argument 'query'"),
])  # fmt: skip
def test_wrong_arguments_are_those_of_the_function(
    function: Any, args: int, said: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) {words}"):
        function(*[tensor(2, 4, 5, 8)] * args, **said)


@pytest.mark.parametrize("function", [adasplash2.attention_stats, adasplash2.explain])
@pytest.mark.parametrize("said", [
    {"max_seqlen_q": 8}, {"max_seqlen_k": 8}, {"cu_seqlens_q": cu(0, 5)}, {"cu_seqlens_k": cu(0, 5)}
], ids=lambda said: next(iter(said)))  # fmt: skip
def test_packing_is_said_by_both_offsets(function: Any, said: dict[str, Any]) -> None:
    x = tensor(2, 4, 5, 8)
    words = says("cu_seqlens_q and cu_seqlens_k must both", next(iter(said)), "got", "NoneType")
    with pytest.raises(TypeError, match=words):
        function(x, x, x, **said)


def jagged(
    places: tuple[int, ...], lengths: tuple[int, ...] | None = None, total: int = 0, swap: int = 2
) -> torch.Tensor:
    """``(batch, 4, length, 8)``, ragged in dimension ``swap``."""
    made = torch.nested.nested_tensor_from_jagged(
        torch.zeros(total or places[-1], 4, 8),
        torch.tensor(places),
        None if lengths is None else torch.tensor(lengths),
    )
    return made if swap == 1 else made.transpose(1, swap)


NESTED = dict.fromkeys(("query", "key", "value"), jagged((0, 5, 12)))

BAD_NESTED = [
    *(
        row
        for name in NESTED
        for row in (
            (f"{name} ragged 1", {name: jagged((0, 5, 12), swap=1)}, ValueError, name, "transpose"),
            (f"{name} ragged 3", {name: jagged((0, 5, 12), swap=3)}, ValueError, name, "third"),
            (f"{name} dense", {name: tensor(2, 4, 5, 8)}, TypeError, "jagged"),
        )
    ),
    *(
        row
        for name in ("query", "key")
        for row in (
            (f"{name} end", {name: jagged((0, 5, 12), total=13)}, ValueError, name, "total of 13"),
            (f"{name} falls", {name: jagged((0, 7, 5, 12))}, ValueError, name),
            (f"{name} overlaps", {name: jagged((0, 5, 12), (6, 7))}, ValueError, name, "next one"),
            (f"{name} leaves", {name: jagged((0, 5, 12), (5, 8))}, ValueError, name, "lengths"),
            (f"{name} negative", {name: jagged((0, 5, 12), (-1, 7))}, ValueError, name, "lengths"),
        )
    ),
    *(
        (
            f"{name} batch",
            {name: jagged((0, 5, 9, 12))},
            ValueError,
            name,
            "batch of query (2)",
            "3",
        )
        for name in ("key", "value")
    ),
    (
        "value lengths",
        {"value": jagged((0, 6, 12))},
        ValueError,
        *("value must have the sequence lengths of key", "[5, 7]", "[6, 6]"),
    ),
    (
        "value holes",
        {"value": jagged((0, 5, 12), (5, 6))},
        ValueError,
        *("value must have the sequence lengths of key", "[5, 7]", "[5, 6]"),
    ),
    (
        "value places",
        {"key": jagged((0, 5, 12), (3, 4)), "value": jagged((1, 5, 12), (3, 4))},
        ValueError,
        *("value must have the offsets of key", "[0, 5]", "[1, 5]", "contiguous()"),
    ),
    ("attn_mask", {"attn_mask": ONES}, ValueError, "attn_mask", "nested", "got a Tensor"),
    ("key of one shape", {"key": tensor(2, 4, 6, 8)}, TypeError, "key", "nested", "torch.strided"),
    ("value list", {"value": [1.0]}, TypeError, "value", "nested", "got list"),
]


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@cases(BAD_NESTED)
def test_nested_attention_refuses(
    arguments: dict[str, Any], error: type[Exception], words: list[str], alpha: float
) -> None:
    with pytest.raises(error, match=says(*words)):
        adasplash2.entmax_attention(**{**NESTED, **arguments}, alpha=alpha)


BAD_LEADING = [
    *(
        (f"{name} {shape}", {name: tensor(*shape).int()}, ValueError, name, "(2, 3) or (6,)", got)
        for name in ("q_lengths", "kv_lengths", "kv_starts")
        for shape, got in (((3, 2), "(3, 2)"), ((2,), "(2,)"), ((2, 1), "(2, 1)"))
    ),
    (
        "mask",
        {"attn_mask": ONES[None, None, None].expand(3, 2, 1, 5, 6)},
        ValueError,
        *("attn_mask", "(2, 3, 4, 5, 6)", "got (3, 2, 1, 5, 6)"),
    ),
    ("slopes", {"alibi_slopes": tensor(3, 4)}, ValueError, "(4,) or (6, 4) or (2, 3, 4)", "(3, 4)"),
    (
        "scale",
        {"scale": tensor(3, 2, 1, 1)},
        ValueError,
        *("scale", "(6, 4, 5) or (2, 3, 4, 5)", "got (3, 2, 1, 1)"),
    ),
    (
        "scale of 2",
        {"scale": tensor(2, 4, 5)},
        ValueError,
        *("scale", "(6, 4, 5) or (2, 3, 4, 5)", "got (2, 4, 5)"),
    ),
]


@cases(BAD_LEADING)
def test_operands_of_leading_dimensions_refuse(
    arguments: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    leading = {name: t[:1, None].expand(2, 3, *t.shape[1:]) for name, t in GOOD.items()}
    with pytest.raises(error, match=says(*words)):
        adasplash2.entmax_attention(**{**leading, **arguments})


def test_return_aux_is_a_flag() -> None:
    with pytest.raises(TypeError, match=says("return_aux", "True or False", "1")):
        adasplash2.entmax_attention(**GOOD, return_aux=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=says("return_aux", "alpha = 1")):
        adasplash2.entmax_attention(**GOOD, alpha=1, return_aux=True)

"""Every kernel of the Triton backend compiles, without a GPU, for every generation it is made for;
and what the package promises without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile with")

from adasplash2 import dispatch
from adasplash2.backends import triton as backend
from adasplash2.backends.cuda import configurations, layout
from adasplash2.backends.triton import sizes
from adasplash2.problem import (
    DIFFERENTIABLE,
    Inputs,
    Operand,
    Problem,
    RowProblem,
    ScoreTransform,
)

if sizes.INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adasplash2.backends.triton import decoding as decoding_launches
from adasplash2.backends.triton import launch, rows

SHARED = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory that a block may ask for, by compute capability."""

LIMITS = {arch: sizes.Limits(shared, arch == 90, arch >= 90) for arch, shared in SHARED.items()}


def with_symbols(problem: Problem) -> Problem:
    """Its shapes as symbols, as a trace with dynamic shapes has them."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    shape = (problem.batch, problem.heads_q, problem.length_q, problem.head_dim)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 4)
    fake = mode.from_tensor(torch.empty(shape, device="meta"), symbolic_context=context)
    batch, heads, length, head_dim = fake.shape
    return dataclasses.replace(
        problem,
        batch=batch,
        heads_q=heads,
        heads_kv=heads // problem.gqa_group,
        length_q=length,
        length_k=length,
        head_dim=head_dim,
    )


TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.int64: "*i64",
}

Launch = tuple[Any, dict[str, Any], dict[str, int]]


def specialise(value: Any, place: tuple[int, ...], constants: Any, attributes: Any) -> Any:
    """The type of an argument as Triton specialises it: 1 and None are constants, pointers and
    multiples of 16 are said to be such; members of a tuple one by one."""
    if isinstance(value, tuple):
        members = [specialise(x, (*place, i), constants, attributes) for i, x in enumerate(value)]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    if value is None or (isinstance(value, int) and value == 1):
        constants[place] = value
        return "constexpr"
    if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[place] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def specialised(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Types by argument, constants and attributes by place: what a kernel is compiled for."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    assert arguments.keys() == set(kernel.arg_names)
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        else:
            signature[parameter.name] = specialise(value, (index,), constants, attributes)
    return signature, constants, attributes


def compile_for(capability: int, kernel: Any, arguments: dict[str, Any], options: Any) -> Any:
    source = ASTSource(kernel, *specialised(kernel, arguments))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def problem(head_dim: int, dtype: torch.dtype, alpha: float, is_causal: bool) -> Problem:
    scores = ScoreTransform(scale=head_dim**-0.5, is_causal=is_causal)
    return Problem(
        batch=1, heads_q=4, heads_kv=2, length_q=1000, length_k=1000, head_dim=head_dim,
        head_dim_v=head_dim, dtype=dtype, device=torch.device("cpu"), alpha=alpha, scores=scores,
        needs_grad=True,
    )  # fmt: skip


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the backend asks to be compiled."""
    asked: list[Launch] = []
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(
        launch,
        "compile_only",
        lambda x: asked.append((x.kernel, dict(x.arguments), x.options)),
    )
    return asked


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "alpha", "is_causal"),
    [
        (80, torch.bfloat16, 64, 1.5, True),
        (90, torch.bfloat16, 64, 1.5, True),
        (90, torch.float16, 128, 2.0, False),
        (90, torch.bfloat16, 256, 1.5, True),
        (90, torch.float32, 40, 1.25, True),
        (90, torch.float32, 16, 3.0, True),
        (80, torch.bfloat16, 64, 3.0, True),
        (90, torch.float16, 64, 3.0, False),
        (90, torch.bfloat16, 3, 1.5, True),
        (80, torch.float16, 1, 1.25, False),
        (100, torch.bfloat16, 64, 1.5, True),
        (100, torch.bfloat16, 64, 3.0, True),
        (120, torch.bfloat16, 128, 1.5, True),
    ],
)
def test_attention_compiles(
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    alpha: float,
    is_causal: bool,
    launches: list[Launch],
) -> None:
    asked = problem(head_dim, dtype, alpha, is_causal)
    config = next(sizes.configs(asked, LIMITS[capability]))
    backend.precompile(asked, config)
    assert [kernel.__name__ for kernel, *_ in launches] == [
        *("solve", "output", "output", "grad_query", "grad_query"),
        *("transpose_lists", "cut_lists", "grad_key_value", "add_pieces", "grad_key_value"),
    ]
    for kernel, arguments, options in launches:
        if arguments.get("SAFE") and capability != 90:
            continue  # the same operations; one generation is enough
        compiled = compile_for(capability, kernel, arguments, options)
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert compiled.metadata.shared <= SHARED[capability], kernel.__name__
        if dtype != torch.float32 and kernel.__name__ not in sizes.LIST_KERNELS:
            assert TENSOR_CORES[capability] in compiled.asm["ptx"], kernel.__name__


def short(length: int, **changed: Any) -> Problem:
    plain = problem(64, torch.bfloat16, 1.5, False)
    return dataclasses.replace(plain, length_q=length, length_k=length, **changed)


def spilled(compiled: Any, folder: Path) -> int:
    """Bytes of a thread that its registers do not hold."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[0])


@pytest.mark.parametrize(("length", "most_spilled"), [(512, 0), (250, 0), (120, 640)])
def test_whole_rows_compile(
    length: int, most_spilled: int, launches: list[Launch], tmp_path: Path
) -> None:
    """Scores of 512 keys stay in registers; beside outputs, what is spilled is what one row block
    leaves for the next."""
    asked = short(length)
    config = next(sizes.configs(asked, LIMITS[90]))
    backend.precompile(asked, config)
    found_output = length <= sizes.LONGEST_WHOLE_OUTPUT
    names = [kernel.__name__ for kernel, *_ in launches]
    assert names[:3] == ["whole_rows", "output", "grad_query" if found_output else "output"]
    compiled = compile_for(90, *launches[0])
    assert compiled.metadata.shared <= SHARED[90]
    assert TENSOR_CORES[90] in compiled.asm["ptx"]
    assert spilled(compiled, tmp_path) <= most_spilled


@pytest.mark.parametrize(
    ("asked", "length"), [("added by key", 120), ("window", 500), ("slopes of rows", 120)]
)
def test_whole_rows_of_what_a_call_may_ask_compile(
    asked: str, length: int, launches: list[Launch]
) -> None:
    said, operands = ASKED[asked]
    plain = short(length)
    whole = dataclasses.replace(
        plain, scores=dataclasses.replace(plain.scores, **said), operands=operands
    )
    config = next(sizes.configs(whole, LIMITS[90]))
    assert config["whole"] != "nothing"
    backend.precompile(whole, config)
    assert compile_for(90, *launches[0]).metadata.shared <= SHARED[90]


def test_which_rows_are_whole() -> None:
    """Those that were made for it, by the problem alone; powers take registers of their own."""

    def offered(asked: Problem, capability: int = 90) -> list[str | int]:
        return [config["whole"] for config in sizes.configs(asked, LIMITS[capability])][:3]

    both = ["outputs", "thresholds", "nothing"]
    assert offered(short(1)) == offered(short(128)) == both
    assert offered(short(129)) == offered(short(512)) == [*both[1:], "nothing"]
    for asked in ((short(513),), (short(256), 80), (short(256), 100)):
        assert offered(*asked) == ["nothing"] * 3
    assert set(offered(short(256, dtype=torch.float32))) == {"nothing"}
    assert offered(short(128, alpha=1.25)) == [both[2], *both[:2]]
    assert offered(short(256, alpha=3.0)) == ["nothing", "thresholds", "nothing"]
    assert offered(short(256, head_dim=256, head_dim_v=256))[0] == "thresholds"
    mask = Operand("attn_mask", torch.bool, PER_PAIR)
    assert offered(short(128, operands=(mask,))) == both
    assert set(offered(short(129, operands=(mask,)))) == {"nothing"}
    scores = dataclasses.replace(short(128).scores, dropout_p=0.1)
    assert offered(short(128, scores=scores))[0] == "thresholds"


@pytest.mark.parametrize(
    ("said", "narrow"),
    [
        ({}, 0),
        ({"is_causal": True}, 4),
        ({"is_causal": True, "bottom_right": True}, 2),
        ({"window": (3, 64)}, 3),
        ({"window": (3, -1)}, 0),
        ({"window": (3, 300)}, 0),
    ],
)
def test_row_blocks_that_see_the_first_half_alone(said: dict[str, Any], narrow: int) -> None:
    plain = short(512)
    asked = dataclasses.replace(
        plain, length_q=384, scores=dataclasses.replace(plain.scores, **said)
    )
    config = next(sizes.configs(asked, LIMITS[90]))
    parts = [(512, 6 - narrow), (256, narrow)]
    assert sizes.whole_parts(asked, config) == (parts if narrow else parts[:1])
    # What is given row by row may say more than these numbers.
    given = dataclasses.replace(asked, operands=ASKED["ranges"][1])
    assert sizes.whole_parts(given, config) == [(512, 6)]


@pytest.mark.parametrize(("batch", "heads", "each"), [(8, 12, 2), (32, 16, 8), (1, 1, 1)])
def test_row_blocks_of_a_program(batch: int, heads: int, each: int) -> None:
    """As many as keep all of 132 multiprocessors busy up to the end."""
    asked = short(512, batch=batch, heads_q=heads, heads_kv=heads)
    config = next(sizes.configs(asked, LIMITS[90]))
    assert sizes.row_blocks_each(sizes.Grid.of(asked, config), config, 132) == each


PER_HEAD, PER_ROW, PER_PAIR = (False, True), (True, True, True), (True, True, True, True)

ASKED: dict[str, tuple[dict[str, Any], tuple[Operand, ...]]] = {
    "window": ({"window": (100, 7), "bottom_right": True}, ()),
    "ranges": ({}, (Operand("ranges", torch.int32, PER_ROW),)),
    "hidden": ({}, (Operand("attn_mask", torch.bool, (False, False, True, True)),)),
    "added": ({}, (Operand("attn_mask", torch.bfloat16, PER_PAIR),)),
    "added by key": ({}, (Operand("attn_mask", torch.float32, (True, False, False, True)),)),
    "softcap": ({"softcap": 30.0}, (Operand("sinks", torch.float32, PER_HEAD),)),
    "slopes": ({"is_causal": True}, (Operand("alibi_slopes", torch.float32, PER_HEAD),)),
    "slopes of rows": (
        {},
        (
            Operand("alibi_slopes", torch.float32, (False, True, True)),
            Operand("ranges", torch.int32, PER_ROW),
        ),
    ),
    "numbers": (
        {"scale": 1.0},
        (
            Operand("scales", torch.float32, PER_ROW),
            Operand("alphas", torch.float32, PER_HEAD),
        ),
    ),
    "dropout": ({"dropout_p": 0.1}, (Operand("dropout_seed", torch.int64, (False,)),)),
    "all": (
        {"scale": 1.0, "softcap": 30.0, "dropout_p": 0.1},
        (
            Operand("attn_mask", torch.float32, (False, True, True, True)),
            Operand("alibi_slopes", torch.float32, PER_HEAD),
            Operand("sinks", torch.float32, PER_HEAD),
            Operand("scales", torch.float32, PER_ROW),
            Operand("alphas", torch.float32, PER_HEAD),
            Operand("ranges", torch.int32, PER_ROW),
            Operand("dropout_seed", torch.int64, (True,)),
        ),
    ),
}


def test_a_paged_cache_compiles(launches: list[Launch]) -> None:
    asked = dataclasses.replace(
        problem(128, torch.bfloat16, 1.5, False),
        length_q=100,
        length_k=1024,
        page_size=16,
        operands=PAGED,
        needs_grad=False,
    )
    backend.precompile(asked, next(sizes.configs(asked, LIMITS[90])))
    assert [kernel.__name__ for kernel, *_ in launches] == ["solve", "output", "output"]
    for kernel, arguments, options in launches:
        compiled = compile_for(90, kernel, arguments, options)
        assert compiled.metadata.shared <= SHARED[90]


PAGED = (
    Operand("ranges", torch.int32, PER_ROW),
    Operand("block_table", torch.int32, (True, True)),
)


def decoding(length_k: int, **more: Any) -> Problem:
    plain = problem(more.pop("head_dim", 128), more.pop("dtype", torch.bfloat16), 1.5, False)
    sizes_ = {"length_q": 1, "heads_q": 8, "length_k": length_k, "needs_grad": False}
    return dataclasses.replace(plain, **{**sizes_, **more})


@pytest.mark.parametrize(
    ("capability", "asked"),
    [
        (90, {"page_size": 16, "operands": PAGED}),
        (90, {"length_q": 16, "head_dim": 64}),
        (90, {"dtype": torch.float32}),
        (100, {"length_q": 16, "head_dim": 64}),
    ],
    ids=["pages", "16 queries", "float32", "16 queries on sm_100"],
)
def test_decoding_compiles(capability: int, asked: Any, launches: list[Launch]) -> None:
    asked = decoding(100_000, **asked)
    backend.precompile(asked, next(sizes.decoding_configs(asked, LIMITS[capability])))
    names = ["decode_scan", "decode_solve", *2 * ["decode_narrow"], "decode_weigh"]
    many = asked.gqa_group * asked.length_q > decoding_launches.LAST_ADDS
    assert [kernel.__name__ for kernel, *_ in launches] == names + many * ["decode_combine"]
    compiled = set()
    for kernel, arguments, options in launches:
        products = kernel.__name__ in ("decode_scan", "decode_weigh")
        variant = kernel.__name__, arguments.get("LAST")
        if variant in compiled or (capability != 90 and not products):
            continue
        compiled.add(variant)
        made = compile_for(capability, kernel, arguments, options)
        assert made.metadata.shared <= SHARED[capability]
        if products and asked.dtype != torch.float32:
            assert ".mma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"]
        if kernel.__name__ == "decode_scan":  # keys are on the way while it computes
            waits = re.findall(r"async_wait %.* \{num = (\d+) : i32\}", made.asm["ttgir"])
            assert waits
            assert "0" not in waits


@pytest.mark.parametrize(
    "asked",
    [
        short(120),
        short(300),
        short(1000, alpha=1.25),
        decoding(100_000),
        decoding(1000, length_q=9),
    ],
    ids=["outputs", "thresholds", "tiles", "decoding", "9 queries"],
)
def test_what_counts_compiles(asked: Problem, launches: list[Launch]) -> None:
    """Kernels of ``attention_stats``, which have lines of their own."""
    decoded = sizes.is_decoding(asked)
    config = next((sizes.decoding_configs if decoded else sizes.configs)(asked, LIMITS[90]))
    backend._forward(backend._call_without_data(asked, config), backend.counters(asked, "meta"))
    counting = [(k, given, how) for k, given, how in launches if given.get("COUNT")]
    assert counting
    for kernel, arguments, options in counting:
        assert compile_for(90, kernel, arguments, options).metadata.shared <= SHARED[90]


@pytest.mark.parametrize("more", [{}, {"page_size": 16, "operands": PAGED}], ids=["piece", "pages"])
def test_a_longer_cache_compiles_nothing_new(more: Any, launches: list[Launch]) -> None:
    """Nor does one whose last query sees its last key, wherever that is."""
    seen = set()
    for length in (16_512, 16_513, 30_000, 99_999):
        length -= length % more.get("page_size", 1)
        scores = ScoreTransform(scale=0.1, window=(500, -1), bottom_right=True)
        asked = decoding(length, **more) if more else decoding(length, scores=scores)
        launches.clear()
        backend.precompile(asked, next(sizes.decoding_configs(asked, LIMITS[90])))
        seen.add(repr([specialised(kernel, arguments) for kernel, arguments, _ in launches]))
    assert len(seen) == 1


def test_what_is_decoded() -> None:
    """Few queries and many keys, without gradients; nothing else makes a difference."""
    plain = decoding(1000)
    assert sizes.is_decoding(plain)
    for more in ({"needs_grad": True}, {"length_q": 17}, {"length_k": 255}):
        assert not sizes.is_decoding(dataclasses.replace(plain, **more))
    assert sizes.is_decoding(dataclasses.replace(plain, page_size=16, operands=PAGED))


def test_what_is_decoded_is_the_same_everywhere() -> None:
    """Where backends are chosen, and in both that have kernels of their own for it."""
    assert sizes.MOST_DECODED == layout.MOST_DECODED == dispatch.FEW
    assert sizes.FEWEST_DECODED == configurations.FEWEST_DECODED


def test_every_decoding_configuration_fits() -> None:
    for dtype in backend.DTYPES:
        for head_dim in (1, 40, 128, 256):
            for length_q in (1, 16):
                asked = decoding(1000, dtype=dtype, head_dim=head_dim, length_q=length_q)
                for limits in LIMITS.values():
                    assert list(sizes.decoding_configs(asked, limits)), (dtype, head_dim, limits)


@pytest.mark.parametrize(
    ("blocks", "tiles", "splits"),
    [(8, 2048, 66), (8, 16, 4), (128, 2048, 4), (300, 2048, 7), (1000, 2048, 1), (1, 1, 1)],
)
def test_splits_keep_all_programs_busy(blocks: int, tiles: int, splits: int) -> None:
    assert sizes.splits_of(blocks, tiles, 528) == splits


@pytest.mark.parametrize(
    ("capability", "asked"), [*((90, asked) for asked in ASKED), (80, "added")]
)
def test_what_a_call_may_ask_compiles(capability: int, asked: str, launches: list[Launch]) -> None:
    """Gradients of operands beside those without; the way for what is not finite once."""
    said, operands = ASKED[asked]
    plain = problem(64, torch.bfloat16, 1.5, False)
    whole = dataclasses.replace(
        plain,
        batch=2,
        length_q=900,
        scores=dataclasses.replace(plain.scores, **said),
        operands=operands,
    )
    backend.precompile(whole, next(sizes.configs(whole, LIMITS[capability])))
    wanted = {
        operand.name
        for operand in operands
        if operand.name in DIFFERENTIABLE and operand.dtype != torch.bool
    }
    names = [kernel.__name__ for kernel, *_ in launches]
    assert ("grad_mask" in names) == ("attn_mask" in wanted)
    assert names.count("grad_query") == (4 if wanted else 2)
    compiled = set()
    for kernel, arguments, options in launches:
        kind = kernel.__name__, arguments.get("SAFE"), arguments.get("WANTED")
        if kind in compiled or (arguments.get("SAFE") and asked != "numbers"):
            continue
        compiled.add(kind)
        made = compile_for(capability, kernel, arguments, options)
        assert made.metadata.shared <= SHARED[capability], kernel.__name__
        if kernel.__name__ not in sizes.LIST_KERNELS:
            assert TENSOR_CORES[capability] in made.asm["ptx"], kernel.__name__


def test_a_new_width_or_softcap_compiles_nothing_new() -> None:
    """Numbers that calls say go to the kernels as they run."""
    plain = problem(64, torch.bfloat16, 1.5, False)
    config = next(sizes.configs(plain, LIMITS[90]))
    made = {
        sizes.Options.of(
            dataclasses.replace(plain, scores=dataclasses.replace(plain.scores, **said)), config
        )
        for said in (
            {"window": (100, 7), "softcap": 30.0, "dropout_p": 0.1},
            {"window": (3, 0), "softcap": 5.0, "dropout_p": 0.5},
        )
    }
    assert len(made) == 1


def windowed(width: int, right: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    plain = problem(64, dtype, 1.5, False)
    scores = dataclasses.replace(plain.scores, window=(width, right))
    return dataclasses.replace(plain, length_q=65_536, length_k=65_536, scores=scores)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 3), (torch.float32, 5)], ids=["bfloat16", "float32"]
)
def test_all_widths_of_a_window_share_a_few_kernels(
    dtype: torch.dtype, most: int, launches: list[Launch]
) -> None:
    """As many as ``launch._few`` says, by what it makes of every width, and by what kernels are
    compiled for."""
    plain = windowed(1, 0, dtype)
    config = next(sizes.configs(plain, LIMITS[90]))
    block_q, block_k = int(config["block_q"]), int(config["block_k"])
    numbers = set()
    for width in range(1, 65_537):
        scores = dataclasses.replace(plain.scores, window=(width, 0))
        asked = dataclasses.replace(plain, scores=scores)
        numbers.add(launch._few(asked, config, block_q, block_k))
    assert len(numbers) == most
    compiled: dict[str, set[str]] = {}
    for width in (1, 2, 13, 14, 16, 30, 126, 600, 1023, 1024, 2046, 5000, 16_382, 65_536):
        for right in (0, 14, 100):
            launches.clear()
            backend.precompile(windowed(width, right, dtype), config)
            for kernel, arguments, options in launches:
                kind = f"{kernel.__name__} {arguments.get('SAFE')} {right > 0}"
                source = repr((specialised(kernel, arguments), options))
                compiled.setdefault(kind, set()).add(source)
    assert max(map(len, compiled.values())) == most


@pytest.mark.parametrize(("asked", "loops"), [("causal", 4), ("added", 4), ("window", 2)])
def test_tiles_are_asked_for_before_those_in_use_are_done_with(
    asked: str, loops: int, launches: list[Launch]
) -> None:
    """A loop that waits for all it has asked for has nothing on the way while it computes. A mask's
    tiles come as those of keys do; edges of a window in the loop of all others."""
    said, operands = ({"is_causal": True}, ()) if asked == "causal" else ASKED[asked]
    plain = problem(64, torch.bfloat16, 1.5, False)
    whole = dataclasses.replace(
        plain,
        length_q=2000,
        length_k=2000,
        scores=dataclasses.replace(plain.scores, **said),
        operands=operands,
    )
    backend.precompile(whole, next(sizes.configs(whole, LIMITS[90])))
    # Beside a mask's tiles there is no room for three stages of gradients; under windows four
    # blocks of them take turns.
    for name in ("solve", "output", "grad_query")[: 3 if asked == "causal" else 2]:
        kernel, arguments, options = next(
            one for one in launches if one[0].__name__ == name and not one[1].get("SAFE")
        )
        code = compile_for(90, kernel, arguments, options).asm["ttgir"]
        in_loops = re.findall(r"async_wait %.* \{num = (\d+) : i32\}", code)
        assert len(in_loops) == (loops if name == "solve" else loops // 2), name
        assert "0" not in in_loops, name


@pytest.mark.parametrize(
    ("length", "heads", "cut"),
    [(200, 4, False), (2048, 4, True), (4096, 16, True), (16384, 16, False)],
    ids=["short", "long", "longer", "many"],
)
def test_lists_are_cut_where_they_are_long_and_few(
    length: int, heads: int, cut: bool, launches: list[Launch]
) -> None:
    asked = dataclasses.replace(
        problem(64, torch.bfloat16, 1.5, True),
        **dict.fromkeys(("heads_q", "heads_kv"), heads),
        **dict.fromkeys(("length_q", "length_k"), length),
    )
    backend.precompile(asked, next(sizes.configs(asked, LIMITS[90])))
    names = [kernel.__name__ for kernel, *_ in launches]
    assert ("cut_lists" in names) == ("add_pieces" in names) == cut
    kernel, arguments, options = launches[names.index("grad_key_value")]
    assert (arguments["MOST"] > 0) == cut
    compiled = compile_for(90, kernel, arguments, options)
    assert TENSOR_CORES[90] in compiled.asm["ptx"]


def test_registers_are_limited_where_that_was_measured() -> None:
    narrow, wide = (problem(width, torch.bfloat16, 1.5, True) for width in (64, 128))
    for asked, capability, expected in ((narrow, 90, 3), (narrow, 80, 2), (wide, 90, 2)):
        config = next(sizes.configs(asked, LIMITS[capability]))
        assert sizes.residents(config, "solve") == expected
        assert ("maxnreg" in sizes.launch_options(config, "output")) == (expected == 3)
        assert "maxnreg" not in sizes.launch_options(config, "grad_key_value")


@pytest.mark.parametrize("alpha", [1.5, 1.25, 3.0, None])
def test_rows_compile(alpha: float | None, launches: list[Launch]) -> None:
    """``None`` has an alpha for each row."""
    asked = RowProblem(
        100, 5000, torch.bfloat16, torch.device("cpu"), alpha or 1.5, needs_grad=True,
        alphas=alpha is None,
    )  # fmt: skip
    backend.precompile(asked, backend.configs(asked)[0])
    assert len(launches) == 2
    for kernel, arguments, options in launches:
        compile_for(90, kernel, arguments, options)
    assert rows.kernels.__name__.endswith("kernels.rows")


def test_every_configuration_fits() -> None:
    """Each problem that is not refused has a configuration, also with little shared memory."""
    for dtype in backend.DTYPES:
        for head_dim in (1, 16, 40, 64, 80, 128, 200, 256):
            for limits in LIMITS.values():
                found = list(sizes.configs(problem(head_dim, dtype, 1.5, True), limits))
                assert found, (dtype, head_dim, limits)
                assert len({tuple(config.items()) for config in found}) == len(found)


def test_what_is_multiplied_in_halves() -> None:
    """Narrow heads and steep alphas in 16 bits, and no more: a second product takes time."""
    types = (torch.float16, torch.bfloat16, torch.float32)
    halved = {
        (dtype, head_dim, alpha)
        for dtype in types
        for head_dim in (1, 15, 16, 64)
        for alpha in (1.5, 3.0)
        if sizes.is_halved(problem(head_dim, dtype, alpha, True))
    }
    chosen = {(1, 1.5), (15, 1.5), (1, 3.0), (15, 3.0), (16, 3.0), (64, 3.0)}
    assert halved == {(dtype, *kind) for dtype in types[:2] for kind in chosen}


@pytest.mark.parametrize(("head_dim", "products"), [(15, 4), (16, 3)])
def test_halves_are_a_product_each(head_dim: int, products: int, launches: list[Launch]) -> None:
    asked = problem(head_dim, torch.bfloat16, 1.5, False)
    backend.precompile(asked, next(sizes.configs(asked, LIMITS[90])))
    kernel, arguments, options = next(x for x in launches if x[0].__name__ == "grad_query")
    compiled = compile_for(90, kernel, arguments, options)
    loops = 2  # over the entries that need no mask, and the others
    assert compiled.asm["ttir"].count("tt.dot ") == loops * products


def test_versions_name_what_results_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest of every file of the package, so that a change of any invalidates measurements."""
    assert backend.versions()["triton"] == triton.__version__
    source = Path(backend.__file__).parent
    copy = tmp_path / "triton"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(backend.resources, "files", lambda package: copy)
    digest = backend._source_digest.__wrapped__
    seen = {backend.versions()["kernels"]}
    assert digest() in seen
    for file in copy.rglob("*.py"):
        file.write_bytes(file.read_bytes() + b"\n")
        assert digest() not in seen, file
        seen.add(digest())


def test_triton_is_imported_only_when_used() -> None:
    """Neither the package nor asking a backend that cannot run here imports Triton."""
    program = """
import sys, torch
assert "triton" not in sys.modules
import adasplash2
adasplash2.available_backends()
query = torch.randn(1, 1, 8, 8)
adasplash2.entmax_attention(query, query, query)
sys.exit("triton" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class FakeKernel:
    """Stands for a kernel of Triton's, and for what it compiles."""

    arg_names = ("x", "SAFE")

    def __init__(self) -> None:
        self.described: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def look_up(*values: Any, **options: int) -> Any:
            self.described.append(values)
            return {(*grid, 1, 1): lambda *again: self.launched.append((values[1], *again))}

        return look_up


def test_a_launch_finds_the_kernel_compiled_for_its_flags() -> None:
    kernel, compiled = FakeKernel(), {}
    calls = [(1, False), (2, True), (3, False), (4, True)]
    for x, safe in calls:
        arguments = {"SAFE": safe, "x": x}
        launch.launch(
            launch.Launch(kernel, 7, arguments, {"num_warps": 4}, compiled, variant=(safe,))
        )
    assert kernel.described == calls[:2]
    assert kernel.launched == [(False, 3, False), (True, 4, True)]


def test_addresses_of_pieces_are_those_of_tensors() -> None:
    """None of which overlaps another one."""
    kinds = {"a": torch.float32, "none": torch.int32, "b": torch.int32, "c": torch.float32}
    lengths = {"a": 5, "none": 0, "b": 33, "c": 8}
    pieces = sizes.Pieces.of({name: (kinds[name], lengths[name]) for name in kinds})
    memory = torch.zeros(pieces.total, dtype=torch.uint8)
    tensors = pieces.tensors(memory)
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        assert (tensor.dtype, tensor.numel()) == (kinds[name], lengths[name])
        assert pieces.addresses(memory)[name] == tensor.data_ptr() or not tensor.numel()
        assert pieces.addresses(memory)[name] % sizes.ALIGNMENT == memory.data_ptr() % 16
        tensor.fill_(number)
    for number, tensor in enumerate(tensors.values(), 1):
        assert (tensor == number).all()


@pytest.mark.parametrize("asked", ["plain", "window", "added"])
def test_a_second_call_is_launched_with_addresses_of_the_same(
    asked: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Of all that kernels hand on to each other, with every configuration, and in the same memory;
    until kernels for tensors that lie otherwise are compiled, which take tensors, as do those that
    Triton has not compiled."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    made: list[tuple[Any, ...]] = []
    compiled: object = True

    def launched_so(asked: launch.Launch) -> None:
        made.append((asked.kernel, asked.grid, *asked.values))
        asked.compiled[id(asked.kernel), asked.variant] = compiled

    monkeypatch.setattr(launch, "launch", launched_so)
    launch.forget()
    request.addfinalizer(launch.forget)
    memory: list[Tensor] = []

    def empty(call: launch.Call, *shape: int, dtype: torch.dtype) -> Tensor:
        if next(turn) == len(memory):
            memory.append(torch.empty(shape, dtype=dtype))
        found = memory[last := next(again)]
        assert (found.shape, found.dtype) == (shape, dtype), last
        return found

    monkeypatch.setattr(launch.Call, "empty", empty)
    said, operands = ASKED.get(asked, ({}, ()))
    whole = dataclasses.replace(problem(64, torch.bfloat16, 1.5, True), operands=operands)
    whole = dataclasses.replace(whole, scores=dataclasses.replace(whole.scores, **said))
    full = 1, whole.heads_q, whole.length_q, whole.length_k
    mask = torch.zeros(full, dtype=torch.bfloat16) if asked == "added" else None
    rows = [torch.empty(1, heads, 1000, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    inputs = Inputs(*rows, attn_mask=mask)
    wanted = ["attn_mask"] if asked == "added" else []

    def launched(config: Any, inputs: Inputs) -> tuple[list[Any], bool]:
        """Kernels with their arguments, addresses for tensors; and whether there are pieces among
        them, tensors in memory that was made as bytes."""
        nonlocal turn, again
        turn, again = itertools.count(), itertools.count()
        made.clear()
        found = launch.forward(launch.Call(whole, inputs, config, launch.launch))
        call = launch.Call(whole, inputs, config, launch.launch, found.tau, found.saved, found.out)
        launch.backward(call, found.kept, found.out, wanted)
        flat = [tuple(flattened(value) for value in one) for one in made]
        bytes_ = {begin(one) for one in memory if one.dtype == torch.uint8}
        return flat, any(is_in(bytes_, value) for one in made for value in one)

    turn, again = itertools.count(), itertools.count()
    for config in list(sizes.configs(whole, LIMITS[90]))[:6]:
        memory.clear()
        first, second = launched(config, inputs), launched(config, inputs)
        assert first[0] == second[0]
        assert len(first[0]) >= 7
        assert (first[1], second[1]) == (True, False)
        launch.forget()
        compiled = None
        assert launched(config, inputs) == launched(config, inputs) == first
        compiled = True
        assert launched(config, inputs)[1]
        shifted = torch.empty(whole.batch, whole.length_k, whole.heads_kv, 64, dtype=torch.bfloat16)
        assert launched(config, inputs._replace(key=shifted.transpose(1, 2)))[1]


def flattened(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(flattened, value))
    if isinstance(value, Tensor):
        return value.data_ptr() if value.numel() else mock.ANY  # which lies nowhere
    return value


def begin(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_in(memory: set[int], value: Any) -> bool:
    """Whether it is, or holds, a tensor in one of these pieces of memory."""
    if isinstance(value, tuple):
        return any(is_in(memory, one) for one in value)
    return isinstance(value, Tensor) and begin(value) in memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 256])
@pytest.mark.parametrize("capability", LIMITS)
def test_the_bound_of_what_is_saved(
    monkeypatch: pytest.MonkeyPatch, capability: int, head_dim: int, dtype: torch.dtype
) -> None:
    """For every configuration, and the same where the shapes are symbols."""
    monkeypatch.setattr(backend, "_limits", lambda device: LIMITS[capability])
    gpu = torch.device("cuda")
    asked = dataclasses.replace(problem(head_dim, dtype, 1.5, True), device=gpu)
    totals = [sizes.Saved(asked, c).total for c in sizes.configs(asked, LIMITS[capability])]
    assert backend.saved_bound(asked) == max(totals)
    symbolic = backend.saved_bound(with_symbols(asked))
    assert isinstance(symbolic, torch.SymInt)
    assert symbolic.node.hint == max(totals)
    assert backend.saved_bound(dataclasses.replace(asked, device=torch.device("cpu"))) == 0


@pytest.mark.parametrize(
    ("dtype", "head_dim", "alpha", "most"),
    [
        *((torch.bfloat16, 64, 1.5, 128), (torch.float16, 128, 1.25, 512)),
        *((torch.float32, 64, 1.5, 256), (torch.bfloat16, 64, 3.0, 256)),
        (torch.bfloat16, 8, 1.5, 32),
    ],
)
def test_what_a_row_keeps_for_the_backward(
    dtype: torch.dtype, head_dim: int, alpha: float, most: int
) -> None:
    """As many bytes as its output, and thresholds and lists. All layers of a model keep them at
    once, and a compiled one reserves as much for whichever backend runs."""
    length = 8192
    asked = dataclasses.replace(
        problem(head_dim, dtype, alpha, True), length_q=length, length_k=length
    )
    config = next(sizes.configs(asked, LIMITS[90]))
    rows = asked.heads_q * length
    assert sizes.Saved(asked, config).total < rows * (most + 54) + 4096


@pytest.mark.parametrize("asked", ["ranges", "added", "window"])
def test_the_bound_of_what_is_saved_where_rows_see_other_than_leading_keys(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(backend, "_limits", lambda device: LIMITS[90])
    said, operands = ASKED[asked]
    plain = problem(64, torch.bfloat16, 1.5, False)
    whole = dataclasses.replace(
        plain,
        device=torch.device("cuda"),
        scores=dataclasses.replace(plain.scores, **said),
        operands=operands,
    )
    assert sizes.is_scattered(whole)
    totals = [sizes.Saved(whole, c).total for c in sizes.configs(whole, LIMITS[90])]
    assert backend.saved_bound(whole) == max(totals)
    assert backend.saved_bound(with_symbols(whole)).node.hint == max(totals)


def test_what_is_saved_may_be_longer_but_not_shorter() -> None:
    asked = problem(64, torch.bfloat16, 1.5, True)
    layout = sizes.Saved(asked, next(sizes.configs(asked, LIMITS[90])))
    exact, longer = (torch.zeros(layout.total + n, dtype=torch.uint8) for n in (0, 100))
    assert layout.check(exact) is exact
    assert layout.check(longer) is longer
    with pytest.raises(ValueError, match=f"saved must have {layout.total} bytes"):
        layout.check(exact[:-1])


@pytest.mark.parametrize("stride", [64, launch.LONGEST_STRIDE, launch.LONGEST_STRIDE + 1, 1 << 30])
def test_strides_beyond_32_bits_are_copied(stride: int) -> None:
    """A tile's offsets are 32 bits wide. Nothing is in memory here, only shapes."""
    asked = problem(64, torch.bfloat16, 1.5, True)
    size = (1, 4, 1000, 64)
    rows = torch.empty_strided(
        size, (1000 * stride, 0, stride, 1), dtype=asked.dtype, device="meta"
    )
    inputs = Inputs(*(torch.empty(size, dtype=asked.dtype, device="meta") for _ in range(3)))
    config = next(sizes.configs(asked, LIMITS[90]))
    with mock.patch.object(launch, "multiprocessors", return_value=132):
        call = launch.Call(asked, inputs._replace(key=rows), config, launch.compile_only)
    block = max(int(config["block_q"]), sizes.SPANS[-1] * int(config["block_k"]))
    for prepared in (call.inputs[1], call.prepared(rows)):
        assert prepared.stride(2) * block < 2**31
        assert (prepared.stride() == rows.stride()) == (stride <= launch.LONGEST_STRIDE)


def test_kernels_are_kept_by_layout_of_the_tensors() -> None:
    p = problem(64, torch.bfloat16, 1.5, True)
    config = next(sizes.configs(p, LIMITS[90]))
    with mock.patch.object(launch, "multiprocessors", return_value=132):
        plan = launch._plan(p, tuple(config.items()))
    whole = torch.zeros(1, 4, 1000, 72, dtype=torch.bfloat16)
    views = [whole[..., :64], whole[..., 1:65], whole[..., 8:], whole[:, :, ::2, :64]]
    found = [plan.compiled_for([view]) for view in views]
    assert found[0] is found[2]  # both start on 16 bytes
    assert len({id(kept) for kept in found}) == 3


def test_kernels_are_kept_while_a_cache_grows() -> None:
    """Those of one token are those of the next, unless Triton compiles for a stride."""

    def found(length: int, width: int = 64, **more: Any) -> launch.Compiled:
        p = decoding(length, head_dim=64, **more)
        plan = launch._plan(p, tuple(next(sizes.decoding_configs(p, LIMITS[90])).items()))
        return plan.compiled_for([torch.empty(2, length, width, device="meta")[..., :64]])

    first = found(17_000)
    assert found(17_001) is first
    assert found(17_000, heads_q=4) is not first
    assert found(17_000, dtype=torch.float16) is not first
    assert found(17_000, width=65) is not first
    assert found(17_001, width=65) is not found(17_008, width=65)
    assert found(2**25, width=64) is not first

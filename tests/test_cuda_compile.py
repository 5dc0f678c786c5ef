"""Every kernel of the CUDA backend compiles, without a GPU, and the hot ones spill nothing."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("cupy", reason="CuPy is not installed: nothing to compile with")

from adasplash2 import cache
from adasplash2.backends import cuda
from adasplash2.backends.cuda import compile as compiler
from adasplash2.backends.cuda import launch, plan, sizes
from adasplash2.problem import Inputs, RowProblem, attention_problem

HOT = {
    "scan.cu": {"scan"},
    "elements.cu": {"output", "count_columns", "prefix_columns", "grad_rows", "grad_columns",
                    "grad_long_columns"},
    "rows.cu": {"entmax_rows", "entmax_rows_grad"},
}  # fmt: skip
COLD = {"dense.cu": {"dense_output", "dense_grad_rows", "dense_grad_columns"}}
KERNELS = HOT | COLD
FEW_SPILLS = 64
"""Bytes a thread that kernels may spill which are not hot: those for flat rows, and all kernels of
an alpha without a closed form."""
GENERAL_ALPHA = 2

SHARED = {
    "sm_80": sizes.SharedMemory(166_912, 167_936),
    "sm_90": sizes.SharedMemory(232_448, 233_472),
    "sm_100": sizes.SharedMemory(232_448, 233_472),
    "sm_120": sizes.SharedMemory(101_376, 102_400),
}


class Usage(NamedTuple):
    spilled: int
    registers: int


def usage(log: str) -> dict[str, Usage]:
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {
        kernel: Usage(int(spilled), int(registers))
        for kernel, spilled, registers in re.findall(pattern, log, re.DOTALL)
    }


def variants() -> list[tuple[str, int, int, int]]:
    """Architecture, dtype code, head_dim, alpha code."""
    everything = [
        ("sm_90", dtype, head_dim, (dtype + index) % 3)
        for dtype in range(3)
        for index, head_dim in enumerate((16, 64, 128, 256))
    ]
    others = [
        (arch, 0, head_dim, 0) for arch in SHARED if arch != "sm_90" for head_dim in (64, 128)
    ]
    return everything + others


@pytest.mark.parametrize(("arch", "dtype", "head_dim", "alpha"), variants())
@pytest.mark.parametrize("unit", KERNELS)
def test_compiles_without_spills(
    unit: str, arch: str, dtype: int, head_dim: int, alpha: int
) -> None:
    scan = sizes.portable_scan(head_dim, 4 if dtype == 2 else 2)
    capacity = scan.capacity(SHARED[arch])
    if capacity is None:
        pytest.skip("refused: too little shared memory for such queries and keys")
    defines = {
        "DTYPE": dtype,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim,
        "ALPHA": alpha,
        "CAUSAL": int(head_dim != 16),
        "ALIGNED": int(head_dim != 16),
        "CAPACITY": capacity,
    }
    compiled = compiler.compile_unit(unit, defines, arch)
    found = usage(compiled.log)
    print(f"\n{unit} {arch} {defines}: {found}")
    assert compiled.cubin[:4] == b"\x7fELF"
    assert set(found) == KERNELS[unit]
    limit = 0 if unit in HOT and alpha != GENERAL_ALPHA else FEW_SPILLS
    assert {k: u.spilled for k, u in found.items() if u.spilled > limit} == {}


HOPPER = [
    *(
        (plan.HOPPER_SHAPES[0], head_dim, alpha)
        for head_dim in (16, 64, 80, 128)
        for alpha in range(3)
    ),
    *((shape, head_dim, 0) for shape in plan.HOPPER_SHAPES[1:] for head_dim in (64, 128)),
    *((plan.RETRY_SHAPE, head_dim, alpha) for head_dim, alpha in ((64, 0), (128, 1), (128, 2))),
]


@pytest.mark.parametrize(("shape", "head_dim", "alpha"), HOPPER)
def test_the_hopper_scan_spills_nothing(shape: tuple[int, int], head_dim: int, alpha: int) -> None:
    scan = sizes.hopper_scan(head_dim, *shape, retry=shape == plan.RETRY_SHAPE)
    capacity = scan.capacity(SHARED["sm_90"])
    assert capacity is not None
    # Survivors that a row may keep: what two strips, and what one of them may add, leave of the
    # memory. Rows of 64 stay in the lists of the default, all of 240 in those of the second look.
    entries = capacity - 2 * 1152 / 512 - 4
    least = {plan.HOPPER_SHAPES[0]: 64, plan.RETRY_SHAPE: 240}
    assert 4 * entries >= least.get(shape, 48)
    defines = {
        "DTYPE": alpha % 2,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim,
        "ALPHA": alpha,
        "CAUSAL": int(head_dim != 16),
        "ALIGNED": 1,
        "CAPACITY": capacity,
        **dict(scan.defines),
    }
    log = compiler.compile_unit("scan90.cu", defines, "sm_90a").log
    found = usage(log)
    print(f"\nscan90.cu {defines}: {found}")
    assert set(found) == {"scan"}
    assert found["scan"].spilled <= (FEW_SPILLS if alpha == GENERAL_ALPHA else 0)
    assert "serialized" not in log  # what ptxas says where it makes wgmma wait


def test_an_error_carries_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**compiler.sources(), "rows.cu": "this is not CUDA"}
    monkeypatch.setattr(compiler, "sources", lambda: broken)
    with pytest.raises(compiler.CompileError, match=r"rows\.cu\(1\): error"):
        compiler.compile_unit("rows.cu", {}, "sm_90")


# The disk cache


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[str]:
    """A cache folder of its own and a compiler that counts what it is asked for."""
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    asked: Counter[str] = Counter()

    def compile_unit(unit: str, defines: dict[str, int], arch: str) -> compiler.Compiled:
        asked[unit] += 1
        return compiler.Compiled(f"{unit} {defines} {arch}".encode(), "")

    monkeypatch.setattr(compiler, "compile_unit", compile_unit)
    return asked


def test_a_unit_is_compiled_once(compiled: Counter[str]) -> None:
    path = compiler.cubin_path("rows.cu", {"DTYPE": 0}, "sm_90")
    assert path.read_bytes() == b"rows.cu {'DTYPE': 0} sm_90"
    assert compiler.cubin_path("rows.cu", {"DTYPE": 0}, "sm_90") == path
    assert compiled == {"rows.cu": 1}
    others = [({"DTYPE": 1}, "sm_90"), ({"DTYPE": 0}, "sm_80")]
    assert path not in {compiler.cubin_path("rows.cu", *other) for other in others}
    assert compiled == {"rows.cu": 3}


def test_changed_sources_are_compiled_anew(
    compiled: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compiler.cubin_path("rows.cu", {}, "sm_90")
    monkeypatch.setattr(compiler, "sources_hash", lambda: "another")
    assert compiler.cubin_path("rows.cu", {}, "sm_90") != before
    assert compiled == {"rows.cu": 2}


@pytest.mark.parametrize("keep", [0, 5])
def test_a_cut_off_cubin_is_compiled_anew(compiled: Counter[str], keep: int) -> None:
    path = compiler.cubin_path("rows.cu", {}, "sm_90")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.warns(RuntimeWarning, match="damaged"):
        again = compiler.cubin_path("rows.cu", {}, "sm_90")
    assert again.read_bytes() == whole
    assert compiled == {"rows.cu": 2}


def test_a_cache_that_takes_no_cubin_costs_a_warning(
    compiled: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels") as told:
        paths = [compiler.cubin_path("rows.cu", {}, arch) for arch in ("sm_80", "sm_90")]
    assert len(told) == 1
    assert [path.read_bytes() for path in paths] == [b"rows.cu {} sm_80", b"rows.cu {} sm_90"]
    assert compiled == {"rows.cu": 2}


def test_versions_hold_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict(cuda.versions())
    assert set(found) == {"cupy", "nvrtc", "kernels"}
    monkeypatch.setattr(compiler, "sources_hash", lambda: "another" * 5)
    assert cuda.versions()["kernels"] != found["kernels"]


@pytest.mark.gpu
@pytest.mark.parametrize("needs_grad", [False, True])
def test_precompile_leaves_nothing_to_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needs_grad: bool
) -> None:
    """In a width that no other test uses, so that nothing is loaded yet in this process."""
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path))
    query, key, value, grad = torch.randn(
        (4, 1, 2, 200, 72 if needs_grad else 88), device="cuda", dtype=torch.bfloat16
    )
    inputs = Inputs(query, key, value)
    options = {"alpha": 1.5, "scale": None, "is_causal": True, "enable_gqa": False}
    problem = attention_problem(inputs, **options, needs_grad=needs_grad)
    rows = RowProblem(4, 50, torch.bfloat16, query.device, 1.7, needs_grad)
    config = cuda.configs(problem)[0]
    cuda.precompile(problem, config)
    cuda.precompile(rows, cuda.configs(rows)[0])

    def refuse(unit: str, defines: dict[str, int], arch: str) -> compiler.Compiled:
        raise AssertionError(f"{unit} is compiled with {defines}")

    monkeypatch.setattr(compiler, "compile_unit", refuse)
    result = cuda.forward(problem, inputs, config)
    if needs_grad:
        cuda.backward(problem, inputs, result, grad, config)
    cuda.rows_forward(rows, torch.randn(4, 50, device="cuda", dtype=torch.bfloat16), {})
    assert result.out.isfinite().all()


def test_the_argument_of_a_call_has_the_bytes_of_its_fields() -> None:
    tensor = torch.zeros(2, 3, 8, 64)
    fields = {
        "q": launch.view(tensor),
        "grad_v": launch.view(tensor.transpose(1, 2)),
        "tau": tensor,
        "long_parts": 2**40 + 8,
    }
    constants = launch.params({"length_q": 7, "c": 0.5, "r": 2.0})
    found = launch.call_argument(fields, constants)
    expected = launch.argument(launch.params(fields, constants))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    # Bytes between fields are anything.
    assert found.view(launch.PARAMS) == expected.view(launch.PARAMS)
    assert found.view(launch.PARAMS)["long_parts"] == 2**40 + 8
    assert found.flags.writeable


def test_what_the_copy_engine_takes() -> None:
    """Rows on 16 bytes; heads that are all the same one, but not rows."""
    keys = torch.zeros(2, 3, 8, 64, dtype=torch.bfloat16)
    assert launch.is_aligned(keys, keys[:, :1].expand(-1, 3, -1, -1), keys.transpose(1, 2))
    assert not launch.is_aligned(keys[:, :, :1].expand(-1, -1, 8, -1))
    assert not launch.is_aligned(keys[..., 1:33])

"""Every kernel of the CUDA backend compiles, without a GPU, and the hot ones spill nothing."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

pytest.importorskip("cupy", reason="CuPy is not installed: nothing to compile with")

from adasplash2.backends.cuda import compile as compiler
from adasplash2.backends.cuda import sizes

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
    "sm_80": (166_912, 167_936),
    "sm_90": (232_448, 233_472),
    "sm_100": (232_448, 233_472),
    "sm_120": (101_376, 102_400),
}
"""Shared memory that a block may ask for, and that a multiprocessor has."""


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
    capacity = sizes.scan_capacity(head_dim, 4 if dtype == 2 else 2, *SHARED[arch])
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


def test_an_error_carries_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**compiler.sources(), "rows.cu": "this is not CUDA"}
    monkeypatch.setattr(compiler, "sources", lambda: broken)
    with pytest.raises(compiler.CompileError, match=r"rows\.cu\(1\): error"):
        compiler.compile_unit("rows.cu", {}, "sm_90")

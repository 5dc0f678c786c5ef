"""Every kernel of the CUDA backend compiles, without a GPU, and the hot ones spill nothing."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

pytest.importorskip("cupy", reason="CuPy is not installed: nothing to compile with")

from adasplash2 import torch_fastpath
from adasplash2.backends import cuda
from adasplash2.backends.cuda import attention, configurations, decoding, driver, layout, sizes
from adasplash2.backends.cuda import compile as compiler
from adasplash2.problem import (
    Inputs,
    Operand,
    Problem,
    RowProblem,
    ScoreTransform,
    attention_problem,
)

HOT = {
    "scan.cu": {"scan"},
    "elements.cu": {"check_finite", "output", "count_columns", "prefix_columns", "grad_rows",
                    "grad_columns", "sort_long_columns", "grad_long_columns"},
    "rows.cu": {"entmax_rows", "entmax_rows_grad"},
}  # fmt: skip
COLD = {
    "dense.cu": {"dense_output", "dense_grad_rows", "dense_grad_columns"},
    "exact.cu": {"exact_output", "exact_grad_rows", "exact_grad_columns"},
}
KERNELS = HOT | COLD
FEW_SPILLS = 64
"""Bytes a thread that kernels may spill which are not hot: those for flat rows, and all kernels of
an alpha without a closed form."""
ALPHAS = 1.5, 2.0, 1.25
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


def kind(
    dtype: int, head_dim: int, head_dim_v: int, alpha: int, *, causal: bool, aligned: bool = True
) -> dict[str, int]:
    return sizes.kind_defines(
        list(layout.DTYPE_CODES)[dtype],
        head_dim,
        head_dim_v,
        ALPHAS[alpha],
        causal=causal,
        aligned=aligned,
    )


def variants() -> list[tuple[str, int, int, int]]:
    """Architecture, dtype code, head_dim, index of an alpha."""
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
    itemsize = 4 if dtype == 2 else 2
    scan = sizes.portable_scan(head_dim, itemsize)
    capacity = scan.capacity(SHARED[arch])
    if capacity is None:
        pytest.skip("refused: too little shared memory for such queries and keys")
    defines = kind(dtype, head_dim, head_dim, alpha, causal=head_dim != 16, aligned=head_dim != 16)
    if unit == "scan.cu":
        defines |= scan.defines_for(capacity)
    if unit in COLD:
        defines |= sizes.portable_dense(head_dim, head_dim, itemsize).defines
    compiled = compiler.compile_unit(unit, defines, arch)
    found = usage(compiled.log)
    print(f"\n{unit} {arch} {defines}: {found}")
    assert compiled.cubin[:4] == b"\x7fELF"
    assert set(found) == KERNELS[unit]
    limit = 0 if unit in HOT and alpha != GENERAL_ALPHA else FEW_SPILLS
    assert {k: u.spilled for k, u in found.items() if u.spilled > limit} == {}


HOPPER = [
    *(
        (configurations.HOPPER_SHAPES[0], head_dim, alpha)
        for head_dim in (16, 64, 80, 128)
        for alpha in range(3)
    ),
    *((shape, head_dim, 0) for shape in configurations.HOPPER_SHAPES[1:] for head_dim in (64, 128)),
    *(
        (configurations.RETRY_SHAPE, head_dim, alpha)
        for head_dim, alpha in ((64, 0), (128, 1), (128, 2))
    ),
]


@pytest.mark.parametrize(("shape", "head_dim", "alpha"), HOPPER)
def test_the_hopper_scan_spills_nothing(shape: tuple[int, int], head_dim: int, alpha: int) -> None:
    scan = sizes.hopper_scan(head_dim, *shape, retry=shape == configurations.RETRY_SHAPE)
    capacity = scan.capacity(SHARED["sm_90"])
    assert capacity is not None
    # Survivors that a row may keep: what two staging blocks, and what one may add, leave of the
    # memory. Rows of 64 stay in the lists of the default, all of 240 in those of the second look.
    pair = 2 * layout.LIST_ENTRY_BYTES  # of a lane's two rows, as a staging block is
    staging = layout.MIN_STAGING_BLOCKS * layout.STAGING_LANE_BYTES / pair
    entries = capacity - staging - layout.STAGING_APPEND
    least = {configurations.HOPPER_SHAPES[0]: 64, configurations.RETRY_SHAPE: 240}
    assert layout.LIST_LANES * entries >= least.get(shape, 48)
    defines = kind(alpha % 2, head_dim, head_dim, alpha, causal=head_dim != 16)
    defines |= scan.defines_for(capacity)
    log = compiler.compile_unit("scan90.cu", defines, "sm_90a").log
    found = usage(log)
    print(f"\nscan90.cu {defines}: {found}")
    assert set(found) == {"scan"}
    assert found["scan"].spilled <= (FEW_SPILLS if alpha == GENERAL_ALPHA else 0)
    assert "serialized" not in log  # what ptxas says where it makes wgmma wait


HOPPER_DENSE = [
    (64, 64, 1025, 0, layout.OUTPUT_SAVES),
    (64, 64, 1024, 0, layout.OUTPUT_SAVES),
    (64, 64, 1024, 0, layout.OUTPUT_PLAIN),
    (64, 64, 1025, 0, layout.OUTPUT_PLAIN),
    (64, 64, 1025, 1, layout.OUTPUT_PLAIN),
    (32, 64, 1000, 1, layout.OUTPUT_PLAIN),
    (128, 128, 1024, 0, layout.OUTPUT_PLAIN),
    (128, 128, 4096, 1, layout.OUTPUT_SAVES),
    (16, 128, 4096, 1, layout.OUTPUT_COUNTS),
    (128, 80, 4096, 0, layout.OUTPUT_COUNTS),
]
OUTPUT, GRADS = {"dense_output"}, {"dense_grad_rows", "dense_grad_columns"}


@pytest.mark.parametrize(("unit", "kernels"), [("output", OUTPUT), ("grad", GRADS)])
@pytest.mark.parametrize(("head_dim", "head_dim_v", "length_k", "alpha", "output"), HOPPER_DENSE)
def test_the_hopper_tiles_spill_nothing(
    head_dim: int,
    head_dim_v: int,
    length_k: int,
    alpha: int,
    output: int,
    unit: str,
    kernels: set[str],
) -> None:
    dense = sizes.hopper_dense(head_dim, head_dim_v, length_k)
    assert max(dense.shared.values()) + sizes.RESERVED_SHARED < SHARED["sm_90"].per_block
    defines = kind(alpha % 2, head_dim, head_dim_v, alpha, causal=output % 2 == 1)
    defines |= {**dense.defines, "OUTPUT": output}
    log = compiler.compile_unit(f"dense90_{unit}.cu", defines, "sm_90a").log
    assert set(usage(log)) == kernels
    assert {k: u.spilled for k, u in usage(log).items() if u.spilled} == {}
    assert set(re.findall(r"(\d+) bytes stack frame", log)) == {"0"}
    assert "serialized" not in log


@pytest.mark.parametrize("tiles", [1, 131, 132, 133, 2048, 8448, 8449, 12_288, 12_289, 100_000])
def test_tiles_are_distributed(tiles: int) -> None:
    dense = sizes.hopper_dense(64, 64, 1024)
    blocks = dense.blocks(tiles, multiprocessors=132)
    assert min(tiles, 132) <= blocks <= tiles
    if blocks < tiles:  # a thread has a bit for each that it looks at, a block a list of its own
        assert -(-tiles // dense.threads) <= layout.DISTRIBUTED_TILES <= 32
        assert -(-tiles // blocks) <= layout.MOST_TILES


# Few queries

DECODED = [  # dtype code, head_dim, index of an alpha, rows that share keys, whether in pages
    ("sm_90a", 0, 128, 0, 4, False),
    ("sm_90a", 0, 64, 1, 64, True),
    ("sm_90a", 0, 128, 0, 16, False),
    ("sm_90a", 0, 256, 0, 8, False),  # its columns are loaded in turn
    ("sm_80", 2, 64, 2, 8, False),
]


@pytest.mark.parametrize(("arch", "dtype", "head_dim", "alpha", "rows", "paged"), DECODED)
def test_decoding_spills_nothing(
    arch: str, dtype: int, head_dim: int, alpha: int, rows: int, paged: bool
) -> None:
    block = sizes.decode(rows, head_dim, 4 if dtype == 2 else 2, SHARED[arch.removesuffix("a")])
    assert block is not None
    defines = kind(dtype, head_dim, head_dim, alpha, causal=False) | block.defines
    log = compiler.compile_unit("decode.cu", defines | {"PAGED": int(paged)}, arch).log
    found = usage(log)
    print(f"\ndecode.cu {defines}: {found}")
    assert set(found) == {"decode_scan", "decode_solve", "decode_weigh"}
    assert {k: u.spilled for k, u in found.items() if u.spilled} == {}
    registers = found["decode_scan"].registers
    assert registers * block.residents * block.threads <= sizes.REGISTER_FILE


def test_every_block_of_few_queries_fits() -> None:
    for memory in SHARED.values():
        for itemsize in (2, 4):
            for head_dim in (1, 40, 64, 128, 256):
                for rows in (1, 9, 64, 1000):
                    block = sizes.decode(rows, head_dim, itemsize, memory)
                    assert block is not None, (memory, itemsize, head_dim, rows)
                    assert block.shared + block.static <= memory.per_block
                    used = block.residents * (block.shared + block.static + sizes.RESERVED_SHARED)
                    assert used <= memory.per_multiprocessor
                    assert block.held >= min(rows, layout.DECODE_ROW_TILE)
                    assert block.tiles >= sizes.DECODE_WARPS or head_dim == 256


@pytest.mark.parametrize(
    ("blocks", "keys", "splits"),
    [(8, 131_072, 33), (8, 1024, 8), (128, 131_072, 20), (1000, 4096, 5), (1, 1, 1)],
)
def test_splits_keep_the_device_busy(blocks: int, keys: int, splits: int) -> None:
    block = sizes.decode(4, 128, 2, SHARED["sm_90"])
    assert block is not None
    assert block.splits(blocks, keys, 132) == splits


@pytest.mark.parametrize("keys", [1, 2**18, 2**20 + 1, 2**27 + 5])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_split_fits_into_shared_memory(rows: int, keys: int) -> None:
    """And a part, which is no more, counts its keys in 16 bits."""
    for name, memory in SHARED.items():
        block = sizes.decode(rows, 128, 2, memory)
        assert block is not None
        for blocks in (1, 128, 100_000):
            each = block.row_scores(keys, block.splits(blocks, keys, 132))
            assert block.fixed + 4 * block.held * each <= block.shared, name
            assert each - 4 <= layout.DECODE_PART


MASKS = "kCausal", "ADASPLASH2_CAUSAL", "p.left", "p.ranges", "p.poison"
SIGN = "p.q_sign", "0x80008000u"


@pytest.mark.parametrize("name", MASKS + SIGN)
def test_masks_and_the_sign_are_named_in_one_file(name: str) -> None:
    kernels = {file: text for file, text in compiler.sources().items() if file != "layout.cuh"}
    assert [file for file, text in kernels.items() if name in text] == ["score.cuh"]


FIELDS = [
    ("int row_blocks;", "long long row_blocks;"),  # the size, and what follows
    ("float* tau;", "float tau;"),
    ("View o;", "float* o;"),
    ("long long row;", "int row;"),
    ("float factor;", "double factor;"),
    ("int rows;", "long long rows;"),
]


@pytest.mark.parametrize(("given", "changed"), FIELDS)
def test_a_field_of_another_type_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, given: str, changed: str
) -> None:
    """The compiler holds every struct to the size and the offsets that Python packs."""
    source = layout.header()
    assert given in source
    files = {**compiler.sources(), "layout.cuh": source.replace(given, changed, 1)}
    monkeypatch.setattr(compiler, "sources", lambda: files)
    with pytest.raises(compiler.CompileError, match="static assertion failed"):
        compiler.compile_unit("rows.cu", kind(0, 16, 16, 0, causal=False), "sm_90")


STRUCTS = [
    layout.Params, layout.RowParams, layout.DecodeParams, layout.RowStart, layout.Terms,
    layout.Part
]  # fmt: skip


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_field_is_held_to_its_offset(
    struct: type[ctypes.Structure | ctypes.Union],
) -> None:
    source = layout.header()
    assert f"static_assert(sizeof({struct.__name__}) == {ctypes.sizeof(struct)});" in source
    for name, *_ in struct._fields_:
        at = getattr(struct, name)
        assert f"ASSERT_FIELD({struct.__name__}, {name}, {at.offset}, {at.size});" in source


def test_an_integer_that_does_not_fit_its_field_is_refused() -> None:
    with pytest.raises(OverflowError, match="length_q = 2147483648 does not fit Params"):
        driver.params({"length_q": 2**31})


def test_an_error_carries_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**compiler.sources(), "rows.cu": "this is not CUDA"}
    monkeypatch.setattr(compiler, "sources", lambda: broken)
    with pytest.raises(compiler.CompileError, match=r"rows\.cu\(1\): error"):
        compiler.compile_unit("rows.cu", {}, "sm_90")


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
    asked = attention_problem(inputs, **options, needs_grad=needs_grad)
    rows = RowProblem(4, 50, torch.bfloat16, query.device, 1.7, needs_grad)
    config = cuda.configs(asked)[0]
    cuda.precompile(asked, config)
    cuda.precompile(rows, cuda.configs(rows)[0])

    def refuse(unit: str, defines: dict[str, int], arch: str) -> compiler.Compiled:
        raise AssertionError(f"{unit} is compiled with {defines}")

    monkeypatch.setattr(compiler, "compile_unit", refuse)
    result = cuda.forward(asked, inputs, config)
    if needs_grad:
        cuda.backward(asked, inputs, result.kept, grad, config)
    cuda.rows_forward(rows, torch.randn(4, 50, device="cuda", dtype=torch.bfloat16), {})
    assert result.out.isfinite().all()


# Launches, without a driver


class Driver:
    """What the driver is asked, and what it would read while it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.blocks: list[bytes] = []
        self.maps: list[bytes] = []
        self.status = 0

    def cuCtxPushCurrent_v2(self, context: int) -> int:  # noqa: N802
        self.asked.append(("push", context))
        return 0

    def cuCtxPopCurrent_v2(self, _: None) -> int:  # noqa: N802
        self.asked.append(("pop",))
        return 0

    def cuFuncSetAttribute(self, *arguments: int) -> int:  # noqa: N802
        self.asked.append(("attribute", *arguments))
        return self.status

    def cuMemsetD8Async(self, *arguments: int) -> int:  # noqa: N802
        self.asked.append(("zero", *arguments))
        return self.status

    def cuLaunchKernel(self, *arguments: Any) -> int:  # noqa: N802
        *place, parameters, _ = arguments
        self.asked.append(("launch", *place))
        has_map = place[1] == MAPPED
        block, *maps = (ctypes.c_void_p * (1 + has_map)).from_address(parameters)
        self.blocks.append(ctypes.string_at(block, ctypes.sizeof(layout.Params)))
        self.maps += (ctypes.string_at(one, 128) for one in maps)
        return self.status

    def cuLaunchKernelEx(  # noqa: N802
        self, config: int, function: int, parameters: int, extra: None
    ) -> int:
        how = driver.LaunchConfig.from_address(config)
        self.cuLaunchKernel(
            function, *how.grid, *how.block, how.shared_bytes, how.stream, parameters, extra
        )
        for number in range(how.attribute_count):
            attribute = how.attributes[number]
            self.asked[-1] = ("overlap", *self.asked[-1][1:], attribute.id, attribute.value[0])
        return self.status

    def cuTensorMapEncodeTiled(self, address: int, *_: object) -> int:  # noqa: N802
        assert address % 64 == 0
        ctypes.memset(address, 7, 128)
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:  # noqa: N802
        name._obj.value = b"CUDA_ERROR_STUB"
        return 0


MAPPED = 77
"""Blocks of the launch that has a tensor map."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(driver, "context", lambda device: 100 + device)
    monkeypatch.setattr(torch_fastpath, "_raw_stream", lambda device: 200 + device)
    return found


def kernel(shared_bytes: int = 0, may_overlap: bool = False) -> driver.Kernel:
    module = SimpleNamespace(get_function=lambda name: SimpleNamespace(ptr=300))
    return driver.Kernel(module, "scan", shared_bytes, may_overlap)


def test_a_launch_passes_the_bytes_of_its_fields(fake: Driver) -> None:
    tensor = torch.zeros(2, 3, 8, 64, dtype=torch.bfloat16)
    swapped = tensor.transpose(1, 2)
    constants = driver.params({"length_q": 7, "c": 0.5, "r": 2.0})
    call = driver.Call(3, driver.words(constants))
    call.put_view("q", tensor)
    call.put_view("grad_v", swapped)
    call.put_pointer("tau", tensor)
    call.put_parts(tensor, driver.places({"rows": 0, "long_parts": 2**40}))
    with call:
        call.fill(64, 5)
        kernel()((6, 2), 32, (), call)
        kernel(1000)((MAPPED, 1), 64, (("q", 128),), call)
    assert fake.asked == [
        ("push", 103),
        ("zero", 64, 0, 5, 203),
        ("launch", 300, 6, 2, 1, 32, 1, 1, 0, 203),
        ("attribute", 300, 8, 1000),
        ("launch", 300, MAPPED, 1, 1, 64, 1, 1, 1000, 203),
        ("pop",),
    ]
    at = tensor.data_ptr()
    expected = layout.Params.from_buffer_copy(constants)
    expected.q = (at, *tensor.stride()[:3])
    expected.grad_v = (at, *swapped.stride()[:3])
    expected.tau, expected.rows, expected.long_parts = at, at, at + 2**40
    assert fake.blocks == [bytes(expected)] * 2
    assert fake.maps == [b"\7" * 128]


def test_kernels_overlap_those_of_their_own_call(fake: Driver) -> None:
    """What else is on the stream does not know of it: what follows that waits for its end."""
    found = kernel(may_overlap=True)
    for _ in "ab":
        with driver.Call(3, driver.words(driver.params({}))) as call:
            found((6, 2), 32, (), call)
            found((MAPPED - 1, 2), 64, (), call)
            call.fill(64, 5)
            found((6, 2), 32, (), call)
            kernel()((6, 2), 32, (), call)
    asked = [("launch", 300, 6, 2, 1, 32, 1, 1, 0, 203), ("zero", 64, 0, 5, 203)]
    overlap = ("overlap", 300, MAPPED - 1, 2, 1, 64, 1, 1, 0, 203, 6, 1)
    once = [("push", 103), asked[0], overlap, asked[1], asked[0], asked[0], ("pop",)]
    assert fake.asked == once * 2


def test_drivers_before_11_8_take_launches_by_numbers(
    fake: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with driver.Call(3, driver.words(driver.params({}))) as call:
        kernel()((6, 2), 32, (), call)
        monkeypatch.delattr(Driver, "cuLaunchKernelEx")
        kernel()((6, 2), 32, (), call)
    assert fake.asked[1] == fake.asked[2] == ("launch", 300, 6, 2, 1, 32, 1, 1, 0, 203)


@pytest.mark.parametrize(
    ("capability", "version", "overlaps"),
    [
        ((9, 0), 13_000, True),
        ((12, 0), 12_030, True),
        ((8, 9), 13_000, False),
        ((9, 0), 12_020, False),
    ],
)
def test_where_kernels_overlap(
    capability: tuple[int, int],
    version: int,
    overlaps: bool,
    fake: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get_version(to: Any) -> int:
        to._obj.value = version
        return 0

    monkeypatch.setattr(fake, "cuDriverGetVersion", get_version, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert driver.may_overlap.__wrapped__(0) == overlaps


def test_launch_structs_are_those_of_the_driver() -> None:
    """Offsets of ``CUlaunchConfig`` and ``CUlaunchAttribute`` in cuda.h."""
    config, attribute = driver.LaunchConfig, driver.LaunchAttribute
    assert [config.block.offset, config.shared_bytes.offset, config.stream.offset] == [12, 24, 32]
    assert [config.attributes.offset, config.attribute_count.offset] == [40, 48]
    assert [ctypes.sizeof(config), attribute.value.offset, ctypes.sizeof(attribute)] == [56, 8, 72]


BEGINNINGS = re.compile(r"__global__ void __launch_bounds__\(.*?\)\s+(\w+)\([^{]*\{\n  (\w+)\(\);")
LAST = {"exact_output", "exact_grad_columns", "decode_weigh"}
"""Of the kernels of a call."""


def test_kernels_begin_by_waiting_for_those_before() -> None:
    """Also those that read nothing: who waits for the last one waits for all. What comes after a
    call waits for its last one to end, as for any kernel."""
    for unit, source in compiler.sources().items():
        if not unit.endswith(".cu") or unit == "rows.cu":  # one kernel a call
            continue
        found = dict(BEGINNINGS.findall(source))
        assert len(found) == source.count("__global__"), unit
        for name, first in found.items():
            last = name in LAST
            assert first == ("await_kernels_before" if last else "start_next_and_await"), name


def test_a_call_holds_the_maps_that_its_kernels_read(fake: Driver) -> None:
    """Whatever becomes of the cache that they come from."""
    call = driver.Call(0, driver.words(driver.params({})))
    tensor = torch.zeros(2, 3, 8, 64, dtype=torch.bfloat16)
    call.put_view("q", tensor)
    driver._encoded_map.cache_clear()
    with call:
        kernel()((MAPPED, 1), 64, (("q", 128),), call)
        held = weakref.ref(driver.tensor_map(tensor, 128).room)
        driver._encoded_map.cache_clear()
        assert held() is not None
    del call
    assert held() is None


def test_a_failed_launch_has_the_name_of_its_error(fake: Driver) -> None:
    call = driver.Call(0, driver.words(driver.params({})))
    fake.status = 700
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_STUB \(700\)"), call:
        kernel()((1, 1), 32, (), call)
    assert fake.asked[-1] == ("pop",)


def test_calls_share_no_block(fake: Driver) -> None:
    """Several threads may be at work between the launches of one."""
    constants = driver.words(driver.params({"batch": 1}))
    first, second = driver.Call(0, constants), driver.Call(0, constants)
    tensor = torch.zeros(1)
    second.put_pointer("tau", tensor)
    with first, second:
        kernel()((1, 1), 32, (), second)
        kernel()((1, 1), 32, (), first)
    found = [layout.Params.from_buffer_copy(block).tau for block in fake.blocks]
    assert found == [tensor.data_ptr(), 0]


def test_what_tma_takes() -> None:
    """Rows on 16 bytes; heads that are all the same one, but not rows."""
    keys = torch.zeros(2, 3, 8, 64, dtype=torch.bfloat16)
    assert configurations.is_aligned(keys, keys[:, :1].expand(-1, 3, -1, -1), keys.transpose(1, 2))
    assert not configurations.is_aligned(keys[:, :, :1].expand(-1, -1, 8, -1))
    assert not configurations.is_aligned(keys[..., 1:33])


def problem(head_dim: int, head_dim_v: int) -> Problem:
    """On the meta device."""
    x, v = (
        torch.empty(1, 2, 100, width, dtype=torch.bfloat16, device="meta")
        for width in (head_dim, head_dim_v)
    )
    return attention_problem(
        Inputs(x, x, v), alpha=1.5, scale=None, is_causal=True, enable_gqa=False, needs_grad=True
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(configurations, "shared_memory", lambda device: SHARED["sm_90"])


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(20, 64), (64, 20), (20, 20)])
def test_rows_that_cannot_start_on_16_bytes_are_offered_what_can_run(
    head_dim: int, head_dim_v: int
) -> None:
    on_gpu = {"device": torch.device("cuda:0")}
    offered = cuda.configs(dataclasses.replace(problem(head_dim, head_dim_v), **on_gpu))
    assert list(offered) == [configurations.PORTABLE, configurations.PORTABLE_TWO]
    aligned = cuda.configs(dataclasses.replace(problem(64, 64), **on_gpu))
    assert configurations.DENSE in aligned
    assert [c for c in aligned if c["scan"] == "hopper"]


RANGES = Operand("ranges", torch.int32, (True, True, True))
PAGED = RANGES, Operand("block_table", torch.int32, (True, True))


def few(length_k: int, **more: Any) -> Problem:
    """Queries on a GPU that are decoded."""
    plain = dataclasses.replace(problem(128, 64), device=torch.device("cuda:0"), needs_grad=False)
    asked = {"length_q": 1, "length_k": length_k, "scores": ScoreTransform(scale=0.1)}
    return dataclasses.replace(plain, **{**asked, **more})


BOTTOM_RIGHT = ScoreTransform(scale=0.1, is_causal=True, bottom_right=True)


@pytest.mark.usefixtures("hopper")
def test_what_is_decoded() -> None:
    """Few queries without gradients of many keys, or of few where other kernels do not know what is
    asked; these may be chosen where they do."""
    assert cuda.configs(few(256))[0] == configurations.SPLIT
    assert configurations.PORTABLE in cuda.configs(few(256))
    for plain in (few(255), few(256, length_q=17), few(256, needs_grad=True)):
        assert configurations.SPLIT not in cuda.configs(plain)
        assert cuda.refusals(plain) == []
    for asked in (few(5, scores=BOTTOM_RIGHT), few(80, page_size=16, operands=PAGED)):
        assert list(cuda.configs(asked)) == [configurations.SPLIT]
        assert cuda.refusals(asked) == []
    asked = few(300, length_q=17, scores=BOTTOM_RIGHT)
    assert cuda.refusals(asked) == [
        "causal_align is computed here without gradients only, for up to 16 queries"
    ]
    sinks = Operand("sinks", torch.float32, (False, True))
    refused = few(300, operands=(RANGES, sinks))
    assert cuda.refusals(refused) == ["sinks is computed by other backends only"]


@pytest.fixture
def launched(hopper: None, fake: Driver, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is launched of which kernel: options, grid, threads and shared memory."""
    found: list[Any] = []
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    decoding.forget()

    def made(device: int, unit: str, name: str, options: Any, shared: int = 0) -> Any:
        def launch(grid: tuple[int, int], threads: int, maps: driver.Maps, call: Any) -> None:
            block = layout.DecodeParams.from_buffer_copy(
                ctypes.string_at(call.block, ctypes.sizeof(layout.DecodeParams))
            )
            found.append((unit, name, dict(options), grid[0], threads, shared, block))

        return launch

    monkeypatch.setattr(driver, "kernel", made)
    monkeypatch.setattr(driver, "index", lambda device: 0)
    return found


def test_few_queries_take_three_launches(launched: list[Any]) -> None:
    """Of 4 rows that share keys; tensors are read where they lie."""
    query, key, value = (
        torch.zeros(2, heads, length, 128, dtype=torch.bfloat16)
        for heads, length in ((8, 1), (2, 5000), (2, 5000))
    )
    ranges = torch.zeros(3, 1, 1, dtype=torch.int32)
    said = {"heads_q": 8, "heads_kv": 2, "batch": 2, "head_dim_v": 128, "operands": (RANGES,)}
    inputs = Inputs(query, key, value, ranges=ranges)
    asked = dataclasses.replace(few(5000, **said), device=torch.device("cpu"))
    made = decoding.forward(asked, inputs)
    assert [name for _, name, *_ in launched] == ["decode_scan", "decode_solve", "decode_weigh"]
    blocks = [grid for *_, grid, _, _, _ in launched]
    block = launched[0][-1]
    assert block.splits == 39  # of 8 tiles of keys, one for each warp
    parts = block.splits * 2  # two warps list what of a row is above its bound
    assert block.weighed == -(-parts // 4)
    assert blocks == [4 * block.splits, 16, 4 * block.weighed]
    assert (block.k.data, block.v.data) == (key.data_ptr(), value.data_ptr())
    assert (block.o.data, block.tau) == (made.out.data_ptr(), made.tau.data_ptr())
    assert (block.ranges, block.ranges_end, block.ranges_batch) == (ranges.data_ptr(), 1, 0)
    assert made.saved.numel() == 0


def test_a_longer_cache_compiles_nothing_new(launched: list[Any]) -> None:
    seen = set()
    for length in (300, 16_512, 99_999):
        for said in ({"scores": BOTTOM_RIGHT}, {"operands": (RANGES,)}):
            for launch in decoding.plan_of(few(length, **said), aligned=True).launches:
                launch(SimpleNamespace(block=(ctypes.c_char * 4096)()))
            seen.add(
                repr([(name, options, shared) for _, name, options, *_, shared, _ in launched])
            )
            launched.clear()
    assert len(seen) == 1


@pytest.mark.usefixtures("hopper")
def test_what_tma_cannot_read_is_copied() -> None:
    """Forward and backward run the configuration that was chosen, wherever tensors lie: what one
    kernel saves the other's backward does not find. Portable kernels read any address."""
    asked = dataclasses.replace(problem(64, 64), device=torch.device("cuda:0"))
    whole = torch.randn(1, 2, 100, 64).to(torch.bfloat16)
    shifted = torch.cat((torch.zeros(1), whole.float().flatten())).to(torch.bfloat16)
    shifted = shifted[1:].view_as(whole)
    strided = torch.zeros(1, 2, 100, 130, dtype=torch.bfloat16)[..., 1:129:2]
    same_rows = whole[:, :, :1].expand_as(whole)
    for config in (*cuda.configs(asked), configurations.PORTABLE_TWO):
        assert cuda.notes(asked, Inputs(whole, whole, strided), config) == []
        found = cuda.notes(asked, Inputs(shifted, whole, same_rows), config)
        given = whole, shifted, strided, same_rows
        kept, moved, *others = attention.placed(config, *given)
        assert kept is whole
        assert all(x.stride(-1) == 1 for x in (moved, *others))
        assert all(map(torch.equal, (moved, *others), given[1:]))
        if config["scan"] == "portable":
            assert found == []
            assert moved is shifted
        else:
            assert [note.split()[2] for note in found] == ["query", "value"]
            assert all("is copied" in note for note in found)
            assert configurations.is_aligned(moved, *others)
            (one,) = attention.placed(config, shifted[:, :1].expand_as(whole))
            assert configurations.is_aligned(one)
            assert one.stride(1) == 0  # heads that are all the same one


def test_the_bound_of_what_is_saved() -> None:
    """It is what every configuration saves; less is refused, more is not."""
    asked = problem(64, 64)
    assert cuda.saved_bound(asked) == 0  # not this backend's device
    asked = dataclasses.replace(asked, device=torch.device("cuda"))
    saved = sizes.Saved(asked)
    assert cuda.saved_bound(asked) == saved.total
    saved.check(torch.empty(saved.total + 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=f"saved must have {saved.total} bytes"):
        saved.check(torch.empty(saved.total - 1, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("head_dim_v", "length", "alpha", "most"),
    [
        *((64, 8192, 1.5, 128), (64, 1 << 16, 1.5, 128), (64, (1 << 16) + 1, 1.5, 256)),
        *((128, 8192, 2.0, 256), (128, 1 << 17, 1.5, 256), (256, 8192, 1.5, 256)),
        (64, 8192, 1.25, 128 + 256),
    ],
)
def test_what_a_row_keeps_for_the_backward(
    head_dim_v: int, length: int, alpha: float, most: int
) -> None:
    """As many bytes as its output, up to 65,536 keys, and few more. All layers of a model keep them
    at once: 100 bytes a row are a gigabyte of 12 layers of 12 heads with 65,536 tokens. Of the keys
    a bit for each 64 of them is kept, for 16 rows."""
    asked = dataclasses.replace(
        problem(64, head_dim_v),
        **{"length_q": length, "length_k": length, "alpha": alpha},
        device=torch.device("cuda"),
    )
    rows = asked.batch * asked.heads_q * length
    live = length / (16 * 64 * 8)
    assert cuda.saved_bound(asked) < rows * (most + 13 + live) + 4096
    symbolic = cuda.saved_bound(
        dataclasses.replace(with_symbols(asked), head_dim=64, head_dim_v=head_dim_v)
    )
    assert isinstance(symbolic, torch.SymInt)
    assert symbolic.node.hint == cuda.saved_bound(asked)


def with_symbols(asked: Problem) -> Problem:
    """Its batch, heads and lengths as symbols, as a trace with dynamic shapes has them."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 3)
    shape = asked.batch, asked.heads_q, asked.length_q
    fake = mode.from_tensor(torch.empty(shape, device="meta"), symbolic_context=context)
    batch, heads, length = fake.shape
    return dataclasses.replace(
        asked, batch=batch, heads_q=heads, heads_kv=heads, length_q=length, length_k=length
    )


@pytest.mark.parametrize(("count", "expected"), [(0, 2), (1, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_numbers_have_as_many_bytes_as_they_need(count: int, expected: int) -> None:
    assert sizes.number_bytes(count) == expected


@pytest.mark.parametrize(("length_k", "rows"), [(1 << 16, 1 << 17), (1 << 17, 1 << 16)])
def test_numbers_of_either_size_compile(length_k: int, rows: int) -> None:
    """Many rows may share few keys. What is narrow everywhere is compiled above."""
    defines = sizes.kind_defines(
        torch.bfloat16, 64, 64, 1.5, causal=True, aligned=True, length_k=length_k, rows=rows
    )
    assert (defines["KEY_BYTES"], defines["ROW_BYTES"]) in ((2, 4), (4, 2))
    scan, dense = sizes.hopper_scan(64, 3, 2), sizes.hopper_dense(64, 64, length_k)
    capacity = scan.capacity(SHARED["sm_90"])
    assert capacity is not None
    for unit, more in (
        ("elements.cu", {}),
        ("scan90.cu", scan.defines_for(capacity)),
        ("dense90_output.cu", {**dense.defines, "OUTPUT": layout.OUTPUT_SAVES}),
        ("dense90_grad.cu", dense.defines),
    ):
        found = usage(compiler.compile_unit(unit, defines | more, "sm_90a").log)
        assert {kernel: one.spilled for kernel, one in found.items() if one.spilled} == {}


FLASH_ATTENTION_STEP = 258 * 2**20
"""Bytes of a step of FlashAttention-2 above its inputs: 16 heads of 64, 16,384 positions."""


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("head_dim", "alpha", "most"), [(64, 1.5, 0.8), (128, 2.0, 1.45), (64, 1.25, 1.05)]
)
def test_a_step_takes_no_more_than_flash_attention(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, alpha: float, most: float
) -> None:
    """Of half that width, where it is 128. An alpha without a closed form keeps what the scan made
    of its scores."""
    length = 16_384
    monkeypatch.setattr(attention.Plan, "_multiprocessors", 132)
    asked = dataclasses.replace(
        problem(head_dim, head_dim),
        **{"heads_q": 16, "heads_kv": 16, "length_q": length, "length_k": length, "alpha": alpha},
        device=torch.device("cuda:0"),
    )
    plan = attention.plan_of(asked, cuda.configs(asked)[0], aligned=True)
    outputs = 16 * length * (4 * 2 * head_dim + 4)  # with the gradients; thresholds in float32
    step = outputs + plan.saved.total + plan.scratch.total
    assert step < most * FLASH_ATTENTION_STEP

"""What a backend offers the tuner agrees with the reference, and CUDA graphs over its launches."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference
import torch
from cases import BFLOAT16, FLOAT32, Case, Inputs, device_of, interpreted, usable_backends

from adasplash2 import dispatch, records
from adasplash2 import problem as problems
from adasplash2.backends import REGISTRY
from adasplash2.contract import Backend, Config

CASES = [
    Case("causal", length_q=200, length_k=200, is_causal=True, heads_q=1, data="local"),
    Case("gqa", length_q=70, length_k=150, heads_q=2, heads_kv=1, dtype=BFLOAT16),
    Case("flat", length_q=130, length_k=300, head_dim=64, dtype=BFLOAT16, sharpness=0.05),
]
BACKENDS = pytest.mark.parametrize("name", usable_backends())
PRECISE = {FLOAT32: 1e-4, BFLOAT16: 1e-2}


def problem_of(case: Case, inputs: Inputs) -> problems.Problem:
    return problems.attention_problem(
        problems.Inputs(*inputs[:3]),
        **case.options,
        enable_gqa=case.heads_kv is not None,
        needs_grad=True,
    )


def forward_and_backward(
    backend: Backend, case: Case, inputs: Inputs, config: Config
) -> tuple[torch.Tensor, ...]:
    asked, tensors = problem_of(case, inputs), problems.Inputs(*inputs[:3])
    result = backend.forward(asked, tensors, config)
    if config in backend.configs(asked):  # not one of a test's own
        assert result.saved.numel() <= backend.saved_bound(asked)
    return result.out, *backend.backward(asked, tensors, result.kept, inputs.grad_out, config)[:3]


def assert_agrees(case: Case, inputs: Inputs, got: tuple[torch.Tensor, ...]) -> None:
    exact = reference.attention(*inputs[:3], **case.options)
    gradients = reference.attention_gradients(*inputs, **case.options, p=exact.probabilities)
    for one, other in zip(got, (exact.out, *gradients), strict=True):
        assert reference.relative_error(one, other) < PRECISE[case.dtype]


def module_of(name: str) -> Backend:
    return importlib.import_module(REGISTRY[name])


@BACKENDS
@interpreted(case=CASES[0], number=(1, 3, 4))
@interpreted(case=CASES[1], number=(2, 3, 5))
@interpreted(case=CASES[2], number=0)
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_configuration_agrees(case: Case, number: int, name: str) -> None:
    backend = module_of(name)
    inputs = case.inputs(device_of(backend.name))
    offered = backend.configs(problem_of(case, inputs))
    if number >= len(offered):
        pytest.skip(f"there are {len(offered)} configurations")
    got = forward_and_backward(backend, case, inputs, offered[number])
    assert_agrees(case, inputs, got)


def test_a_record_of_another_configuration_is_read_and_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Records keep what earlier releases measured, with keys that no configuration has now."""
    backend, case = module_of("cpu"), CASES[0]
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path))
    asked = problem_of(case, case.inputs())
    offered = backend.configs(asked)
    old = records.Record(
        problem_class=records.problem_class(asked),
        backend="cpu",
        versions=records.versions(backend),
        config={**offered[-1], "list_capacity": 512, "bins": 16},
        milliseconds=1.0,
        default_milliseconds=2.0,
        measured=records.now(),
    )
    assert records.Store(asked.device).add([old])
    dispatch.forget()
    assert records.Store(asked.device).find(old.problem_class, backend) == old
    choice = dispatch.choose(asked, "cpu")
    assert (choice.backend.name, choice.config) == ("cpu", offered[0])


@interpreted()
def test_more_tiles_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend's maxima of tiles, 64 of a row block at a time elsewhere, two here."""
    if "triton" not in usable_backends():
        pytest.skip("the Triton backend cannot run here")
    from adasplash2.backends.triton import launch

    backend, case = module_of("triton"), CASES[0]
    inputs = case.inputs(device_of(backend.name))
    blocks = {"block_q": 32, "block_k": 16, "whole": "nothing"}
    config = {**backend.configs(problem_of(case, inputs))[0], **blocks}
    monkeypatch.setattr(launch, "MAXIMA_CHUNK", 2 * 32)
    got = forward_and_backward(backend, case, inputs, config)
    assert_agrees(case, inputs, got)


@interpreted(case=CASES[1])
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_row_blocks_of_whole_rows_over_several_programs(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, however many row blocks a program takes, also where the last has fewer."""
    if "triton" not in usable_backends():
        pytest.skip("the Triton backend cannot run here")
    from adasplash2.backends.triton import launch, sizes

    backend = module_of("triton")
    case = dataclasses.replace(case, length_q=150, length_k=100)
    inputs = case.inputs(device_of(backend.name))
    config = backend.configs(problem_of(case, inputs))[0] | {"whole": "outputs", "whole_warps": 4}
    results = []
    for each in (1, 2, 3):
        monkeypatch.setattr(sizes, "row_blocks_each", lambda *_, each=each: each)
        launch.forget()
        results.append(forward_and_backward(backend, case, inputs, config))
    launch.forget()
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one, other)


@interpreted(length_q=150)
@pytest.mark.parametrize("length_q", [150, 100, 190])
def test_rows_that_see_no_key_of_the_second_half(
    length_q: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are launched apart."""
    if "triton" not in usable_backends():
        pytest.skip("the Triton backend cannot run here")
    from adasplash2.backends.triton import launch, sizes

    backend = module_of("triton")
    # GPUs have whole rows of 16 bits alone, in blocks that make one product of matrices.
    block_q, dtype = (16, torch.float32) if sizes.INTERPRETED else (64, torch.bfloat16)
    case = Case(
        "narrowed", length_q=length_q, length_k=150, is_causal=True, heads_q=2, batch=1, dtype=dtype
    )
    inputs = case.inputs(device_of(backend.name))
    asked = problem_of(case, inputs)
    offered = [config for config in backend.configs(asked) if config["whole"] == "thresholds"]
    assert offered
    monkeypatch.setattr(sizes, "NARROWED", 256)
    row_blocks, narrow = -(-length_q // block_q), 128 // block_q
    narrow = min(row_blocks, narrow)
    expected = (256, row_blocks - narrow), (128, narrow)
    config = offered[0] | {"block_q": block_q}
    assert sizes.whole_parts(asked, config) == [part for part in expected if part[1]]
    launch.forget()
    got = forward_and_backward(backend, case, inputs, config)
    launch.forget()
    assert_agrees(case, inputs, got)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lets the Triton backend cut lists of key tiles into short pieces; how many it made."""
    if "triton" not in usable_backends():
        pytest.skip("the Triton backend cannot run here")
    from adasplash2.backends.triton import launch, sizes

    made: list[int] = []
    run = launch.launch

    def watched(asked: launch.Launch) -> None:
        run(asked)
        if asked.kernel.__name__ == "cut_lists":
            made.append(int(asked.arguments["cuts"][-1]))

    monkeypatch.setattr(launch, "launch", watched)
    monkeypatch.setattr(sizes, "SHORTEST_PIECE", 1)
    monkeypatch.setattr(sizes, "PIECES", 64)
    launch.forget()  # has kernels compiled for other numbers
    yield made
    launch.forget()


@interpreted(heads_kv=1)
@pytest.mark.parametrize("heads_kv", [2, 1])
def test_a_key_that_all_rows_keep(heads_kv: int, cut: list[int]) -> None:
    """The lists of its tile are longer than all others."""
    backend = module_of("triton")
    case = Case(
        "sink", length_q=150, length_k=150, is_causal=True, heads_q=2, heads_kv=heads_kv, batch=1
    )
    inputs = case.inputs(device_of(backend.name))
    inputs.key[:, :, 3] = 0.0
    inputs.key[..., 3, 0] = 4.0
    inputs.query[..., 0] = 4.0
    config = {**backend.configs(problem_of(case, inputs))[0], "block_q": 16, "block_k": 16}
    got = forward_and_backward(backend, case, inputs, config)
    assert cut[0] > 10
    assert_agrees(case, inputs, got)


SHARED_OUT = [
    dataclasses.replace(case, heads_q=6, dtype=BFLOAT16, sharpness=3.0)
    for case in (
        Case("apart", length_q=700, length_k=650, head_dim=64),
        Case("groups", length_q=650, length_k=700, heads_kv=3, head_dim=64),
        Case("wide", length_q=650, length_k=700, heads_kv=3, head_dim=128),
        Case("causal", length_q=1100, length_k=1100, head_dim=64, is_causal=True),
    )
]


@pytest.mark.gpu
@BACKENDS
@pytest.mark.parametrize("case", SHARED_OUT, ids=lambda case: case.name)
def test_blocks_that_work_on_many_items(
    case: Case, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of problems far larger than a test's do: here there is one multiprocessor to fill.
    Every other head is flat."""
    if name != "cuda":
        pytest.skip("blocks of others have an item each, or take what is left")
    from adasplash2.backends.cuda import attention

    inputs = case.inputs("cuda")
    inputs.query[:, ::2] *= 0.003
    backend = module_of(name)
    asked = problem_of(case, inputs)
    config = backend.configs(asked)[0]
    monkeypatch.setattr(attention.Plan, "_multiprocessors", 1)
    attention._plan.cache_clear()
    try:
        plan = attention.plan_of(asked, config, True)
        tiles = plan._query_tiles
        together = plan._dense.maps and not case.is_causal
        assert plan._dense_blocks(tiles) == (1 if together else tiles)
        assert_agrees(case, inputs, forward_and_backward(backend, case, inputs, config))
    finally:
        attention._plan.cache_clear()


@pytest.mark.gpu
@BACKENDS
@pytest.mark.parametrize("sharpness", [1.0, 0.01], ids=["lists", "flat"])
def test_cuda_graphs_capture_forward_and_backward(sharpness: float, name: str) -> None:
    """Nothing waits for the host, and a replay serves new data, finite or not."""
    backend = module_of(name)
    if backend.name == "cpu":
        pytest.skip("a graph holds kernels of the GPU")
    case = Case("graph", length_q=1100, length_k=1100, is_causal=True, dtype=BFLOAT16, head_dim=64,
                sharpness=sharpness)  # fmt: skip
    inputs = case.inputs("cuda")
    config = backend.configs(problem_of(case, inputs))[0]
    forward_and_backward(backend, case, inputs, config)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(backend, case, inputs, config)
    inputs.query.mul_(2.0)
    inputs.value.neg_()
    for value in (1.0, math.nan, 1.0):
        inputs.value[:, 0, 500, 1] = value
        graph.replay()
        expected = forward_and_backward(backend, case, inputs, config)
        for one, other in zip(captured, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)

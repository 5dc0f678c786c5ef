"""The C++ core where the public functions do not show it: the work it does, errors in its
threads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs

import adasplash2
from adasplash2 import _core, contract, problem
from adasplash2.backends import cpu


def work_of(case: Case, inputs: Inputs | None = None, tiles: int = 0, **said: Any) -> _core.Work:
    """What the forward of a case does, in this machine's first instruction set. ``said``: a window,
    and other operands by name."""
    inputs = inputs or case.inputs()
    rows = (case.batch, case.heads_q, case.length_q)
    out = torch.empty(*rows, case.head_dim, dtype=case.dtype)
    tau = torch.empty(rows, dtype=case.dtype)
    query, key, value, to = ((t.data_ptr(), *t.stride()[:3]) for t in (*inputs[:3], out))
    window = said.pop("window", (-1, -1))
    operands = cpu._operands(problem.Inputs(*inputs[:3], **said))
    work = _core.Work()
    _core.attention_forward(
        dims=(case.batch, case.heads_q, case.heads_q, case.length_q, case.length_k, case.head_dim,
              case.head_dim),
        dtype=str(case.dtype).removeprefix("torch."), alpha=case.alpha,
        scale=case.head_dim**-0.5, is_causal=case.is_causal, query=query, key=key, value=value,
        out=to, tau=tau.data_ptr(), keep=False, threads=2, isa=_core.isa(),
        scan_rows=64, tiles=tiles, work=work, window=window, operands=operands,
    )  # fmt: skip
    return work


def outputs(case: Case, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    out = adasplash2.entmax_attention(*leaves, **case.options, backend="cpu")
    return [out, *torch.autograd.grad(out.sum(), leaves)]


WORK = {
    # alpha, c, is_causal: entries appended and lists tightened a row, entries left, passes a row
    (1.25, 4.0, False): (120.0, 2.81, 15.7, 3.66),
    (1.25, 4.0, True): (80.0, 1.93, 10.8, 3.47),
    (1.5, 1.0, False): (142.0, 3.30, 24.3, 1.44),
    (1.5, 1.0, True): (95.0, 2.28, 17.3, 1.42),
    (1.5, 4.0, False): (92.0, 2.05, 3.9, 1.16),
    (1.5, 4.0, True): (63.0, 1.46, 3.0, 1.15),
    (2.0, 1.0, False): (97.0, 2.24, 5.1, 1.18),
    (2.0, 1.0, True): (67.0, 1.61, 3.9, 1.17),
    (3.0, 1.0, False): (89.0, 1.97, 2.6, 6.53),
    (3.0, 4.0, True): (58.0, 1.24, 1.2, 4.43),
}
"""What 1,024 Gaussian rows may take, a tenth above what any instruction set of x86-64 takes."""


@pytest.mark.parametrize(("alpha", "c", "is_causal"), WORK)
def test_the_scan_does_little_work(alpha: float, c: float, is_causal: bool) -> None:
    """The bound that rises during the scan is what spares work: results do not show it."""
    length = 1024
    work = work_of(Case("work", length_q=length, length_k=length, head_dim=64, heads_q=1,
                        sharpness=c, alpha=alpha, is_causal=is_causal))  # fmt: skip
    appended, tightenings, solved, steps = WORK[alpha, c, is_causal]
    assert work.appended <= appended * length
    assert work.tightenings <= tightenings * length
    assert work.solved <= solved * length
    assert work.steps <= steps * length
    assert work.flat_rows == 0


def test_causal_tiles_are_skipped() -> None:
    causal, full = (
        work_of(Case("tiles", length_q=1024, length_k=1024, heads_q=1, is_causal=is_causal)).tiles
        for is_causal in (True, False)
    )
    assert 0.5 < causal / full < 0.52


def test_tiles_that_nobody_sees_are_not_computed() -> None:
    case = Case("unseen", length_q=512, length_k=2048, batch=1, heads_q=1, head_dim=16)
    all_tiles = work_of(case).tiles
    mask = torch.zeros(1, 1, 1, 2048, dtype=torch.bool)
    mask[..., :256] = True
    rows = torch.arange(512, dtype=torch.int32)
    packed = torch.stack([rows // 128 * 512, rows // 128 * 512 + 256, rows])[:, None]
    far = torch.tensor([[5.0]])
    for said, share in (
        ({"attn_mask": mask}, 1 / 8),
        ({"attn_mask": torch.where(mask, 0.0, -math.inf)}, 1 / 8),
        ({"window": (100, 27)}, 1 / 16),
        ({"ranges": packed}, 1 / 8),
        ({"alibi_slopes": far}, 1 / 16),
        ({"alibi_slopes": far, "attn_mask": mask}, 1 / 8),
    ):
        assert work_of(case, **said).tiles < (share + 0.04) * all_tiles, said.keys()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lengths", [(65, 300), (300, 65), (64, 64), (1, 129), (200, 128)])
def test_tiles_that_may_hold_something(lengths: tuple[int, int], is_causal: bool) -> None:
    """The core names them and, among them, those that do: those of a key that all rows keep."""
    length_q, length_k = lengths
    case = Case("tiles", length_q=length_q, length_k=length_k, batch=2, is_causal=is_causal)
    inputs = case.inputs()
    inputs.query[:] = inputs.key[:] = 0.0
    inputs.query[..., 0], inputs.key[:, :, 0, 0] = 1.0, 100.0
    rows, columns = -(-length_q // _core.TILE_ROWS), -(-length_k // _core.TILE_ROWS)
    tiles = torch.zeros(case.batch, case.heads_q, rows, columns, dtype=torch.uint8)
    work_of(case, inputs, tiles=tiles.data_ptr())
    expected = torch.ones(rows, columns, dtype=torch.uint8)
    if is_causal:
        expected = expected.tril()
    expected[:, 0] = 2
    assert torch.equal(tiles, expected.expand_as(tiles))


def test_keys_that_no_row_sees_are_not_read() -> None:
    """Behind the last query of a causal call; with rows that are flat, so that all paths run."""
    for data in ("gaussian", "equal"):
        case = Case("behind", length_q=70, length_k=1000, is_causal=True, data=data)
        inputs = case.inputs()
        leaves = [t.clone().requires_grad_() for t in inputs[:3]]
        hidden = [inputs.query.clone().requires_grad_()]
        for tensor in inputs[1:3]:
            spoiled = tensor.clone()
            spoiled[:, :, 70:] = torch.nan
            hidden.append(spoiled.requires_grad_())
        for one, other in zip(outputs(case, leaves), outputs(case, hidden), strict=True):
            assert torch.equal(one, other)


def test_flat_rows_are_seen_early() -> None:
    """A row's list stops growing once the row is known to be flat, and equal scores are."""
    case = Case("flat", length_q=64, length_k=4096, heads_q=1)
    work = work_of(replace(case, data="equal"))
    assert work.flat_rows == 64
    assert work.appended <= 64 * 600
    assert work.tiles <= 1.2 * work_of(case).tiles
    assert work.steps <= 2 * 64


@pytest.mark.parametrize(
    ("length", "sharpness", "share"),
    [(512, 0.1, 1), (512, 0.4, 0), (2048, 0.1, 1), (2048, 0.25, 0), (4096, 0.15, 0)],
)
def test_what_rows_will_keep_is_foretold(length: int, sharpness: float, share: float) -> None:
    """Rows that will be flat are seen before much is scanned in vain, and no others are."""
    case = Case("foretold", length_q=256, length_k=length, head_dim=64, heads_q=1)
    work = work_of(replace(case, sharpness=sharpness))
    assert work.flat_rows == share * 256
    assert work.tiles <= (1.2 if share else 1.02) * work_of(case).tiles


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_error_in_a_worker_thread_is_raised(threads: int) -> None:
    """From whichever thread, once all are back; the next loop is not impaired."""
    for failing in (0, 57, 99):
        with pytest.raises(RuntimeError, match=f"^task {failing} failed$"):
            _core.fail_in_parallel(100, threads, failing)
    assert _core.fail_in_parallel(100, threads, -1) == 100


def test_what_is_saved_lies_where_the_core_reads_it() -> None:
    assert contract.SAVED_ALIGNMENT % _core.SAVED_ALIGNMENT == 0

"""The ways to compute attention that the programs compare, and when each of them cannot."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import data
import torch
import torch.nn.functional as F
from data import AttentionCase
from harness import packages
from harness.cases import DTYPES, Case, reference
from harness.contender import Contender
from harness.memory import free_bytes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import adasplash2
from adasplash2.backends import REGISTRY

# Triton keeps what its autotuner found on disk: a rival that tunes for minutes does it once.
os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")

DENSE = "dense"
BASELINE = {"cpu": "sdpa", "cuda": "sdpa-flash"}
"""The softmax attention that times are relative to."""

DENSE_COPIES = 14
"""Buffers of the size of the scores at the peak of dense entmax15 attention, forward and backward:
measured with entmax 1.3 at 8 heads and 1,024 positions."""

FLEX_SIDE = 128
"""Side of FlexAttention's tiles where the data prescribe none; its own default."""


# Ours


def name_of(backend: str) -> str:
    """The contender's name of one of our backends."""
    return f"adasplash2-{backend}"


def ours(backend: str, case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return adasplash2.entmax_attention(
        query,
        key,
        value,
        alpha=case.alpha,
        is_causal=case.is_causal,
        enable_gqa=case.heads != case.heads_kv,
        backend=backend,
    )


def ours_refusal(backend: str, case: AttentionCase) -> str | None:
    entry = torch.zeros((), dtype=DTYPES[case.dtype], device=case.device)

    def shaped(heads: int) -> Tensor:
        return entry.expand(case.batch, heads, case.length, case.head_dim)

    try:
        explanation = adasplash2.explain(
            shaped(case.heads),
            shaped(case.heads_kv),
            shaped(case.heads_kv),
            alpha=case.alpha,
            is_causal=case.is_causal,
            enable_gqa=case.heads != case.heads_kv,
            backend=backend,
        )
    except ValueError as error:
        return str(error)
    if explanation.chosen is not None:
        return None
    return "; ".join(
        reason for name, reasons in explanation.others if name == backend for reason in reasons
    )


def stats(case: AttentionCase, tensors: Sequence[Tensor]) -> adasplash2.AttentionStats:
    """What the data of a case are like for entmax attention, by the backend that runs it."""
    return adasplash2.attention_stats(
        *tensors,
        alpha=case.alpha,
        is_causal=case.is_causal,
        enable_gqa=case.heads != case.heads_kv,
    )


def sparsity(case: AttentionCase) -> dict[str, float]:
    """Measured shares: ``empty_tiles`` of the 64x64 tiles, ``zeros`` of the allowed pairs; and the
    mean ``support`` and solver ``iterations`` of a row."""
    found = stats(case, case.inputs().tensors)
    support = found.support.double()
    allowed = case.length
    if case.is_causal:
        allowed = (case.length + 1) / 2
    return {
        "empty_tiles": found.empty_tiles.mean().item(),
        "zeros": 1.0 - support.mean().item() / allowed,
        "support": support.mean().item(),
        "iterations": found.iterations.double().mean().item(),
    }


# Softmax


def sdpa(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=case.is_causal, enable_gqa=case.heads != case.heads_kv
    )


def sdpa_by(
    backend: SDPBackend, case: AttentionCase, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(case, query, key, value)


def flex(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlexAttention: softmax over the live tiles of the data ``blocks``, else over all keys."""
    side = case.block if case.data == "blocks" else FLEX_SIDE
    options = None if side == FLEX_SIDE else dict.fromkeys(FLEX_SIDES, side)
    return _compiled_flex()(
        query,
        key,
        value,
        block_mask=flex_mask(case),
        enable_gqa=case.heads != case.heads_kv,
        kernel_options=options,
    )


FLEX_SIDES = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
"""FlexAttention's names of its kernels' tile sides, which must divide those of the mask."""


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 256  # a shape each
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=2)
def flex_mask(case: AttentionCase):
    """The BlockMask of a case; made once, as a model does, and not timed."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    def causal(batch, head, query, key):
        return query >= key

    if case.data != "blocks":
        mask = causal if case.is_causal else None
        if mask is None:
            return None
        return create_block_mask(mask, None, None, case.length, case.length, device=case.device)
    live = data.plan_blocks(case).live.to(case.device)
    count = live.shape[-1]
    numbers = torch.arange(count, device=case.device)
    if case.is_causal:
        # Tiles below the diagonal need no mask inside.
        partial = live & (numbers[:, None] == numbers)
        full = live & (numbers[:, None] > numbers)
    else:
        partial, full = torch.zeros_like(live), live

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        counts = tiles.sum(-1, dtype=torch.int32)
        order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
        return counts, order.int().contiguous()

    return BlockMask.from_kv_blocks(
        *listed(partial),
        *listed(full),
        BLOCK_SIZE=case.block,
        mask_mod=causal if case.is_causal else None,
        seq_lengths=(case.length, case.length),
    )


def flex_refusal(case: AttentionCase) -> str | None:
    if case.data == "blocks" and case.block < 64:
        return "is run with tiles of 64 or more"
    return None


def flex_expected(case: AttentionCase, tensors: Sequence[Tensor]) -> Tensor:
    """Softmax over the live tiles of the first positions, dense in float64."""
    query, key, value = (t.cpu().double() for t in tensors)
    length, group = query.shape[2], case.heads // case.heads_kv
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    allowed = reference.allowed_keys(length, length, case.is_causal)
    if case.data == "blocks":
        tiles = -(-length // case.block)  # those of the whole length would not fit in memory
        live = data.plan_blocks(case).live[:, :, :tiles, :tiles]
        live = live.repeat_interleave(case.block, 2).repeat_interleave(case.block, 3)
        allowed = allowed & live[:, :, :length, :length]
    scores = (query @ key.mT * case.head_dim**-0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ value


# Entmax by others


def dense(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Materialised scores through the package ``entmax``; 16-bit inputs in float32."""
    return _dense(packages.entmax_package, case, query, key, value)


def dense_bisect(case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by bisection, which the package has for every alpha."""
    import entmax

    return _dense(entmax.entmax_bisect, case, query, key, value)


def _dense(mapping, case: AttentionCase, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    dtype = query.dtype
    if dtype.itemsize == 2:
        query, key, value = query.float(), key.float(), value.float()
    group = case.heads // case.heads_kv
    if group > 1:
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = (query @ key.mT) * case.head_dim**-0.5
    if case.is_causal:
        hidden = torch.ones(case.length, case.length, dtype=torch.bool, device=case.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (mapping(scores, case.alpha) @ value).to(dtype)


def dense_refusal(case: AttentionCase) -> str | None:
    itemsize = max(4, DTYPES[case.dtype].itemsize)
    needed = case.batch * case.heads * case.length**2 * itemsize * DENSE_COPIES
    allowed = free_bytes(case.device) // 2
    if needed > allowed:
        gib = 2**30
        return f"needs {needed / gib:.1f} GiB, half of the free memory is {allowed / gib:.1f} GiB"
    return packages.missing("entmax")


def adasplash(
    version: str, case: AttentionCase, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    import adasplash

    if version == "v2":
        v2 = importlib.import_module("adasplash.adasplash_v2")
        _tune_v2(v2, case, query, key, value)
        return v2.sparse_attn(query, key, value)
    return adasplash.adasplash_v1(query, key, value, alpha=case.alpha, is_causal=case.is_causal)


TUNED_ROWS = 2**16
"""Query rows, of all heads together, that fill a GPU several times over."""

TUNED_LENGTH = 2**14
"""The longest length that adasplash v2 tunes at: at 65,536 four minutes were not enough for it on
an H200. Longer ones take what it chose here."""

_tuned: set[tuple[int, int, str]] = set()
"""Lengths, head_dims and dtypes for which adasplash v2 has tuned: its choice rests on these."""


def _tune_v2(v2: Any, case: AttentionCase, *tensors: Tensor) -> None:
    """Let it tune on as many heads as fill the GPU: on more, long rows took it minutes."""
    asked = case.length, case.head_dim, case.dtype
    if asked in _tuned:
        return
    length = min(case.length, TUNED_LENGTH)
    heads = max(1, TUNED_ROWS // length)
    leaves = [t[:, :heads, :length].detach().clone().requires_grad_() for t in tensors]
    with torch.enable_grad():
        out = v2.sparse_attn(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    if length < case.length:
        adopt_choices(vars(v2).values(), length, case.length)
    _tuned.add(asked)


def adopt_choices(kernels: Iterable[Any], chosen_for: int, length: int) -> None:
    """Make the Triton kernels that tune by ``N_CTX`` take at ``length`` what they chose."""
    for kernel in kernels:
        keys = getattr(kernel, "keys", None)
        if not isinstance(keys, list) or "N_CTX" not in keys:
            continue
        place = keys.index("N_CTX")
        for key, config in list(kernel.cache.items()):
            if key[place] == chosen_for:
                kernel.cache[*key[:place], length, *key[place + 1 :]] = config


def adasplash_refusal(version: str, case: AttentionCase) -> str | None:
    if reason := packages.missing("adasplash"):
        return reason
    if case.length & (case.length - 1):
        return "takes lengths that are powers of two"
    if version == "v2" and (case.alpha != 1.5 or not case.is_causal):
        return "is causal with alpha 1.5 alone"
    if version == "v1" and case.heads != case.heads_kv:
        return "has no grouped queries"
    return None


# The lists


def _ours(backend: str) -> Contender:
    return Contender(
        name_of(backend),
        functools.partial(ours, backend),
        ("cpu",) if backend == "cpu" else ("cuda",),
        functools.partial(ours_refusal, backend),
    )


def _sdpa(name: str, backend: SDPBackend) -> Contender:
    return Contender(name, functools.partial(sdpa_by, backend), ("cuda",), softmax=True)


def _adasplash(version: str) -> Contender:
    call = functools.partial(adasplash, version)
    refusal = functools.partial(adasplash_refusal, version)
    return Contender(f"adasplash-{version}", call, ("cuda",), refusal, tunes=version == "v2")


OURS = tuple(_ours(backend) for backend in REGISTRY)
RIVALS = (
    Contender("sdpa", sdpa, ("cpu",), softmax=True),
    _sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    _sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
    Contender(
        "flex", flex, ("cuda",), flex_refusal, softmax=True, tunes=True, reference=flex_expected
    ),
    _adasplash("v1"),
    _adasplash("v2"),
    Contender(DENSE, dense, refusal=dense_refusal),
    Contender("dense-bisect", dense_bisect, refusal=dense_refusal),
)

OPT_IN = {
    "adasplash-v2": "tunes about 60 variants of each kernel for every new shape, over two minutes "
    "on an H100: ask for it by --rivals, with --limit and --budget to match"
}
"""Rivals that run only if asked for by name, and why."""


def on(
    device: str, names: Sequence[str] | None, default: Sequence[str] | None = None
) -> list[Contender]:
    """Ours and the rivals for a device; ``names`` are those of ``--rivals``, None for the
    ``default`` ones, None for all. Rivals that must be asked for are there, and refuse."""
    rivals = [rival for rival in RIVALS if device in rival.devices]
    if names is None:
        rivals = [
            dataclasses.replace(rival, refusal=functools.partial(_opt_in, OPT_IN[rival.name]))
            if rival.name in OPT_IN
            else rival
            for rival in rivals
            if default is None or rival.name in default
        ]
    else:
        rivals = [rival for rival in RIVALS if rival.name in names]
    return [c for c in OURS if device in c.devices] + rivals


def _opt_in(reason: str, case: Case) -> str:
    return reason


def add_rivals(parser) -> None:
    parser.add_argument(
        "--rivals",
        nargs="*",
        choices=[rival.name for rival in RIVALS],
        help="default: those that run on the device, without " + ", ".join(OPT_IN),
    )


def best(names: Sequence[str]) -> list[str]:
    """Ours among names of contenders."""
    mine = {contender.name for contender in OURS}
    return [name for name in names if name in mine]

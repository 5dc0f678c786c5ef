"""From what users say to what is computed: shapes of SDPA, of flash-attn and of nested tensors,
masks, lengths and options become :class:`Inputs` and :class:`Options`, the same for every backend.

Nothing here knows a backend. What can be said with torch's own operators is said with them, so that
autograd, ``vmap`` and compilers see through it; operands stay as small as they came.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adasplash2.options import Options, Said, check_count, check_options, shown
from adasplash2.problem import (
    FEW,
    MAX_HEAD_DIM,
    TENSORS,
    Described,
    Inputs,
    Problems,
    check_like,
    check_strided,
    check_tensor,
    compute_dtype,
    described,
)
from adasplash2.torch_fastpath import (
    assert_on_device,
    beside,
    is_autocast_on,
    is_in_a_transform,
    is_in_memory,
    is_memory_known,
    is_plain,
    is_without_data,
    ragged_dim,
    share_memory,
)


class Call(NamedTuple):
    """One call, lowered. ``shaped`` makes the output, ``(batch, heads_q, length_q, head_dim_v)``,
    what the caller expects, and leaves alone what needs no change; ``shaped_beside`` does so with
    what is found beside it, ``(batch, heads_q, ...)``. ``problems`` keep those of a plain call,
    without and with gradients, once they are known."""

    inputs: Inputs
    options: Options
    shaped: Callable[[Tensor], Tensor]
    shaped_beside: Callable[[Tensor], Tensor]
    packed: Packed | None = None
    problems: Problems | None = None


class Packed(NamedTuple):
    """What a call of packed sequences was before they became ``ranges``: options that say all of
    each sequence, and where they are; how long the longest are, as users say; and the lengths of
    the queries' sequences, and of the keys' with what lies before each, where both are known."""

    options: Options
    sequences: Sequences
    longest: tuple[int | None, int | None]
    places: tuple[list[int], list[int]] | None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def lowered(query: Tensor, key: Tensor, value: Tensor, said: Said, *, draws: bool = True) -> Call:
    """Arguments as for :func:`adasplash2.entmax_attention`. ``draws``: whether dropout takes a seed
    from torch's generator; a call that is only looked at leaves that as it is, and has any.

    Raises:
        TypeError, ValueError: an argument is not what it must be, as far as that does not need
            the other tensors' sizes, which :func:`adasplash2.problem.validated` compares.
    """
    if getattr(query, "is_nested", False):
        packed, sequences, as_query = _from_nested(query, key, value, said)
        call = _packed(*packed, sequences, said, draws, (None, None))
        return call._replace(shaped=lambda result: as_query(call.shaped(result)))
    if (known := _known(query, key, value, said)) is not None:
        options, problems = known
        return Call(Inputs(query, key, value), options, _as_it_is, _as_it_is, None, problems)
    options, alphas, scales = check_options(said)
    tensors, lead = (query, key, value), None
    shaped: Callable[[Tensor], Tensor] = _as_it_is
    if not _is_common(query, key, value):
        for name, tensor in zip(TENSORS, tensors, strict=True):
            check_tensor(name, tensor)
        tensors, lead, shared, shaped = _four_dimensional(*tensors, options.enable_gqa)
        options = options._replace(enable_gqa=options.enable_gqa or shared)
    inputs = Inputs(*tensors)
    if not (options.dropout_p or said.has_tensors()) and alphas is None and scales is None:
        return Call(inputs, options, shaped, shaped)
    if lead is None:
        lead = [inputs.query.shape[0]]
    if _is_causal_bias(said.attn_mask):
        options = _with_causal_bias(options, said.attn_mask, inputs)
    elif said.attn_mask is not None:
        inputs = inputs._replace(attn_mask=_four_dimensional_mask(said.attn_mask, inputs, lead))
    inputs = _with_numbers(inputs, lead, alphas, scales, said)
    if not (said.q_lengths is None and said.kv_lengths is None and said.kv_starts is None):
        length_q, length_k = inputs.query.shape[2], inputs.key.shape[2]
        q_lengths = _of_sequences("q_lengths", said.q_lengths, inputs.query, lead, length_q)
        kv_lengths = _of_sequences("kv_lengths", said.kv_lengths, inputs.query, lead, length_k)
        kv_starts = _of_sequences("kv_starts", said.kv_starts, inputs.query, lead, length_k)
        options, ranges = _ranges(options, inputs.query, length_k, q_lengths, kv_lengths, kv_starts)
        inputs = inputs._replace(ranges=ranges)
    if options.dropout_p:
        device = inputs.query.device
        seed = new_seed(device) if draws else torch.zeros(1, dtype=torch.int64, device=device)
        inputs = inputs._replace(dropout_seed=seed)
    return Call(inputs, options, shaped, shaped)


_COMMON = ("alpha", "scale", "is_causal", "enable_gqa", "causal_align", "backend")
"""Options that :func:`_known` knows more of than their default."""

_OTHERS = tuple(name for name in Said._fields if name not in _COMMON)
_others = operator.itemgetter(*map(Said._fields.index, _OTHERS))
_NOTHING_ELSE = _others(Said())


def _known(query: Any, key: Any, value: Any, said: Said) -> tuple[Options, Problems] | None:
    """Of a call that says no more than :data:`_COMMON`, each of the type that it must have (True
    equals 1): what a call like it has found. None for all others, also where a new option is
    said."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or is_autocast_on()
        or type(said.alpha) is not float
        or (said.scale is not None and type(said.scale) is not float)
        or not (said.is_causal is True or said.is_causal is False)
        or not (said.enable_gqa is True or said.enable_gqa is False)
        or not all(map(operator.is_, _others(said), _NOTHING_ELSE))
    ):
        return None
    try:
        return _plain(described(query), described(key), described(value), said)
    except (AttributeError, RuntimeError, TypeError):
        return None  # no strided tensors, sizes that are symbols, or an error that comes again


@functools.lru_cache(1024)
def _plain(
    query: Described, key: Described, value: Described, said: Said
) -> tuple[Options, Problems] | None:
    """Options of such a call, and room for its problems; None where shapes need a change."""
    if not _are_common(query[0], key[0], value[0]):
        return None
    return check_options(said)[0], [None, None]


def new_seed(device: torch.device) -> Tensor:
    """A seed for dropout out of torch's generator of ``device``; nothing waits for it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


# Shapes of query, key and value


def _is_common(query: Any, key: Any, value: Any) -> bool:
    """Whether shapes need no change; no where there are none."""
    try:
        if query.is_nested:
            return False
        return _are_common(query.shape, key.shape, value.shape)
    except (AttributeError, RuntimeError):
        return False


def _are_common(q: torch.Size, k: torch.Size, v: torch.Size) -> bool:
    if not len(q) == len(k) == len(v) == 4:
        return False
    heads, shared = q[1], k[1]
    alike = q[0] == k[0] == v[0] and shared == v[1]
    return bool(alike and (heads == shared or heads != 1 != shared))


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], list[int], bool, Callable[[Tensor], Tensor]]:
    """SDPA's ``(..., heads, length, head_dim)`` with dimensions that broadcast; the leading ones,
    which become the batch (none where there are no heads or only these); whether heads of keys are
    shared by that; and the way back."""
    tensors = [query, key, value]
    dims = max(t.dim() for t in tensors)
    for name, t in zip(TENSORS, tensors, strict=True):
        if t.dim() < 2:
            raise ValueError(
                f"{name} must have at least 2 dimensions (length, head_dim), got {t.dim()} with "
                f"shape {tuple(t.shape)}"
            )
    tensors = [t[(None,) * (max(dims, 4) - t.dim())] for t in tensors]
    # What does not broadcast is left for validation to name.
    lead = [t.shape[:-3] for t in tensors]
    found = [_broadcast(column) for column in zip(*lead, strict=True)]
    sizes = [size for size in found if size is not None]
    if len(sizes) == len(found):
        tensors = [t.expand(*sizes, *t.shape[-3:]) for t in tensors]
    elif len(found) > 1:
        raise ValueError(
            "query, key and value must have leading dimensions that broadcast, got "
            + ", ".join(str(tuple(shape)) for shape in lead)
        )
    if len(sizes) > 1:
        tensors = [t.flatten(0, -4) for t in tensors]
    query, key, value = tensors
    heads = [t.shape[1] for t in tensors]
    shared = False
    if not enable_gqa and (most := _broadcast(heads)) is not None:
        query = query.expand(-1, most, -1, -1)
        if heads[1] != heads[2]:
            key, value = (t.expand(-1, most, -1, -1) for t in (key, value))
        shared = key.shape[1] != most

    def shaped(result: Tensor) -> Tensor:
        if len(sizes) > 1:
            result = result.unflatten(0, sizes)
        for _ in range(4 - dims):
            result = result.squeeze(0)
        return result

    return (query, key, value), sizes if dims > 3 else [], shared, shaped


def _broadcast(sizes: Any) -> int | None:
    """The size that all of ``sizes`` broadcast to; None where they do not."""
    others = {size for size in sizes if size != 1}
    return None if len(others) > 1 else others.pop() if others else 1


# Operands


def _check_numbers(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    check_strided(name, tensor)
    return tensor


def _with_numbers(
    inputs: Inputs, lead: list[int], alphas: Tensor | None, scales: Tensor | None, said: Said
) -> Inputs:
    """With the operands that are numbers of heads or rows."""
    compute = compute_dtype(inputs.query.dtype)
    batch, heads, length_q = inputs.query.shape[:3]

    def of_heads(name: str, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _of_heads(name, tensor, compute, (batch, heads), lead)

    return inputs._replace(
        alibi_slopes=of_heads("alibi_slopes", said.alibi_slopes),
        sinks=of_heads("sinks", said.sinks),
        scales=None
        if scales is None
        else _of_rows(scales, (batch, heads, length_q), lead).to(compute),
        alphas=of_heads("alphas", alphas),
    )


def _of_heads(
    name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int, int], lead: list[int]
) -> Tensor:
    """``(heads,)``, and of slopes ``(batch, heads)``, also with the dimensions ``lead`` that became
    the batch, as ``(batch or 1, heads)``."""
    public = "alpha" if name == "alphas" else name
    tensor = check_slopes(tensor) if name == "alibi_slopes" else _check_numbers(public, tensor)
    batch, heads = sizes
    allowed: list[tuple[int, ...]] = [(heads,)]
    if name == "alibi_slopes":
        allowed += [(batch, heads)] if len(lead) < 2 else [(batch, heads), (*lead, heads)]
    fits = tensor.dim() == 0 if name == "alphas" else False
    for shape in allowed:
        if tensor.dim() == len(shape):
            fits = fits or all(n == m for n, m in zip(tensor.shape, shape, strict=True))
    if not fits:
        shapes = " or ".join(map(str, allowed))
        raise ValueError(f"{public} must have the shape {shapes}, got {tuple(tensor.shape)}")
    tensor = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.reshape(1, -1)
    return tensor.to(dtype)


def check_slopes(alibi_slopes: object) -> Tensor:
    """A tensor of numbers that are finite and at least 0, as far as they are known.

    Raises:
        TypeError, ValueError: it is not.
    """
    tensor = _check_numbers("alibi_slopes", alibi_slopes)
    if is_known(tensor) and tensor.numel():
        low, high = (number.item() for number in tensor.detach().aminmax())
        if not 0.0 <= low <= high < math.inf:  # also refuses NaN, which is both
            wrong = high if low >= 0.0 else low
            raise ValueError(f"alibi_slopes must be finite and at least 0, got {shown(wrong)}")
    return tensor


def _of_rows(scale: Tensor, sizes: tuple[int, int, int], lead: list[int]) -> Tensor:
    """``(heads,)``, or what has more dimensions and broadcasts to ``sizes``, ``(batch, heads,
    length_q)``, also with the dimensions ``lead`` that became the batch, in three dimensions."""
    placed = _check_numbers("scale", scale)
    if scale.dim() == 1:
        placed = scale[None, :, None]
    allowed: list[tuple[int, ...]] = [sizes]
    if len(lead) > 1:
        allowed.append((*lead, *sizes[1:]))
    for shape in allowed:
        if (merged := _merged(placed, shape, 2)) is not None:
            return merged
    shapes = " or ".join(map(str, allowed))
    raise ValueError(
        f"scale must be a number, one of each head, ({sizes[1]},), or have at least two dimensions "
        f"that broadcast to {shapes}, (batch, heads, length_q), got {tuple(scale.shape)}"
    )


def _merged(tensor: Tensor, sizes: tuple[int, ...], behind: int) -> Tensor | None:
    """What broadcasts to ``sizes``, with one dimension in the place of those before the last
    ``behind``; None where it does not."""
    missing = len(sizes) - tensor.dim()
    if missing < 0:
        return None
    for n, m in zip(tensor.shape, sizes[missing:], strict=True):
        if n not in (1, m):
            return None
    if missing:
        tensor = tensor[(None,) * missing]
    dims = len(sizes) - behind
    if dims == 1:
        return tensor
    if any(n != 1 for n in tensor.shape[:dims]):  # copies where only some of them broadcast
        tensor = tensor.expand(*sizes[:dims], *tensor.shape[dims:])
    return tensor.flatten(0, dims - 1)


def alphas_of_rows(alpha: Tensor, x: Tensor, dim: int) -> Tensor:
    """``alpha`` of :func:`adasplash2.entmax` with the dimensions of ``x``: 1 along ``dim``, of the
    others each as it is or 1."""
    alpha = _check_numbers("alpha", alpha)
    behind = x.dim() + dim + 1
    rows = *x.shape[:dim], 1, *x.shape[behind:]
    if alpha.shape == x.shape[:dim] + x.shape[behind:]:
        alpha = alpha.unsqueeze(dim)
    sizes = *(1,) * (x.dim() - alpha.dim()), *alpha.shape
    if len(sizes) > len(rows) or any(n not in (1, m) for n, m in zip(sizes, rows, strict=True)):
        raise ValueError(
            f"alpha must be a number or broadcast to {rows}, the shape of x with the size 1 in "
            f"dim, got the shape {tuple(alpha.shape)}"
        )
    if alpha.device != x.device:
        raise ValueError(f"alpha must be on the device of x ({x.device}), got {alpha.device}")
    return alpha.reshape(sizes).to(compute_dtype(x.dtype))


def _four_dimensional_mask(attn_mask: object, inputs: Inputs, lead: list[int]) -> Tensor:
    """``attn_mask`` in four dimensions, of which the first stands for those of ``lead``."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor or None, got {type(attn_mask).__name__}")
    check_strided("attn_mask", attn_mask)
    batch, heads, length_q = inputs.query.shape[:3]
    sizes = *(lead if len(lead) > 1 else [batch]), heads, length_q, inputs.key.shape[2]
    merged = _merged(attn_mask, sizes, 3)
    if merged is None:
        raise ValueError(
            f"attn_mask must have a shape that broadcasts to {sizes}, (batch, heads, length_q, "
            f"length_k), got {tuple(attn_mask.shape)}"
        )
    return merged


def _is_causal_bias(attn_mask: object) -> bool:
    """Whether it is what torch's ``causal_upper_left`` and ``causal_lower_right`` return. By name:
    to import what makes them takes seconds, and a compiler must not look through all modules."""
    kind = type(attn_mask)
    return (kind.__module__, kind.__name__) == ("torch.nn.attention.bias", "CausalBias")


def _with_causal_bias(options: Options, bias: Any, inputs: Inputs) -> Options:
    if options.is_causal:
        raise ValueError(
            "is_causal must be False where attn_mask is a causal mask of torch, got True"
        )
    said = bias.seq_len_q, bias.seq_len_kv
    lengths = inputs.query.shape[2], inputs.key.shape[2]
    if said != lengths:
        raise ValueError(f"attn_mask must be a causal mask for the lengths {lengths}, got {said}")
    align = "bottom-right" if bias.variant.name == "LOWER_RIGHT" else "top-left"
    if options.causal_align not in ("top-left", align):  # which is what nobody said
        raise ValueError(
            f"causal_align must be {align!r} where attn_mask is a causal mask of torch that is so, "
            f"got {options.causal_align!r}"
        )
    return options._replace(is_causal=True, causal_align=align)


# Lengths


_LENGTHS = ("q_lengths", "kv_lengths", "kv_starts")


def is_known(*tensors: Tensor) -> bool:
    """Whether the values of ``tensors`` can be looked at without waiting for a device."""
    return not torch.compiler.is_compiling() and not any(
        t.device.type != "cpu" or is_in_a_transform(t) or is_without_data(t) for t in tensors
    )


def _ranges(
    options: Options,
    query: Tensor,
    length_k: int,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    kv_starts: Tensor | None,
) -> tuple[Options, Tensor]:
    """``ranges`` of sequences of these lengths, and options that say nothing of it any more."""
    length_q = query.shape[2]
    queries = torch.arange(length_q, dtype=torch.int32, device=query.device)[None]
    queries = beside(queries, q_lengths, kv_lengths, kv_starts)
    if kv_lengths is None:
        end = queries.new_full((1, 1), length_k)
    else:
        end = kv_lengths[:, None].clamp(0, length_k)
    start = exists = None
    if kv_starts is not None:
        start = torch.minimum(kv_starts[:, None].clamp(min=0), end)
    rows: Tensor | int = length_q
    if q_lengths is not None:
        rows = q_lengths[:, None].clamp(0, length_q)
        exists = queries < rows
    at = queries
    if options.causal_align == "bottom-right":
        at = at + (end - rows)
    return _lowered_ranges(options, at, start, end, exists)


def lowered_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    said: Said,
    *,
    draws: bool = True,
) -> Call:
    """Arguments as for :func:`adasplash2.entmax_attention_varlen`, ``draws`` as in :func:`lowered`:
    one batch entry, in which each query sees the keys of its own sequence.

    Raises:
        TypeError, ValueError: as :func:`lowered`.
    """
    for name, tensor in zip(TENSORS, (query, key, value), strict=True):
        check_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have 3 dimensions (total, heads, head_dim), got {tensor.dim()} with "
                f"shape {tuple(tensor.shape)}"
            )
    if _is_causal_bias(said.attn_mask):
        raise TypeError(
            "attn_mask must be a torch.Tensor or None for packed sequences, got a causal mask of "
            "torch: pass is_causal=True and causal_align"
        )
    for other in _LENGTHS:
        if (given := getattr(said, other)) is not None:
            raise ValueError(
                f"{other} must be None for packed sequences, whose lengths are their own, got a "
                f"{type(given).__name__}"
            )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None:
            check_count(name, longest)
    device, total_q, total_k = query.device, query.shape[0], key.shape[0]
    cu_seqlens_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, total_q, device)
    cu_seqlens_k = check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, total_k, device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must have the shape of cu_seqlens_q {tuple(cu_seqlens_q.shape)}, got "
            f"{tuple(cu_seqlens_k.shape)}"
        )
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k[:-1], cu_seqlens_k[1:], cu_seqlens_k=cu_seqlens_k
    )
    return _packed(query, key, value, sequences, said, draws, (max_seqlen_q, max_seqlen_k))


class Sequences(NamedTuple):
    """Of packed queries and keys, int32: where queries of one end and those of the next begin, as
    ``cu_seqlens``, and where each one's keys begin and end. ``holes``: whether every second one,
    from the first on, is a hole, which users know nothing of. ``cu_seqlens_k``, where keys lie one
    behind another too."""

    cu_seqlens_q: Tensor
    key_begins: Tensor
    key_ends: Tensor
    holes: bool = False
    cu_seqlens_k: Tensor | None = None

    def is_self(self) -> bool:
        """Whether sequences surely have as many keys as queries."""
        return self.cu_seqlens_k is self.cu_seqlens_q

    def places(self, total_k: int) -> tuple[list[int], list[int]] | None:
        """See :class:`Packed`; a last entry is what lies behind all. None also where there are no
        sequences."""
        if not is_known(self.cu_seqlens_q, self.key_begins, self.key_ends) or not self.number():
            return None
        bounds = self.cu_seqlens_q.tolist()
        of_queries = [end - begin for begin, end in itertools.pairwise(bounds)]
        of_keys, last = [], 0
        for begin, end in zip(self.key_begins.tolist(), self.key_ends.tolist(), strict=True):
            of_keys += [begin - last, end - begin]
            last = end
        return of_queries, [*of_keys, total_k - last]

    def number(self) -> int:
        """Of those that are no holes."""
        count = self.cu_seqlens_q.shape[0] - 1
        return count // 2 if self.holes else count

    def of_queries(self, total_q: int) -> Tensor:
        """The number of each query's sequence."""
        queries = torch.arange(total_q, dtype=torch.int32, device=self.cu_seqlens_q.device)
        number = torch.searchsorted(self.cu_seqlens_q[1:].contiguous(), queries, right=True)
        return number.clamp(max=self.cu_seqlens_q.shape[0] - 2)

    def spread(self, numbers: Tensor, of_queries: Tensor) -> Tensor:
        """What each sequence has, ``(sequences, heads)``, for each query: ``(1, heads, total_q)``.
        That of a hole is nobody's."""
        if self.holes:
            of_queries = (of_queries - 1).clamp(min=0) // 2
        # In float64 also for the gradients of many queries, which are summed in a fixed order.
        found = numbers.double()[of_queries].to(numbers.dtype)
        return found.transpose(0, 1).contiguous().unsqueeze(0)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    said: Said,
    draws: bool,
    longest: tuple[int | None, int | None],
) -> Call:
    """Tensors ``(total, heads, head_dim)`` as the one entry of a batch, in which each query sees
    the keys of its own sequence."""
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    said, of_each = _of_each_sequence(said, sequences.number(), query)
    options, inputs = lowered(query, key, value, said, draws=draws)[1::-1]
    packed = None
    if options.alpha == 1.0:
        places = sequences.places(key.shape[2])
        packed = Packed(options, sequences, longest, places)
    of_queries = sequences.of_queries(query.shape[2])
    for name, numbers in of_each.items():
        inputs = inputs._replace(**{name: sequences.spread(numbers, of_queries)})
    options, ranges = _packed_ranges(options, sequences, of_queries)

    def shaped(result: Tensor) -> Tensor:
        return result.squeeze(0).transpose(0, 1).contiguous()

    return Call(inputs._replace(ranges=ranges), options, shaped, _as_it_is, packed)


def _of_each_sequence(said: Said, count: int, query: Tensor) -> tuple[Said, dict[str, Tensor]]:
    """What is said without what each of ``count`` sequences has of its own, and this: operands
    ``(count, heads or 1)`` in the compute dtype. What holds for all is said as it was."""
    heads, compute = query.shape[1], compute_dtype(query.dtype)
    found: dict[str, Tensor] = {}
    slopes, scale, rows = said.alibi_slopes, said.scale, (heads, query.shape[2])
    if isinstance(slopes, Tensor) and tuple(slopes.shape) not in ((heads,), (1, heads)):
        check_slopes(slopes)
        if tuple(slopes.shape) != (count, heads):
            raise ValueError(
                f"alibi_slopes must have the shape ({heads},) or ({count}, {heads}), (sequences, "
                f"heads), got {tuple(slopes.shape)}"
            )
        found["alibi_slopes"], said = slopes.to(compute), said._replace(alibi_slopes=None)
    if isinstance(scale, Tensor) and scale.dim() == 2 and _merged(scale, rows, 1) is None:
        _check_numbers("scale", scale)
        raise ValueError(
            f"scale must have the shape ({count}, {heads}, 1), (sequences, heads, 1), where each "
            f"sequence has its own, or broadcast to {rows}, (heads, queries), got "
            f"{tuple(scale.shape)}"
        )
    if isinstance(scale, Tensor) and scale.dim() == 3 and scale.shape[0] != 1:
        _check_numbers("scale", scale)
        if scale.shape[0] != count or scale.shape[1] not in (1, heads) or scale.shape[2] != 1:
            raise ValueError(
                f"scale must be a number, one of each head, ({heads},), or broadcast to "
                f"({count}, {heads}, 1), (sequences, heads, 1), or to (1, {heads}, "
                f"{query.shape[2]}), (1, heads, queries), got {tuple(scale.shape)}"
            )
        found["scales"], said = scale.squeeze(2).to(compute), said._replace(scale=None)
    return said, found


class Cache(NamedTuple):
    """Keys and values of sequences that grow: ``(batch, heads, capacity, head_dim)``, or with a
    ``block_table`` pages ``(pages there are, page_size, heads, head_dim)``."""

    key: Tensor
    value: Tensor
    block_table: Tensor | None

    def heads(self) -> int:
        """Of keys and values."""
        return self.key.shape[1 if self.block_table is None else 2]

    def inputs(self, query: Tensor) -> Inputs:
        """With new queries."""
        key, value = self.key, self.value
        if self.block_table is not None:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        return Inputs(query, key, value, block_table=self.block_table)

    def capacity(self) -> int:
        """Keys that there is room for in a sequence."""
        if self.block_table is None:
            return self.key.shape[2]
        return self.block_table.shape[1] * self.key.shape[1]

    def append(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """Write new keys and values ``(batch, heads, new, head_dim)`` behind the ``lengths`` that
        there are, in place. Nothing waits for a device."""
        batch, _, new, _ = key.shape
        places = lengths[:, None].long() + torch.arange(new, device=key.device)
        if self.block_table is None:
            sequences = torch.arange(batch, device=key.device)[:, None]
            at, held = (sequences, places), (self.key.transpose(1, 2), self.value.transpose(1, 2))
        else:
            size = self.key.shape[1]
            pages = self.block_table.long().gather(1, places // size)
            at, held = (pages, places % size), (self.key, self.value)
        for tensor, added in zip(held, (key, value), strict=True):
            tensor.index_put_(at, added.transpose(1, 2))


def lowered_cached(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache_lengths: Tensor | int | None,
    block_table: Tensor | None,
    said: Said,
) -> tuple[Call, Callable[[], None]]:
    """Arguments as for :func:`adasplash2.entmax_attention_with_kvcache`, which aligns at the bottom
    right and lets heads share. With the call comes what writes new keys into the cache, for when
    nothing can be refused any more.

    Raises:
        TypeError, ValueError: as :func:`lowered`.
    """
    cache = _check_cache(query, key_cache, value_cache, block_table)
    options, alphas, scales = check_options(said)
    new = _check_new(cache, query, key, value)
    if new and cache_lengths is None:
        raise ValueError("cache_lengths must be given with key: it is written behind them")
    if key is not None and value is not None:
        _check_written(cache, key, value)
        query, key, value = (_apart(t, cache) for t in (query, key, value))
    lengths = _cache_lengths(cache, query, cache_lengths, new)
    kv_starts = said.kv_starts
    _check_lengths("kv_starts", kv_starts, query, cache.capacity())
    inputs = _with_numbers(cache.inputs(query), [query.shape[0]], alphas, scales, said)
    if lengths is not None or kv_starts is not None:
        ranges = None
        if lengths is not None and kv_starts is None:
            ranges = _few_ranges(options, query, lengths, new, said.alibi_slopes is not None)
        if ranges is not None:
            options = _said_by_ranges(options)
        else:
            total = None if lengths is None else lengths + new
            options, ranges = _ranges(options, query, cache.capacity(), None, total, kv_starts)
        inputs = inputs._replace(ranges=ranges)

    def append() -> None:
        if key is not None and value is not None and lengths is not None:
            cache.append(key, value, lengths)

    return Call(inputs, options, _as_it_is, _as_it_is), append


def _check_cache(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor | None
) -> Cache:
    named = {"query": query, "key_cache": key_cache, "value_cache": value_cache}
    axes = dict.fromkeys(named, "batch, heads, length, head_dim")
    if block_table is not None:
        axes |= dict.fromkeys(("key_cache", "value_cache"), "pages, page_size, heads, head_dim")
    for name, tensor in named.items():
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions ({axes[name]}), got {tensor.dim()} with shape "
                f"{tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} must have the dtype of query ({query.dtype}), got {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on the device of query ({query.device}), got {tensor.device}"
            )
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(
            f"value_cache must have the first three sizes of key_cache {tuple(key_cache.shape[:3])}"
            f", got {tuple(value_cache.shape[:3])}"
        )
    heads_q, heads = query.shape[1], key_cache.shape[1 if block_table is None else 2]
    if heads == 0 or heads_q % heads:
        raise ValueError(
            f"query must have a multiple of the heads of key_cache ({heads}), got {heads_q}; "
            f"key_cache is ({axes['key_cache']}) = {tuple(key_cache.shape)}"
        )
    if key_cache.shape[3] != query.shape[3]:
        raise ValueError(
            f"key_cache must have the head_dim of query ({query.shape[3]}), got "
            f"{key_cache.shape[3]}"
        )
    if not 1 <= (width := value_cache.shape[3]) <= MAX_HEAD_DIM:
        raise ValueError(f"value_cache must have a head_dim of 1 to {MAX_HEAD_DIM}, got {width}")
    if block_table is None and key_cache.shape[0] != query.shape[0]:
        raise ValueError(
            f"key_cache must have the batch of query ({query.shape[0]}), got {key_cache.shape[0]}"
        )
    if block_table is not None:
        if not isinstance(block_table, Tensor):
            raise TypeError(f"block_table must be a torch.Tensor, got {type(block_table).__name__}")
        if block_table.dim() != 2:
            raise ValueError(
                f"block_table must have the shape ({query.shape[0]}, pages), got "
                f"{tuple(block_table.shape)}"
            )
        shape = query.shape[0], block_table.shape[1]
        check_like("block_table", block_table, shape, torch.int32, query.device)
        count, page_size = key_cache.shape[:2]
        if block_table.shape[1] and not (count and page_size):
            raise ValueError(
                f"key_cache must have pages of at least one key, got {count} pages of {page_size}"
            )
    return Cache(key_cache, value_cache, block_table)


def _check_new(cache: Cache, query: Tensor, key: Tensor | None, value: Tensor | None) -> int:
    """How many keys are new in each sequence."""
    if (key is None) != (value is None):
        missing, given = ("key", "value") if key is None else ("value", "key")
        raise ValueError(f"{missing} must be given with {given}, got None")
    if key is None or value is None:
        return 0
    new = key.shape[2] if isinstance(key, Tensor) and key.dim() == 4 else 0
    for name, tensor, held in (("key", key, cache.key), ("value", value, cache.value)):
        check_tensor(name, tensor)
        shape = query.shape[0], cache.heads(), new, held.shape[3]
        check_like(name, tensor, shape, query.dtype, query.device)
    return new


def _check_written(cache: Cache, key: Tensor, value: Tensor) -> None:
    """Whether what is written stays as it is: no place of a cache is another one too."""
    for name, tensor in (("key_cache", cache.key), ("value_cache", cache.value)):
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{name} must have memory of its own for each place where key is written into it, "
                f"got the strides {tuple(tensor.stride())} for the shape {tuple(tensor.shape)}; "
                "clone() of what was expanded makes it so"
            )
    if is_memory_known() and _begin_alike(cache.key, cache.value) and not _begin_alike(key, value):
        raise ValueError(
            "value_cache must not be in the memory of key_cache where key and value, which are "
            "written into both, are not in the same memory too"
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether strides may lead to one place twice: no where each is beyond what those below it
    reach together."""
    if tensor.is_contiguous():
        return False
    dims = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    for i, (_, stride) in enumerate(dims):
        below = [(n - 1) * s for j, (n, s) in enumerate(dims) if j != i and s <= stride]
        if stride <= sum(below):
            return True
    return False


def _begin_alike(one: Tensor, other: Tensor) -> bool:
    """Whether both begin at the same place in memory, with the same strides."""
    return (
        share_memory(one, other)
        and one.storage_offset() == other.storage_offset()
        and one.stride() == other.stride()
    )


def _apart(tensor: Tensor, cache: Cache) -> Tensor:
    """``tensor``, or a copy where it may lie in the cache, which is written to before all of it has
    been read."""
    if is_memory_known() and not (
        share_memory(tensor, cache.key) or share_memory(tensor, cache.value)
    ):
        return tensor
    return tensor.clone()


def _cache_lengths(
    cache: Cache, query: Tensor, cache_lengths: Tensor | int | None, new: int
) -> Tensor | None:
    """int32 ``(batch,)``, or None where the cache is full."""
    room = cache.capacity() - new
    if room < 0:
        raise ValueError(
            f"key must have at most {cache.capacity()} keys, what the cache holds, got {new}"
        )
    if cache_lengths is None:
        lengths = query.new_full(query.shape[:1], cache.capacity(), dtype=torch.int32)
    elif isinstance(cache_lengths, Tensor):
        lengths = cache_lengths
    else:
        number = check_count("cache_lengths", cache_lengths)
        if number > room:
            raise ValueError(f"cache_lengths must be from 0 to {room}, got {shown(cache_lengths)}")
        lengths = query.new_full(query.shape[:1], number, dtype=torch.int32)
    _check_lengths("cache_lengths", lengths, query, room)
    _check_pages(cache, lengths, new)
    return None if cache_lengths is None else lengths


def _check_pages(cache: Cache, lengths: Tensor, new: int) -> None:
    """Whether there are all pages that sequences of these lengths and ``new`` keys more are in, and
    those of the last, which are written, hold no other keys; as far as that is known. What stands
    behind is not looked at."""
    table = cache.block_table
    if table is None or not is_known(table, lengths):
        return
    size, count = cache.key.shape[1], cache.key.shape[0]
    if not new and (not table.numel() or _within(table, count)):
        return
    lengths = lengths + new
    first = torch.arange(table.shape[1]) * size  # keys of pages
    used = first < lengths[:, None]
    pages = table[used]
    if not pages.numel():
        return
    low, high = (int(number) for number in pages.aminmax())
    if low < 0 or high >= count:
        raise ValueError(
            f"block_table must name pages from 0 to {count - 1} for all keys there are, got "
            f"{low if low < 0 else high}"
        )
    if new and int((times := torch.bincount(pages)).max()) > 1:
        written = table[used & (first + size > lengths[:, None] - new)]
        clash = written[times[written] > 1]
        if clash.numel():
            raise ValueError(
                "block_table must name pages of its own for each sequence where key is written: "
                f"those that others hold too are only read, got page {int(clash[0])} more than once"
            )


def _within(pages: Tensor, count: int) -> bool:
    """Whether all numbers are those of pages."""
    low, high = pages.aminmax()
    return int(low) >= 0 and int(high) < count


class _Jagged(NamedTuple):
    """A jagged ``(batch, heads, length, head_dim)``: sequence ``i`` begins at ``offsets[i]``, and
    ends at ``offsets[i + 1]`` or, where there are ``lengths``, when it is so long. What is behind
    it then is a hole: padding that nobody sees."""

    name: str
    values: Tensor
    offsets: Tensor
    lengths: Tensor | None

    def begins(self) -> Tensor:
        return self.offsets[:-1].to(torch.int32)

    def ends(self) -> Tensor:
        if self.lengths is None:
            return self.offsets[1:].to(torch.int32)
        return self.begins() + self.lengths.to(torch.int32)

    def cu_seqlens(self) -> Tensor:
        """Of its sequences and, where there are ``lengths``, of the holes before, between and
        behind them, which may be empty: a hole first and last, and sequences in between.

        Raises:
            ValueError: they do not lie one behind another.
        """
        total = self.values.shape[0]
        if self.lengths is None:
            bounds = self.offsets.to(torch.int32)
            wrong = "must have offsets that begin with 0, never fall and end at its total"
            _check_bounds(bounds, total, f"{self.name} {wrong}")
            return bounds
        bounds = _with_holes(self.begins(), self.ends())
        bounds = torch.cat([bounds, bounds.new_full((1,), total)])
        wrong = "must have lengths that end each sequence before the next one begins or its total"
        _check_bounds(bounds, total, f"{self.name} {wrong}")
        return bounds


def _with_holes(sequences: Tensor, holes: Tensor) -> Tensor:
    """What is known of each sequence, and of the hole behind it; before all there is one at 0."""
    return torch.cat([holes.new_zeros(1), torch.stack([sequences, holes], dim=1).flatten()])


def _from_nested(
    query: Any, key: Any, value: Any, said: Said
) -> tuple[tuple[Tensor, Tensor, Tensor], Sequences, Callable[[Tensor], Tensor]]:
    """Packed query, key and value of jagged ``(batch, heads, length, head_dim)``, their sequences,
    and what gives a packed result the structure of the query. Holes of queries are sequences
    without a key, those of keys are in no sequence: both have zeros as gradients.

    Raises:
        TypeError, ValueError: not all are jagged and have four dimensions, or masks or lengths are
            given beside them.
    """
    for other in ("attn_mask", *_LENGTHS):
        if (given := getattr(said, other)) is not None:
            raise ValueError(
                f"{other} must be None for nested tensors, whose lengths are their own, got a "
                f"{type(given).__name__}"
            )
    q, k, v = (_jagged(*named) for named in zip(TENSORS, (query, key, value), strict=True))
    for one in (k, v):
        if len(one.offsets) != len(q.offsets):
            raise ValueError(
                f"{one.name} must have the batch of query ({len(q.offsets) - 1}), got "
                f"{len(one.offsets) - 1}"
            )
    cu_seqlens_q = q.cu_seqlens()
    k.cu_seqlens()  # which checks them
    _check_same_places(k, v)
    begins, ends = k.begins(), k.ends()
    holes = q.lengths is not None
    if holes:
        begins, ends = _with_holes(begins, ends), _with_holes(ends, ends)

    def as_query(result: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(result, q.offsets, q.lengths)
        return nested.transpose(1, 2)

    sequences = Sequences(cu_seqlens_q, begins, ends, holes)
    return (q.values, k.values, v.values), sequences, as_query


def _jagged(name: str, tensor: Any) -> _Jagged:
    if not getattr(tensor, "is_nested", False) or tensor.layout != torch.jagged:
        kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"{name} must be a nested tensor of layout torch.jagged, as all or none, got {kind}"
        )
    wanted = "must have 4 dimensions (batch, heads, length, head_dim)"
    if tensor.dim() != 4:
        raise ValueError(f"{name} {wanted}, got {tensor.dim()}")
    if (ragged := ragged_dim(tensor)) != 2:
        raise ValueError(
            f"{name} {wanted} of which length, the third, is ragged; got dimension {ragged + 1} "
            "ragged: transpose(1, 2) takes it from the second place to the third"
        )
    by_length = tensor.transpose(1, 2)
    return _Jagged(name, by_length.values(), by_length.offsets(), by_length.lengths())


def _check_same_places(key: _Jagged, value: _Jagged) -> None:
    """Whether each sequence has its values where its keys are. Nothing waits for a device: there
    it is asserted."""
    if key.offsets is value.offsets and key.lengths is value.lengths:
        return
    wrong = "value must have the sequence lengths of key"
    begins, ends = (key.begins(), value.begins()), (key.ends(), value.ends())
    if not is_known(*begins, *ends):
        tokens, got = key.values.shape[0], value.values.shape[0]
        if got != tokens:  # an error that can be caught, where one is seen without waiting
            raise ValueError(f"{wrong}, {tokens} tokens together, got {got}")
        same = (begins[0] == begins[1]) & (ends[0] == ends[1])
        assert_on_device(same.all(), f"{wrong}, and its offsets")
        return
    lengths = [(end - begin).tolist() for begin, end in zip(begins, ends, strict=True)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"{wrong} {shown(lengths[0])}, got {shown(lengths[1])}")
    if not torch.equal(*begins):
        raise ValueError(
            f"value must have the offsets of key {shown(begins[0].tolist())}, got "
            f"{shown(begins[1].tolist())}: before transpose(1, 2), contiguous() of both makes them "
            "the same"
        )


def _packed_ranges(
    options: Options, sequences: Sequences, number: Tensor
) -> tuple[Options, Tensor]:
    """``ranges`` of sequences that lie one behind another; ``number``: those of the queries."""
    cu_seqlens_q, key_begins, key_ends = sequences[:3]
    queries = torch.arange(number.shape[0], dtype=torch.int32, device=number.device)
    start, end = key_begins[number], key_ends[number]
    first, last = cu_seqlens_q[number], cu_seqlens_q[number + 1]
    at = queries - first + start
    if options.causal_align == "bottom-right":
        at = at + (end - start) - (last - first)
    return _lowered_ranges(options, at[None], start[None], end[None], None)


def _lowered_ranges(
    options: Options, at: Tensor, start: Tensor | None, end: Tensor, exists: Tensor | None
) -> tuple[Options, Tensor]:
    """``ranges`` of queries at the keys ``at``, of sequences with the keys from ``start`` (None:
    the first) to ``end``, and options that say nothing of it any more. All queries exist where
    ``exists`` is None. As few operations as may be: a decoded token waits for each."""
    left, right = options.window_left, options.window_right
    right = 0 if options.is_causal else right
    begin, stop = start, end
    if left >= 0:
        begin = (at - left).clamp(min=0) if start is None else torch.maximum(start, at - left)
        begin = torch.minimum(begin, end)
    if right >= 0:
        stop = torch.minimum(end, at + (right + 1))
        stop = stop.clamp(min=0) if begin is None else torch.maximum(stop, begin)
    if begin is None:
        begin = end.new_zeros((1, 1))
    if exists is not None:
        # Rows that do not exist see nothing, behind all others: neither end ever falls.
        begin, stop = torch.where(exists, begin, end), torch.where(exists, stop, end)
    shape = torch.broadcast_shapes(at.shape, begin.shape, stop.shape)
    ranges = torch.stack([t.expand(shape).to(torch.int32) for t in (begin, stop, at)])
    return _said_by_ranges(options), ranges


def _said_by_ranges(options: Options) -> Options:
    """Options that say nothing of what ``ranges`` say."""
    return options._replace(
        is_causal=False, window_left=-1, window_right=-1, causal_align="top-left"
    )


MOST_LIMITS = 1024
"""Limits that it keeps. None is let go of: a CUDA graph reads them where they lie."""

_limits: dict[Any, tuple[Tensor | None, Tensor, Tensor]] = {}


def _few_ranges(
    options: Options, query: Tensor, lengths: Tensor, new: int, placed: bool
) -> Tensor | None:
    """``ranges`` of few queries at the end of ``lengths`` keys and ``new`` more, as :func:`_ranges`
    has them, by one or two operations: a decoded token waits for each, as long as for a tenth of
    all it computes. Where not ``placed``, nobody asks for the key whose distance is 0.

    Each entry is the length and a number more, within limits. These lie on the device already; None
    where they cannot.
    """
    if torch.compiler.is_compiling() or not is_in_memory(lengths) or query.shape[2] > FEW:
        return None
    length_q, device = query.shape[2], lengths.device
    left, right = options.window_left, 0 if options.is_causal else options.window_right
    key = device, length_q, new, left, right, placed
    limits = _limits.get(key)
    if limits is None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or not is_plain(lengths) or len(_limits) >= MOST_LIMITS:
            return None
        limits = _limits[key] = _limits_of(*key)
    shift, low, high = limits
    at = lengths[None, :, None]
    return torch.clamp(at if shift is None else at + shift, low, high)


def _limits_of(
    device: torch.device, length_q: int, new: int, left: int, right: int, placed: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """What is added to a length, None for nothing, and the least and most that it then is: ``(3, 1,
    length_q)`` each."""
    most = 2**31 - 1
    behind = range(-length_q, 0)  # places of queries behind the last key
    begins = [(new + i - left, 0, most) if left >= 0 else (0, 0, 0) for i in behind]
    ends = [(new + (min(0, i + right + 1) if right >= 0 else 0), 0, most) for i in behind]
    places = [(new + i, i, most) for i in behind] if placed else ends
    said = begins, ends, places
    # From the host, which waits: the next call may be on another stream.
    shift, low, high = (
        torch.tensor([[[e[i] for e in row]] for row in said], dtype=torch.int32, device=device)
        for i in range(3)
    )
    moved = any(entry[0] for row in said for entry in row)
    return shift if moved else None, low, high


def _of_sequences(
    name: str, lengths: Tensor | None, query: Tensor, lead: list[int], limit: int
) -> Tensor | None:
    """``(batch,)``, also from the dimensions ``lead`` that became the batch."""
    if isinstance(lengths, Tensor):
        check_strided(name, lengths)
        if len(lead) != 1:
            if lengths.shape not in (query.shape[:1], tuple(lead)):
                raise ValueError(
                    f"{name} must have the shape {tuple(lead)} or {tuple(query.shape[:1])}, got "
                    f"{tuple(lengths.shape)}"
                )
            lengths = lengths.reshape(-1)
    _check_lengths(name, lengths, query, limit)
    return lengths


def check_length_values(name: str, lengths: Tensor, limit: int) -> None:
    """Whether they are from 0 to ``limit``, as far as that is known.

    Raises:
        ValueError: they are not.
    """
    if is_known(lengths) and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > limit:
            raise ValueError(f"{name} must be from 0 to {limit}, got {low if low < 0 else high}")


def _check_lengths(name: str, lengths: object, query: Tensor, limit: int) -> None:
    """Of each sequence of ``query``; None where they are not given."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(lengths).__name__}")
    check_like(name, lengths, query.shape[:1], torch.int32, query.device)
    check_length_values(name, lengths, limit)


def check_cu_seqlens(name: str, cu_seqlens: object, total: int, device: torch.device) -> Tensor:
    """Cumulative lengths: from 0, never falling, up to ``total``. On a GPU the values are checked
    there: a failed check is an assertion of the device, and nothing waits for it.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{name} must have the shape (sequences + 1,), got {tuple(cu_seqlens.shape)}"
        )
    check_like(name, cu_seqlens, (cu_seqlens.shape[0],), torch.int32, device)
    _check_bounds(cu_seqlens, total, f"{name} must begin with 0, never fall and end at the total")
    return cu_seqlens


def _check_bounds(bounds: Tensor, total: int, wrong: str) -> None:
    """Whether they go from 0 to ``total`` and never fall; ``wrong`` says that they must, and ends
    with the total, behind which its number is said. In a trace it is not: a symbol that becomes
    text is a constant from then on, and each other total needs a graph of its own."""
    if not (torch.compiler.is_compiling() or isinstance(total, torch.SymInt)):
        wrong = f"{wrong} of {total}"
    if is_known(bounds):
        values = bounds.tolist()
        if values[0] != 0 or values[-1] != total or values != sorted(values):
            raise ValueError(f"{wrong}, got {shown(values)}")
    else:
        right = (bounds[0] == 0) & (bounds[-1] == total)
        assert_on_device(right & (bounds[1:] >= bounds[:-1]).all(), wrong)

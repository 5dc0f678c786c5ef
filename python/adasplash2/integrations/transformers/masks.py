"""What a mask of transformers hides, said in numbers that the attention can run.

Models ask a mask function for their mask and hand its answer to every layer's attention. "None"
would not say enough: it is "causal" from one model and "nothing is hidden" from the next, and the
flags of the modules do not always tell which. So ours never answers None. It answers with eager's
own mask, whose numbers are right for any code that looks at them (a model may compute some of its
layers by itself), and that carries what it says in words:

- outside of a trace it is a :class:`StatedMask`, whose numbers are made only if somebody looks;
- within one, the numbers are part of the graph, which drops them where nobody uses them.

What is asked is known from the arguments wherever possible: lengths, offsets, the identity of the
pattern, the window. Reading a padding mask waits for the GPU once a forward, as transformers' own
masks do. Only patterns that are not known by name (packing, windows that bite, images) are looked
at as numbers, once for a mask, not for a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

HIDDEN = -1e4
"""Biases up to here hide a key: exp of them is 0, and no score is as large. Older models write
-1e4 or -1e9, newer ones the lowest number of the dtype."""

PADDING = (
    "padding is not supported yet: run sequences of one length, or one sequence at a time, and "
    "leave attention_mask out"
)
WINDOW = "a window or chunk of {size} that is shorter than the {keys} keys is not supported yet"
OTHER = (
    "only causal masks and those that hide the same keys from all queries are supported yet: no "
    "padding, packing, window that bites, or tree"
)
STATIC = (
    "how much of a static cache is filled cannot be known while compiling or exporting: use a "
    "dynamic cache, or do not compile (disable_compile=True for generate)"
)
BIAS = "a mask may hide keys but not add to scores: biases are not supported"


class Visible(NamedTuple):
    """Which keys the queries see: ``start`` to ``stop`` (None: the end).

    With ``causal`` the last query sees all of them and each earlier one a key less.
    """

    start: int
    stop: int | None
    causal: bool


class Statement(NamedTuple):
    """What a mask says: keys that are visible, or why that cannot be computed.

    ``proof``: a trace cannot look at numbers, so it assumes, and what it assumed is checked
    whenever the graph runs: a tensor that must be True.
    """

    visible: Visible | None
    refusal: str = ""
    proof: Tensor | None = None


class StatedMask(Tensor):
    """Eager's mask, made when somebody looks at its numbers; ``statement`` says it in words."""

    _known: Statement | None
    _make: Callable[[], Tensor]

    @staticmethod
    def of(blank: Tensor, known: Statement | None, make: Callable[[], Tensor]) -> StatedMask:
        """``blank`` gives shape, dtype and device; ``known`` is None where numbers must tell."""
        mask = blank.as_subclass(StatedMask)
        mask._known, mask._make = known, make
        return mask

    @cached_property
    def numbers(self) -> Tensor:
        return self._make()

    @cached_property
    def statement(self) -> Statement:
        return self._known or read(self.numbers)

    def _same(self, func: Any, args: Any, kwargs: dict[str, Any]) -> StatedMask | None:
        """The answer to what layers, checkpoints and model parallelism do to any argument: still
        this mask, perhaps elsewhere. None where its numbers are needed."""
        if func is Tensor.detach:
            return self
        if func is Tensor.__getitem__:
            index = args[0] if isinstance(args[0], tuple) else (args[0],)
            if not all(isinstance(i, slice) or i is Ellipsis for i in index):
                return None
            with torch._C.DisableTorchFunctionSubclass():
                return self if Tensor.__getitem__(self, index).shape == self.shape else None
        scalar = torch.zeros((), dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if not scalar.is_floating_point():
            return None
        blank = scalar.expand(self.shape)
        return StatedMask.of(blank, self._known, lambda: self.numbers.to(*args, **kwargs))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if func in _SAME:
            same = args[0]._same(func, args[1:], kwargs)
            if same is not None:
                return same
        args, kwargs = torch.utils._pytree.tree_map_only(
            StatedMask, lambda mask: mask.numbers, (args, kwargs)
        )
        return func(*args, **kwargs)


_ABOUT = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_meta", "layout")),
}
"""Questions that shape, dtype and device answer."""

_SAME = {Tensor.detach, Tensor.__getitem__, Tensor.to}


def statement_of(mask: Tensor) -> Statement:
    """What ``mask`` says: as its maker stated it, else by its numbers.

    Numbers are read once for a mask and not again by the next layer, unless they changed.
    """
    if isinstance(mask, StatedMask):
        return mask.statement
    stated: Statement | None = getattr(mask, "_adasplash2_stated", None)
    if stated is not None:
        return stated
    if is_tracing(mask):
        return Statement(None, "numbers of a mask cannot be read while compiling or exporting")
    if mask.is_inference():  # its changes are not counted
        return read(mask)
    version, statement = getattr(mask, "_adasplash2_read", (None, None))
    if version != mask._version:
        statement = read(mask)
        mask._adasplash2_read = mask._version, statement  # type: ignore[attr-defined]
    return statement or Statement(None)


def read(mask: Tensor) -> Statement:
    """What a mask's numbers say: ``(batch, heads, length_q, length_k)``, 1 where all are alike.

    bool: True is visible. Floats are added to scores: 0 is visible, :data:`HIDDEN` hidden.
    """
    if mask.dtype == torch.bool:
        visible = mask
    elif mask.is_floating_point():
        visible = mask == 0
        if not (visible | (mask <= HIDDEN)).all():
            return Statement(None, BIAS)
    else:
        return Statement(None, f"a mask must be of bools or floats, got {mask.dtype}")
    first = visible[0, 0]
    if not (visible == first).all():
        return Statement(None, PADDING)
    span = _span(first[-1])
    if span is None:
        return Statement(None, OTHER)
    start, stop = span
    rows = first.shape[0]
    expected = torch.zeros_like(first)
    expected[:, start:stop] = True
    if first.equal(expected):
        return Statement(Visible(start, stop, False))
    if rows <= stop - start and first.equal(expected.tril(stop - rows)):
        return Statement(Visible(start, stop, True))
    return Statement(None, OTHER)


def _span(row: Tensor) -> tuple[int, int] | None:
    """Start and stop of the only run of True in a row, None where that does not say it all."""
    places = row.nonzero().flatten().tolist()
    if not places or places[-1] - places[0] + 1 != len(places):
        return None
    return places[0], places[-1] + 1


def is_tracing(like: Tensor | None = None) -> bool:
    """Whether numbers cannot be read: a compiler, an export, a CUDA graph, no data at all."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    if like is not None and (like.is_meta or isinstance(like, torch._subclasses.FakeTensor)):
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def mask_function() -> Callable[..., Tensor]:
    """What ``transformers.AttentionMaskInterface`` calls for our attention.

    transformers asks by keywords. Where the queries stand is ``q_offset``, a number, or a tensor
    for a static cache; in older releases ``cache_position``, a tensor, and ``kv_offset`` may be
    one too.
    """
    from transformers import masking_utils as theirs

    bidirectional = getattr(theirs, "bidirectional_mask_function", None)

    def mask(
        *,
        batch_size: int,
        kv_length: int,
        kv_offset: int | Tensor = 0,
        q_length: int = 0,
        q_offset: int | Tensor = 0,
        cache_position: Tensor | None = None,
        mask_function: Callable[..., Any] = theirs.causal_mask_function,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **rest: Any,
    ) -> Tensor:
        if cache_position is None:
            asked: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset, "device": device}
        else:
            q_length, q_offset, device = (
                cache_position.shape[0],
                cache_position[0],
                cache_position.device,
            )
            asked = {"cache_position": cache_position}

        def numbers() -> Tensor:
            make: Any = theirs.eager_mask
            out: Tensor = make(
                batch_size=batch_size,
                kv_length=kv_length,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                dtype=dtype,
                **asked,
                **rest,
            )
            return out

        causal = mask_function is theirs.causal_mask_function
        everything = bidirectional is not None and mask_function is bidirectional
        # These tell that nothing was added to the pattern that comes with `local_size`.
        if local_size is not None:
            causal = causal or allow_is_causal_skip
            everything = everything or (not causal and allow_is_bidirectional_skip)

        blank = torch.zeros((), dtype=dtype, device=device).expand(
            batch_size, 1, q_length, kv_length
        )
        if is_tracing(blank):
            made = numbers()
            made._adasplash2_stated = _assumed(  # type: ignore[attr-defined]
                made,
                causal=not (everything or allow_is_bidirectional_skip),
                certain=(causal or everything) and attention_mask is None,
                q_offset=q_offset,
                kv_offset=kv_offset,
                local_size=local_size,
                static=cache_position is None and isinstance(q_offset, Tensor),
            )
            return made

        known = None
        if causal or everything:
            known = _stated(
                causal, q_length, q_offset, kv_length, kv_offset, attention_mask, local_size
            )
        return StatedMask.of(blank, known, numbers)

    return mask


def _stated(
    causal: bool,
    q_length: int,
    q_offset: int | Tensor,
    kv_length: int,
    kv_offset: int | Tensor,
    attention_mask: Tensor | None,
    local_size: int | None,
) -> Statement | None:
    """A pattern that is known by name, in words; None where only its numbers can tell."""
    length, kv_offset = kv_length, int(kv_offset)
    if causal:
        # The keys up to the last query. Where the queries stand is a tensor for a static cache.
        length = int(q_offset) + q_length - kv_offset
    if local_size is not None and kv_offset + max(length, kv_length) > local_size:
        # A single query may see a part of the keys; of several each sees another.
        return (
            Statement(None, WINDOW.format(size=local_size, keys=length)) if q_length > 1 else None
        )
    start, stop = 0, min(length, kv_length)
    if attention_mask is not None:
        # Keys beyond the end of a padding mask are hidden. All sequences must hide the same.
        keys = attention_mask[:, kv_offset : kv_offset + stop].bool().cpu()
        span = _span(keys[0]) if keys.shape[1] and (keys == keys[0]).all() else None
        if span is None:
            return Statement(None, PADDING)
        # Causal queries among hidden keys would see other numbers of keys than their place says.
        if causal and (span[1] != stop or (span[0] > stop - q_length)):
            return Statement(None, PADDING)
        start, stop = span
    if causal and length > kv_length:
        return None  # some queries stand beyond the keys
    if causal and stop - start < q_length:
        return Statement(None, OTHER)
    return Statement(Visible(start, stop, causal and q_length > 1))


def _assumed(
    mask: Tensor,
    causal: bool,
    certain: bool,
    q_offset: int | Tensor,
    kv_offset: int | Tensor,
    local_size: int | None,
    static: bool,
) -> Statement:
    """What a trace takes ``mask`` to say, with a proof wherever the arguments do not suffice.

    A graph has room for one case only: keys without padding, and queries at their end. That a
    tensor holds no padding and positions no packing is known when the graph runs.
    """
    q_length, kv_length = mask.shape[-2], mask.shape[-1]
    kv_offset = 0 if isinstance(kv_offset, Tensor) else kv_offset  # then q_offset is one too
    if local_size is not None and kv_offset + kv_length > local_size:
        return Statement(None, WINDOW.format(size=local_size, keys=kv_length))
    if causal and static:
        return Statement(None, STATIC)
    if causal and isinstance(q_offset, Tensor):
        certain = False
    elif causal and q_offset + q_length != kv_offset + kv_length:
        return Statement(None, OTHER)
    visible = Visible(0, None, causal and q_length > 1)
    if certain:
        return Statement(visible)
    expected = torch.ones(q_length, kv_length, dtype=torch.bool, device=mask.device)
    if causal:
        expected = expected.tril(kv_length - q_length)
    return Statement(visible, proof=((mask == 0) == expected).all())

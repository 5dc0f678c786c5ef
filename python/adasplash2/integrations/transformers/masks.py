"""What a mask of transformers hides, said in the arguments of :func:`adasplash2.entmax_attention`.

Models ask a mask function for their mask and hand its answer to every layer's attention. "None"
would not say enough: it is "causal" from one model and "nothing is hidden" from the next, and the
flags of the modules do not always tell which. So ours never answers None. It answers with eager's
own mask, whose numbers are right for any code that looks at them (a model may compute some of its
layers by itself), and that carries what it says in words, a :class:`Statement`:

- outside of a trace it is a :class:`StatedMask`, whose numbers are made only if somebody looks (of
  one token and a static cache they are made at once: a compiled model reads them);
- within one, the numbers are part of the graph, which drops them where nobody uses them.

Causal masks, windows, padding, the filled part of a static cache and packed sequences are known
from the arguments, and no tensor of queries by keys is made for them. Only what has no name (trees,
images, chunks that bite) becomes a bool mask, once for a mask, not for a layer. Reading a padding
mask waits for the GPU once a forward, as transformers' own masks do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adasplash2.torch_fastpath import is_mapped, is_without_data, version_of

HIDDEN = -1e4
"""Biases up to here hide a key: exp of them is 0, and no score is as large. Older models write
-1e4 or -1e9, newer ones the lowest number of the dtype."""


class Statement(NamedTuple):
    """What a mask says, for :func:`adasplash2.entmax_attention`.

    Attributes:
        is_causal, window, causal_align: as there.
        start, stop: keys outside are seen by no query and may be cut off; None for the end. All
            that follows is about the keys that are left.
        attn_mask: as there, four dimensions.
        q_lengths, kv_lengths, kv_starts: as there.
        cu_seqlens: where sequences begin that are packed in ``(batch * length)``; each query sees
            its own sequence only.
        is_whole: a padding mask was given, which hides nothing: rows are one sequence each.
    """

    is_causal: bool = False
    window: tuple[int, int] | None = None
    causal_align: str = "bottom-right"
    start: int = 0
    stop: int | None = None
    attn_mask: Tensor | None = None
    q_lengths: Tensor | None = None
    kv_lengths: Tensor | None = None
    kv_starts: Tensor | None = None
    cu_seqlens: Tensor | None = None
    is_whole: bool = False

    def is_causal_alone(self) -> bool:
        """Whether it is causal, perhaps within a window, and nothing else is said."""
        said = Statement(True, self.window, self.causal_align, stop=self.stop)
        return all(one is other for one, other in zip(self, said, strict=True))


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
            found = super().__torch_function__(func, (StatedMask,), (self, index))
            return self if found.shape == self.shape else None
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
            return super().__torch_function__(func, types, args, kwargs)
        kwargs = kwargs or {}
        if func in _SAME:
            same = args[0]._same(func, args[1:], kwargs)
            if same is not None:
                return same
        return func(*_numbers_in(args), **_numbers_in(kwargs))


def _numbers_in(value: Any) -> Any:
    """The argument of a function of torch, or several, with the numbers of masks."""
    if isinstance(value, StatedMask):
        return value.numbers
    if isinstance(value, dict):
        return {name: _numbers_in(one) for name, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_numbers_in, value))
    return value


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
    # A bias with a gradient is read for none of its numbers; of inference tensors changes are not
    # counted.
    if is_tracing(mask) or mask.requires_grad or mask.is_inference():
        return read(mask)
    version, statement = getattr(mask, "_adasplash2_read", (None, None))
    if version is None or version != version_of(mask) or statement is None:
        statement = read(mask)
        mask._adasplash2_read = version_of(mask), statement  # type: ignore[attr-defined]
    return statement


def read(mask: Tensor) -> Statement:
    """What a mask's numbers say: ``(batch, heads, length_q, length_k)``, 1 where all are alike.

    bool: True is visible. Floats are added to scores, and hide from :data:`HIDDEN` on. Whether
    they are plain, and need no mask, is seen where numbers can be looked at.

    Raises:
        ValueError: ``mask`` holds neither.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attention_mask must be of bools or floats, got {mask.dtype}")
    visible = mask
    if mask.is_floating_point():
        hidden = mask <= HIDDEN
        visible = mask == 0
        if is_tracing(mask) or mask.requires_grad or not (visible | hidden).all():
            return Statement(attn_mask=mask.masked_fill(hidden, -torch.inf))
    elif is_tracing(mask):
        return Statement(attn_mask=mask)
    first = visible[0, 0]
    places = first[-1].nonzero().flatten().tolist()
    if places and (visible == first).all():
        start, stop, rows = places[0], places[-1] + 1, first.shape[0]
        expected = torch.zeros_like(first)
        expected[:, start:stop] = True
        if first.equal(expected):
            return Statement(start=start, stop=stop)
        if rows <= stop - start and first.equal(expected.tril(stop - rows)):
            return Statement(is_causal=True, start=start, stop=stop)
    return Statement(attn_mask=visible)


def is_tracing(like: Tensor | None = None) -> bool:
    """Whether numbers cannot be read: a compiler, an export, a CUDA graph, no data at all."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    # Asked in every layer: of a plain tensor torch's question takes 5 microseconds.
    if like is not None and (like.is_meta or (type(like) is not Tensor and is_without_data(like))):
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Pattern(NamedTuple):
    """What a mask function of transformers hides besides padding.

    Attributes:
        left, right: keys before and behind a query's own place that it sees; -1 for all.
        chunk: queries see keys of their own chunk of so many; -1 for no chunks.
        packed: ``(batch, length)``: queries see keys of their own number.
    """

    left: int = -1
    right: int = -1
    chunk: int = -1
    packed: Tensor | None = None


class Place(NamedTuple):
    """Where ``q_length`` queries and ``kv_length`` keys stand in their sequence; tensors for static
    caches, and always for queries in older releases."""

    q_length: int
    q_offset: int | Tensor
    kv_length: int
    kv_offset: int | Tensor


def mask_function(packed: bool = True) -> Callable[..., Tensor]:
    """What ``transformers.AttentionMaskInterface`` calls for our attention; ``packed`` as
    :func:`~adasplash2.integrations.transformers.apply` has it.

    transformers asks by keywords. Where the queries stand is ``q_offset``, in older releases the
    first of ``cache_position``.
    """
    from transformers import masking_utils as theirs

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
        config: Any = None,
        **rest: Any,
    ) -> Tensor:
        # Offsets may be a cache's own counters, and numbers are made when it has counted on.
        q_offset, kv_offset = _kept(q_offset), _kept(kv_offset)
        asked: dict[str, Any] = {"cache_position": cache_position}
        if cache_position is None:
            asked = {"q_length": q_length, "q_offset": q_offset, "device": device}
        else:
            q_length, q_offset = cache_position.shape[0], cache_position[0]
            device = cache_position.device

        def visible() -> Tensor:
            make: Any = theirs.sdpa_mask
            out: Tensor = make(
                batch_size=batch_size,
                kv_length=kv_length,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
                **asked,
                **rest,
            )
            return out

        def numbers(seen: Tensor) -> Tensor:  # as eager_mask
            return torch.where(seen, torch.zeros((), dtype=dtype, device=device), low)

        low = torch.finfo(dtype).min
        place = Place(q_length, q_offset, kv_length, kv_offset)
        blank = torch.zeros((), dtype=dtype, device=device).expand(
            batch_size, 1, q_length, kv_length
        )
        # The flags tell that nothing was added to the pattern that comes with a size.
        alone = allow_is_causal_skip or allow_is_bidirectional_skip
        if not is_tracing(blank):
            pattern = _pattern(mask_function, theirs)
            if pattern is not None and pattern.packed is not None and not packed:
                raise ValueError(
                    "packed=False: position_ids of this batch begin anew within a row, so that "
                    "several sequences are packed into it; leave out position_ids, or packed=False"
                )
            known = _stated(pattern, place, attention_mask, batch_size) if pattern else None
            if q_length > 1 or alone:
                return StatedMask.of(blank, known, lambda: numbers(visible()))
            # One token against a static cache. generate gives this mask to a compiled model, which
            # takes plain tensors and reads what they hold, not what was said of this one.
            made = numbers(visible())
            made._adasplash2_read = version_of(made), known or read(made)  # type: ignore[attr-defined]
            return made
        pattern = _named(mask_function, theirs)
        # Of what has no size only packing is joined; functions that callers join ask for vmap.
        joined = _made_by(mask_function, theirs) == "and_masks" and not rest.get("use_vmap", True)
        unpacked = joined and attention_mask is None and not packed
        if pattern is None and local_size is not None and (alone or unpacked):
            pattern = _local(local_size, allow_is_causal_skip or unpacked, config)
        elif pattern is None and unpacked:
            pattern = Pattern(right=0)
        elif pattern is None and local_size is None and joined and attention_mask is None:
            pattern = _traced_packing(mask_function, batch_size, q_length, device)
        known = _stated(pattern, place, attention_mask, batch_size, True) if pattern else None
        seen = visible()
        made = numbers(seen)
        made._adasplash2_stated = known or Statement(attn_mask=seen)  # type: ignore[attr-defined]
        return made

    return mask


def _kept(offset: int | Tensor) -> int | Tensor:
    return offset.clone() if isinstance(offset, Tensor) and not is_tracing(offset) else offset


# Patterns


def _named(function: Callable[..., Any], theirs: Any) -> Pattern | None:
    """A pattern that is known by its identity."""
    if function is theirs.causal_mask_function:
        return Pattern(right=0)
    if function is getattr(theirs, "bidirectional_mask_function", None):
        return Pattern()
    return None


def _made_by(function: Callable[..., Any], theirs: Any) -> str:
    """The function of transformers that made ``function``; "" where none did."""
    ours = getattr(function, "__module__", None) == theirs.__name__
    return str(function.__qualname__).partition(".")[0] if ours else ""


def _pattern(function: Callable[..., Any], theirs: Any) -> Pattern | None:
    """The pattern that a mask function of transformers makes, by its name and what it closed over;
    None where it has no words. Compilers cannot look into closures: not for traces."""
    named = _named(function, theirs)
    name = _made_by(function, theirs)
    if named is not None or not name:
        return named
    over = inspect.getclosurevars(function).nonlocals
    if name == "and_masks" and "mask_functions" in over:
        found = Pattern()
        for part in over["mask_functions"]:
            pattern = _pattern(part, theirs)
            if pattern is None or (found.packed is not None and pattern.packed is not None):
                return None
            found = Pattern(
                left=_narrower(found.left, pattern.left),
                right=_narrower(found.right, pattern.right),
                chunk=_narrower(found.chunk, pattern.chunk),
                packed=pattern.packed if found.packed is None else found.packed,
            )
        return found
    if name == "sliding_window_overlay" and "sliding_window" in over:
        return Pattern(left=over["sliding_window"] - 1)
    if name == "sliding_window_bidirectional_overlay" and "sliding_window" in over:
        return Pattern(left=over["sliding_window"], right=over["sliding_window"])
    if name in ("chunked_overlay", "_legacy_chunked_overlay") and "chunk_size" in over:
        return Pattern(chunk=over["chunk_size"])
    if name == "packed_sequence_mask_function" and "packed_sequence_mask" in over:
        return Pattern(packed=over["packed_sequence_mask"])
    return None


def _traced_packing(
    function: Callable[..., Any], batch: int, length: int, device: torch.device | str
) -> Pattern:
    """The pattern of packed sequences in a trace, where no closure tells it: what transformers adds
    to a causal mask whenever positions may begin anew. A sequence begins where the token before is
    not visible."""
    tokens = torch.arange(length, device=device)[None]
    of = torch.arange(batch, device=device)[:, None]
    joined = function(of, torch.zeros_like(of), tokens, (tokens - 1).clamp(min=0))
    return Pattern(right=0, packed=(~joined).expand(batch, length).cumsum(1))


def _narrower(side: int, other: int) -> int:
    """The smaller of two sizes of which -1 is no limit."""
    return max(side, other) if -1 in (side, other) else min(side, other)


def _local(size: int, is_causal: bool, config: Any) -> Pattern:
    """The pattern that comes with a ``local_size``: a window where the config says so, else a
    chunk."""
    if size != getattr(config, "sliding_window", None) or size == getattr(
        config, "attention_chunk_size", None
    ):
        return Pattern(right=0 if is_causal else -1, chunk=size)
    return Pattern(left=size - 1, right=0) if is_causal else Pattern(left=size, right=size)


# Words


def _stated(
    pattern: Pattern,
    place: Place,
    attention_mask: Tensor | None,
    batch: int,
    tracing: bool = False,
) -> Statement | None:
    """A pattern and padding (``(batch, keys)``, True for tokens) in words; None where only numbers
    can tell."""
    rows, keys, causal = place.q_length, place.kv_length, pattern.right == 0
    q_offset, kv_offset = place.q_offset, place.kv_offset
    if not tracing:
        q_offset, kv_offset = int(q_offset), int(kv_offset)
    elif isinstance(kv_offset, Tensor):
        return None
    if pattern.chunk >= 0 and not _surely(kv_offset + keys <= pattern.chunk, tracing):
        return None
    if pattern.packed is not None:
        if attention_mask is not None or rows != keys:
            return None
        cu_seqlens = _boundaries(pattern.packed, tracing)
        return Statement(causal, _window(pattern, keys, tracing), cu_seqlens=cu_seqlens)
    # The queries end where the keys do, or the filled part of a static cache.
    begins = rows == keys if isinstance(q_offset, Tensor) else q_offset == kv_offset
    end: int | Tensor = keys
    if causal and not (begins and rows == keys):
        end = q_offset + rows - kv_offset
    elif not causal and not begins and _window(pattern, keys, tracing):
        return None
    start, stop = 0, keys
    if not isinstance(end, Tensor):
        if end > keys:
            return None  # some queries stand beyond the keys
        stop = end
    window = _window(pattern, stop, tracing)
    align = "bottom-right" if causal else "top-left"
    said = Statement(causal, window, align, stop=None if stop == keys else stop)
    if causal and rows == 1 and not isinstance(end, Tensor):  # sees a run of keys
        start = max(0, stop - 1 - pattern.left) if window else 0
        said = Statement(start=start, stop=said.stop)
    if attention_mask is not None:
        end = end - start if isinstance(end, Tensor) else stop - start
        seen = attention_mask[:, kv_offset + start : kv_offset + stop].bool()
        # Keys beyond the end of a padding mask are hidden.
        seen = F.pad(seen, (0, stop - start - seen.shape[1]))
        return _padded(said, seen, end, rows if causal else None, tracing)
    if isinstance(end, Tensor):
        said = said._replace(kv_lengths=end.to(torch.int32).expand(batch))
    return said


def _window(pattern: Pattern, keys: int, tracing: bool) -> tuple[int, int] | None:
    """The window where it bites, or may; a causal one says its right side by itself."""
    window = pattern.left, -1 if pattern.right == 0 else pattern.right
    bites = [side >= 0 and not _surely(keys <= side + 1, tracing) for side in window]
    return window if any(bites) else None


def _surely(truth: bool, tracing: bool) -> bool:
    """Whether it is true for all lengths that an export is to serve: one that branched would serve
    those alone for which it went the same way. What is compiled is compiled again for others."""
    if not (tracing and torch.compiler.is_exporting()):
        return truth
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(truth)


def _padded(
    said: Statement, seen: Tensor, end: int | Tensor, rows: int | None, tracing: bool
) -> Statement:
    """``said`` without the keys that are not in ``seen``, ``(batch, keys)``: as lengths and starts,
    and a mask where there are holes in between. A trace cannot know that there are none.

    ``rows``: the queries are the last so many tokens before ``end``; those behind the last key of
    their sequence are padding too. None where queries are other tokens, or where not known.
    """
    device, keys = seen.device, seen.shape[1]
    known = seen if tracing else seen.cpu()
    if not tracing and known.all():
        return said._replace(is_whole=True)
    places = torch.arange(keys, device=known.device)
    last = torch.where(known, places + 1, 0).amax(1)
    if isinstance(end, Tensor):
        last = torch.minimum(last, end)
    first = torch.minimum(torch.where(known, places, keys).amin(1), last)
    if tracing or not known.sum(1).equal(last - first):
        said = said._replace(attn_mask=seen[:, None, None, :])

    def lengths(numbers: Tensor) -> Tensor:
        return numbers.to(device, torch.int32)

    if tracing or first.any():
        said = said._replace(kv_starts=lengths(first))
    if tracing or not (last == end).all():
        said = said._replace(kv_lengths=lengths(last))
        if rows is not None:
            said = said._replace(q_lengths=lengths((last - end + rows).clamp(0, rows)))
    return said


def goes_back(position_ids: Tensor, rows: int) -> bool:
    """Whether positions of ``rows`` tokens go back to 0 within a row, as those of several sequences
    that are packed into it do; no where they cannot be looked at."""
    if rows < 2 or position_ids.dim() != 2 or position_ids.shape[1] != rows:
        return False
    if is_tracing(position_ids) or is_mapped(position_ids):
        return False
    return bool(((position_ids[:, 1:] == 0) & (position_ids[:, :-1] > 0)).any())


def _boundaries(packed: Tensor, tracing: bool) -> Tensor | None:
    """Where sequences begin in ``(batch * length)`` tokens, and the total; None where each row is
    one sequence. A trace cannot count them: there empty ones follow, as many as there are tokens
    left."""
    first = F.pad(packed.diff() != 0, (1, 0), value=True).flatten()
    total = first.shape[0]
    if tracing:
        places = torch.arange(total, device=first.device)
        begins = torch.where(first, places, total).sort().values
    else:
        begins = first.nonzero().flatten()
        if begins.shape[0] == packed.shape[0]:
            return None
    # Joined, not padded: of a number that pads, a trace makes a constant.
    end = torch.full((1,), total, dtype=begins.dtype, device=begins.device)
    return torch.cat([begins, end]).to(torch.int32)

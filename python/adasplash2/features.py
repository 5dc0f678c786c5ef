"""Which backend computes what: a table of all that a call may ask, out of the backends' refusals.

Needs none of their devices: it asks for what holds on every one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from adasplash2.backends import REGISTRY
from adasplash2.contract import Backend
from adasplash2.lowering import lowered, lowered_cached, lowered_packed
from adasplash2.options import Said
from adasplash2.problem import DTYPES, FEW, Problem, validated

BEGIN = "<!-- written by `adasplash2 features --markdown` -->"
END = "<!-- until here -->"

BATCH, HEADS_Q, HEADS_KV, LENGTH_Q, LENGTH_K, HEAD_DIM = 2, 4, 2, 64, 96, 32
"""Of the calls that backends are asked about: nothing of it is what they refuse."""


class Call(NamedTuple):
    """Arguments of ``entmax_attention`` beside query, key and value, or of
    ``entmax_attention_with_kvcache`` over pages, or where ``packed`` of
    ``entmax_attention_varlen``."""

    said: dict[str, Any]
    dtype: torch.dtype = torch.float32
    paged: bool = False
    length_q: int = LENGTH_Q
    packed: bool = False

    def problem(self, needs_grad: bool) -> Problem:
        """Validated as a user's call is."""
        meta: dict[str, Any] = {"dtype": self.dtype, "device": "meta"}
        if self.paged:
            pages = torch.empty((8, 16, HEADS_KV, HEAD_DIM), **meta)
            table = _tensor(BATCH, 4, dtype=torch.int32)
            query = torch.empty((BATCH, HEADS_Q, self.length_q, HEAD_DIM), **meta)
            said = Said(**self.said, enable_gqa=True, causal_align="bottom-right")
            (inputs, options, *_), _ = lowered_cached(
                query, pages, pages, None, None, _LENGTHS, table, said
            )
            return validated(inputs, options, False)
        key = torch.empty((BATCH, HEADS_KV, LENGTH_K, HEAD_DIM), **meta)
        query = torch.empty((BATCH, HEADS_Q, self.length_q, HEAD_DIM), **meta)
        said = Said(**self.said, enable_gqa=True)
        if self.packed:
            query, key = (t.transpose(1, 2).flatten(0, 1) for t in (query, key))
            places = _tensor(BATCH + 1, dtype=torch.int32)
            inputs, options, *_ = lowered_packed(query, key, key, places, places, None, None, said)
        else:
            inputs, options, *_ = lowered(query, key, key, said)
        return validated(inputs, options, needs_grad)


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_LENGTHS = _tensor(BATCH, dtype=torch.int32)
_EACH_LENGTH = {"q_lengths": _LENGTHS, "kv_lengths": _LENGTHS, "kv_starts": _LENGTHS}
_MASK = BATCH, HEADS_Q, LENGTH_Q, LENGTH_K

ROWS: dict[str, list[Call]] = {
    "`is_causal`, `enable_gqa`, lengths that differ": [Call({}), Call({"is_causal": True})],
    '`causal_align="bottom-right"`': [Call({"is_causal": True, "causal_align": "bottom-right"})],
    "`window`": [Call({"window": (9, 4)}), Call({"window": (9, -1), "is_causal": True})],
    "`attn_mask`, bool": [Call({"attn_mask": _tensor(*_MASK, dtype=torch.bool)})],
    "`attn_mask`, added": [Call({"attn_mask": _tensor(*_MASK)})],
    "`alibi_slopes`": [Call({"alibi_slopes": _tensor(HEADS_Q), "is_causal": True})],
    "`alibi_slopes` and `scale` of each packed sequence": [
        Call({"alibi_slopes": _tensor(BATCH, HEADS_Q)}, packed=True),
        Call({"scale": _tensor(BATCH, HEADS_Q, 1)}, packed=True),
    ],
    "`softcap`": [Call({"softcap": 30.0})],
    "`sinks`": [Call({"sinks": _tensor(HEADS_Q)})],
    "`dropout_p`": [Call({"dropout_p": 0.1})],
    "`scale` as a tensor": [
        Call({"scale": _tensor(HEADS_Q)}),
        Call({"scale": _tensor(BATCH, HEADS_Q, LENGTH_Q)}),
    ],
    "`alpha` as a tensor": [Call({"alpha": _tensor(HEADS_Q)})],
    "`q_lengths`, `kv_lengths`, `kv_starts`, packed sequences": [Call(_EACH_LENGTH)],
    '`causal_align="bottom-right"`, `window` and lengths of up to 16 queries': [
        Call({"is_causal": True, "causal_align": "bottom-right"}, length_q=FEW),
        Call({"window": (9, 4)}, length_q=FEW),
        Call(_EACH_LENGTH, length_q=FEW),
    ],
    "a paged cache (`block_table`), up to 16 queries": [Call({}, paged=True, length_q=FEW)],
    "a paged cache, more queries": [Call({}, paged=True)],
    **{str(dtype).removeprefix("torch."): [Call({}, dtype)] for dtype in DTYPES},
    "`alpha` 1.5 and 2": [Call({"alpha": 1.5}), Call({"alpha": 2.0})],
    "other `alpha` from 1.1 to 2": [Call({"alpha": alpha}) for alpha in (1.1, 1.25, 1.9)],
    "`alpha` 1.01, bfloat16": [Call({"alpha": 1.01}, torch.bfloat16)],
    "`alpha` 1.01, float32": [Call({"alpha": 1.01})],
    "`alpha` 3, bfloat16": [Call({"alpha": 3.0}, torch.bfloat16)],
    "`alpha` 3, float16": [Call({"alpha": 3.0}, torch.float16)],
    "`alpha` 40, float32": [Call({"alpha": 40.0})],
}
"""What may be asked, in words, and the calls that stand for it."""


class Answer(NamedTuple):
    """Of one backend: ``"yes"``, ``"forward"`` (without gradients), ``"no"``, and its reasons."""

    word: str
    reasons: tuple[str, ...] = ()


def table() -> dict[str, dict[str, Answer]]:
    """By what is asked, each backend's answer."""
    return {
        label: {name: _answer(module, calls) for name, module in _backends()}
        for label, calls in ROWS.items()
    }


def _backends() -> Iterator[tuple[str, Backend | Exception]]:
    for name, module in REGISTRY.items():
        try:
            yield name, importlib.import_module(module)  # type: ignore[misc]
        except Exception as error:  # a broken installation raises whatever it likes
            yield name, error


def _answer(backend: Backend | Exception, calls: list[Call]) -> Answer:
    if isinstance(backend, Exception):
        return Answer("no", (f"its module does not import ({backend})",))
    reasons: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for needs_grad, found in reasons.items():
        for call in calls:
            found.update(dict.fromkeys(backend.refusals_anywhere(call.problem(needs_grad))))
            if needs_grad and call.paged:
                found["a cache has no gradient"] = None
    if not reasons[True]:
        return Answer("yes")
    return Answer("no" if reasons[False] else "forward", tuple(reasons[True]))


def markdown() -> str:
    """The table as the documentation has it, between :data:`BEGIN` and :data:`END`."""
    lines = [BEGIN, f"| | {' | '.join(f'`{name}`' for name in REGISTRY)} |"]
    lines.append("|---" * (len(REGISTRY) + 1) + "|")
    for label, answers in table().items():
        lines.append(f"| {label} | {' | '.join(a.word for a in answers.values())} |")
    return "\n".join([*lines, END])

"""What parts of torch that few programs load must be told of our operators: how many operations
they stand for, and how they are sharded. Loading these parts takes seconds, so that they are told
once a program loads them.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adasplash2.lowering import is_known
from adasplash2.problem import DIFFERENTIABLE, Inputs

logger = logging.getLogger("adasplash2")


def register() -> None:
    """Tell those that are loaded now, the others when they are."""
    _when_loaded("torch.utils.flop_counter", _register_flops)
    _when_loaded("torch.distributed.tensor", _register_shardings)


def _when_loaded(name: str, tell: Callable[[], None]) -> None:
    if name in sys.modules:
        _tell(tell)
    else:
        sys.meta_path.insert(0, _Watcher(name, tell))


def _tell(tell: Callable[[], None]) -> None:
    """Never the reason why somebody's import fails."""
    try:
        tell()
    except Exception as error:
        logger.warning("adasplash2 cannot tell torch of its operators (%s)", error)


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself: calls ``tell`` once the module ``name`` has been loaded."""

    def __init__(self, name: str, tell: Callable[[], None]) -> None:
        self.name, self.tell = name, tell

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_tell(module: ModuleType) -> None:
            load(module)
            _tell(self.tell)

        spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec


# Operations


def attention_flops(*arguments: Any, **named: Any) -> int:
    """Of the forward operator with these arguments, as torch counts SDPA's: two dense products over
    :func:`_pairs`."""
    given = _given(torch.ops.adasplash2.attention_forward.default, arguments, named)
    return 2 * _pairs(given) * int(given["query"].shape[3] + given["value"].shape[3])


def attention_backward_flops(*arguments: Any, **named: Any) -> int:
    """As torch counts those of SDPA that keep no scores: five dense products."""
    given = _given(torch.ops.adasplash2.attention_backward.default, arguments, named)
    return 2 * _pairs(given) * int(3 * given["query"].shape[3] + 2 * given["value"].shape[3])


def _given(operator: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    names = (argument.name for argument in operator._schema.arguments)
    return dict(zip(names, arguments, strict=False), **named)


def _pairs(given: dict[str, Any]) -> int:
    """Pairs of queries and keys, whatever zeros and dense masks save. Of lengths and packed
    sequences those that each query may see, if that is known without waiting for a device; else, as
    on a GPU, every query with every key."""
    batch, heads, length_q, _ = given["query"].shape
    ranges, table = given.get("ranges"), given.get("block_table")
    if type(ranges) is Tensor and is_known(ranges):
        seen = int((ranges[1] - ranges[0]).sum())
        return int(heads * seen * batch // ranges.shape[1])
    length_k = given["key"].shape[2]
    if table is not None:
        length_k *= table.shape[1]
    return int(batch * heads * length_q * length_k)


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    operators = torch.ops.adasplash2
    register_flop_formula(operators.attention_forward, get_raw=True)(attention_flops)
    register_flop_formula(operators.attention_backward, get_raw=True)(attention_backward_flops)


# Shardings


def _register_shardings() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    operators = torch.ops.adasplash2
    for operator in (operators.attention_forward.default, operators.attention_backward.default):
        register_sharding(operator)(functools.partial(shardings, operator))


def shardings(operator: Any, *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """By batch, by heads, or not: placements of the outputs and of the tensors among ``arguments``,
    as DTensor describes them. Heads are cut only where key heads fall evenly on all devices: each
    then has the query heads that share its own. Dropout draws by number of the head and sequence,
    which only who has all of them knows."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    names = [argument.name for argument in operator._schema.arguments]
    returned = [one.name for one in operator._schema.returns]
    given = {
        name: argument
        for name, argument in zip(names, arguments, strict=False)
        if hasattr(argument, "placements")
    }
    heads_kv, devices = given["key"].shape[1], given["key"].mesh.size()
    found = []
    for way in ("whole", "batch", "heads"):
        if way != "whole" and "dropout_seed" in given:
            continue
        if way == "heads" and heads_kv % devices:
            continue
        if way == "batch" and "block_table" in given:  # pages are of no one sequence
            continue

        def placed(name: str, way: str = way) -> Any:
            name = name.removeprefix("grad_")
            dim = {"batch": _BATCH_AT, "heads": _HEADS_AT}.get(way, {}).get(name)
            if dim is None or (name in given and given[name].shape[dim] == 1):
                return Replicate()
            return Shard(dim)

        def result(name: str, way: str = way) -> Any:
            placement = placed(name)
            of = name.removeprefix("grad_")
            shared = name != of and of in DIFFERENTIABLE and placement == Replicate()
            return Partial() if shared and way != "whole" else placement

        found.append(([result(name) for name in returned], [placed(name) for name in given]))
    return found


_BATCH_AT = {
    name: 1 if name == "ranges" else 0 for name in (*Inputs._fields, "out", "tau", "saved")
}
_HEADS_AT = {
    name: 0 if name == "saved" else 1
    for name in _BATCH_AT
    if name not in ("ranges", "dropout_seed", "block_table")
}
"""Which dimension is cut. What is saved is each device's own."""

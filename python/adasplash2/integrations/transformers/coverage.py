"""Which layers of a model run our attention, and which compute theirs in their own code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from adasplash2.problem import MAX_HEAD_DIM


@dataclass(frozen=True)
class Coverage:
    """What :func:`apply` did to a model; ``print`` shows it.

    Attributes:
        name: the implementation that was set.
        ours: names of the modules that run our attention.
        others: name of each module that computes an attention without us, and why.

    Example:
        >>> from adasplash2.integrations.transformers import Coverage
        >>> print(Coverage("adasplash2-1.5", ("layer.0",), {"layer.1": "it has its own code"}))
        1 of 2 attention layers run adasplash2-1.5
          not layer.1: it has its own code
    """

    name: str
    ours: tuple[str, ...]
    others: dict[str, str]

    def __str__(self) -> str:
        total = len(self.ours) + len(self.others)
        lines = [f"{len(self.ours)} of {total} attention layers run {self.name}"]
        lines += [
            f"  not {layer or 'the model itself'}: {why}" for layer, why in self.others.items()
        ]
        return "\n".join(lines)


def cover(model: nn.Module, name: str) -> Coverage:
    """Looks at the code of each module's class and at its config.

    A module asks for its attention where a function of its class reads
    ``ALL_ATTENTION_FUNCTIONS``; which it gets stands in its config. Others compute attention
    where they are named so and hold no module that does, are torch's own, or call SDPA.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from adasplash2.integrations.transformers import cover
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> cover(model, "sdpa").ours
        ('transformer.h.0.attn',)
    """
    ours: list[str] = []
    others: dict[str, str] = {}
    modules = dict(model.named_modules())
    asking = {path for path, module in modules.items() if asks(module)}
    alone = {
        path
        for path, module in modules.items()
        if path not in asking and _computes_attention(module)
    }
    for path, module in modules.items():
        if path in asking:
            config = getattr(module, "config", None)
            chosen = getattr(config, "_attn_implementation", None)
            if chosen == name:
                ours.append(path)
            else:
                others[path] = (
                    f"the config of {type(module).__name__} says {chosen!r}: transformers did not "
                    "set it"
                )
        elif path in alone:
            inner = path + "." if path else ""
            if not any(other.startswith(inner) for other in asking | alone if other != path):
                others[path] = f"{type(module).__name__} computes attention in its own code"
    return Coverage(name, tuple(ours), others)


_WIDTHS = "head_dim", "qk_head_dim", "v_head_dim", "key_value_proj_dim", "attention_head_size"
"""What attentions of transformers call the width of a head."""


def refuse_too_wide(model: nn.Module, coverage: Coverage) -> None:
    """Refuse a model of which a forward could not run.

    Raises:
        ValueError: a layer that runs our attention has wider heads than that takes.
    """
    for path in coverage.ours:
        module = model.get_submodule(path)
        for name in _WIDTHS:
            width = getattr(module, name, None)
            if isinstance(width, int) and width > MAX_HEAD_DIM:
                raise ValueError(
                    f"{type(model).__name__} cannot run our attention: {name} must be at most "
                    f"{MAX_HEAD_DIM}, got {width} in {path}"
                )


def asks(module: nn.Module) -> bool:
    """Whether a module asks transformers for its attention."""
    return "ALL_ATTENTION_FUNCTIONS" in _names(module)


def ran(coverage: Coverage, model: nn.Module, called: set[nn.Module]) -> Coverage:
    """``coverage`` after a forward in which the modules ``called`` called our attention."""
    paths = {module: path for path, module in model.named_modules()}
    seen = {paths[module] for module in called if module in paths}
    idle = {
        path: "asks for our attention, but not in the forward of the example"
        for path in coverage.ours
        if path not in seen
    }
    others = {path: why for path, why in coverage.others.items() if path not in seen} | idle
    return Coverage(coverage.name, tuple(p for p in paths.values() if p in seen), others)


def _computes_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    named = "attention" in kind or "attn" in kind
    return named or "scaled_dot_product_attention" in _names(module)


_NAMES: dict[type, frozenset[str]] = {}


def _names(module: nn.Module) -> frozenset[str]:
    """All names that functions of a module's class read, bases of its own library included."""
    from transformers import PreTrainedModel

    kind = type(module)
    if kind not in _NAMES:
        found: set[str] = set()
        for base in kind.__mro__:
            if base not in PreTrainedModel.__mro__:
                for function in vars(base).values():
                    while hasattr(function, "__wrapped__"):
                        function = function.__wrapped__
                    if isinstance(function, FunctionType):
                        found.update(_names_in(function.__code__))
        _NAMES[kind] = frozenset(found)
    return _NAMES[kind]


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    constants: tuple[Any, ...] = code.co_consts
    for constant in constants:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)

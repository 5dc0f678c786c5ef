"""Watching attention while a model learns: every some steps, and at no other time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adasplash2.functional import attention_stats, entmax_attention_varlen
from adasplash2.options import check_count

Observer = Callable[[int | None, Tensor, Tensor, Tensor, dict[str, Any]], object]
"""Called as ``observer(layer, query, key, value, arguments)`` before an attention: what
:func:`adasplash2.entmax_attention` is called with; for packed sequences
:func:`adasplash2.entmax_attention_varlen`. ``layer`` is None where the caller has no number."""


class Watched(NamedTuple):
    """What one layer did in one step, by head: float64 ``(heads,)`` on the CPU.

    Attributes:
        alpha: of the call.
        support: mean of the keys a query keeps, of those that see any; NaN for softmax, which keeps
            all it sees.
        empty_tiles: share of 64x64 tiles without a probability above zero; 0 for softmax, and NaN
            for packed sequences, of which
            :func:`~adasplash2.attention_stats` tells it.

    Example:
        >>> import torch, adasplash2
        >>> watched = adasplash2.nn.Watched(
        ...     alpha=torch.full((4,), 1.5), support=torch.ones(4), empty_tiles=torch.zeros(4)
        ... )
        >>> watched.support.mean().item()
        1.0
    """

    alpha: Tensor
    support: Tensor
    empty_tiles: Tensor


class AttentionMonitor:
    """Support, empty tiles and alpha of every head, every ``every`` steps, to any logger.

    Call ``step()`` after each optimizer step. In between nothing is measured: a forward asks one
    flag in each layer. In a step that is watched each layer's first attention costs about one
    forward more, and a wait for its device.

        >>> import torch, adasplash2
        >>> model = adasplash2.nn.EntmaxMultiheadAttention(32, 2, batch_first=True)
        >>> logged = {}
        >>> monitor = adasplash2.nn.AttentionMonitor(lambda values, step: logged.update(values))
        >>> monitor.watch(model)
        1
        >>> x = torch.randn(2, 10, 32)
        >>> out, _ = model(x, x, x, need_weights=False)
        >>> monitor.step()
        >>> sorted(logged)[:3]
        ['attention/0/alpha/0', 'attention/0/alpha/1', 'attention/0/empty_tiles/0']

    In models of transformers it is the observer, and they number their layers:
    ``adasplash2.integrations.transformers.apply(model, observer=monitor)``.

    Compiled graphs are not looked into: run a watched forward eagerly, within
    ``torch.compiler.set_stance("force_eager")`` while ``monitor.is_due``.

    Args:
        logger: a TensorBoard ``SummaryWriter`` (what has ``add_scalar(tag, value, step)``), a W&B
            run or module (what has ``log(values, step=step)``), a function of ``(values, step)``,
            or None, to keep :attr:`history` alone. Values are named
            ``attention/<layer>/<what>/<head>``. The monitor can be pickled where the logger can.
        every: steps from one that is watched to the next; the first one is.

    Attributes:
        history: ``{step: {layer: Watched}}``, layers by their names or, as texts, numbers; what
            :mod:`adasplash2.plot` draws.
        last_step: how many steps were taken.
        is_due: whether the next forward is watched.

    Raises:
        TypeError, ValueError: ``logger`` is none of these, or ``every`` no integer of at least 1.
    """

    def __init__(self, logger: Any = None, every: int = 100) -> None:
        self.every = check_count("every", every, at_least=1)
        self._log = _log_to(logger)
        self.history: dict[int, dict[str, Watched]] = {}
        self.last_step = 0
        self.is_due = True
        self._watched: dict[str, Watched] = {}

    def watch(self, model: nn.Module) -> int:
        """Watch every :class:`adasplash2.nn.EntmaxMultiheadAttention` of ``model``, numbered in the
        order of ``model.modules()``; their number.

        Raises:
            TypeError, ValueError: it is no module, or has none.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        modules = [m for m in model.modules() if hasattr(m, "observer")]
        if not modules:
            raise ValueError(f"model must hold attention to watch, {type(model).__name__} has none")
        for number, module in enumerate(modules):
            module.observer = _Numbered(self, number)  # type: ignore[assignment]
        return len(modules)

    def __call__(
        self,
        layer: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        arguments: dict[str, Any],
    ) -> None:
        """The observer: looks at a call if it is the first of its layer in a step that is due."""
        if self.is_due and str(layer or 0) not in self._watched:
            with torch.no_grad():
                self._watched[str(layer or 0)] = _look(query, key, value, dict(arguments))

    def step(self) -> None:
        """Log what the step has shown, and count it."""
        if self._watched:
            self.history[self.last_step] = self._watched
            self._log(dict(_named(self._watched)), self.last_step)
            self._watched = {}
        self.last_step += 1
        self.is_due = self.last_step % self.every == 0


class _Numbered:
    """A monitor as the observer of one layer."""

    def __init__(self, monitor: AttentionMonitor, layer: int) -> None:
        self.monitor, self.layer = monitor, layer

    def __call__(self, _: int | None, *call: Any) -> None:
        if self.monitor.is_due:
            self.monitor(self.layer, *call)


def _look(query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Watched:
    packed = "cu_seqlens_q" in arguments
    heads = query.shape[1]
    arguments.pop("dropout_p", None)
    alpha = arguments["alpha"]
    number = not isinstance(alpha, Tensor)
    alphas = torch.full((heads,), alpha) if number else alpha.detach().expand(heads)
    nothing = torch.full((heads,), torch.nan)
    if number and alpha == 1.0:
        return Watched(alphas.double(), nothing.double(), torch.zeros(heads).double())
    if packed:
        _, aux = entmax_attention_varlen(query, key, value, return_aux=True, **arguments)
        support, empty = aux.support, nothing
    else:
        stats = attention_stats(query, key, value, **arguments)
        support, empty = stats.support, stats.empty_tiles.mean(dim=0)
    kept = support.double()
    asked = (kept > 0.0).sum(dim=(0, 2)).clamp(min=1)  # padding keeps nothing
    found = alphas, kept.sum(dim=(0, 2)) / asked, empty
    return Watched._make(t.double().cpu() for t in found)


def _named(watched: Mapping[str, Watched]) -> Iterator[tuple[str, float]]:
    for layer, found in watched.items():
        for what, by_head in found._asdict().items():
            for head, value in enumerate(by_head.tolist()):
                yield f"attention/{layer}/{what}/{head}", value


def _log_to(logger: Any) -> Callable[[dict[str, float], int], object]:
    """Pickles where ``logger`` does."""
    if logger is None:
        return _log_nothing
    if callable(getattr(logger, "add_scalar", None)):
        return functools.partial(_add_scalars, logger)
    if callable(getattr(logger, "log", None)):
        return functools.partial(_log_values, logger)
    if callable(logger):
        return logger  # type: ignore[no-any-return]
    raise TypeError(
        "logger must have add_scalar or log, be a function of (values, step) or None, got "
        f"{type(logger).__name__}"
    )


def _log_nothing(values: dict[str, float], step: int) -> None:
    pass


def _add_scalars(logger: Any, values: dict[str, float], step: int) -> None:
    for tag, value in values.items():
        logger.add_scalar(tag, value, step)


def _log_values(logger: Any, values: dict[str, float], step: int) -> None:
    logger.log(values, step=step)

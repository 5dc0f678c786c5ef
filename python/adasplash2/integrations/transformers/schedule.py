"""alpha that changes while a model of transformers is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface, TrainerCallback

from adasplash2.integrations.transformers import Observer, apply, store
from adasplash2.integrations.transformers.attention import check_observer
from adasplash2.nn import AlphaSchedule
from adasplash2.options import check_alpha, check_backend, check_flag

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AlphaScheduleCallback", "alpha_setter"]


def alpha_setter(
    model: PreTrainedModel,
    backend: str | None = None,
    observer: Observer | None = None,
    *,
    packed: bool = True,
) -> Callable[[float], None]:
    """Make a model run our attention, and return the function that sets its alpha.

    Made for :class:`adasplash2.nn.AlphaSchedule`. When alpha stays as it is,
    ``apply(model, alpha)`` names the model's attention after it::

        schedule = adasplash2.nn.AlphaSchedule(alpha_setter(model), steps=1000)
        for batch in batches:
            ...
            schedule.step()
        apply(model, schedule.alpha)

    Args:
        model, backend, observer, packed: as for :func:`adasplash2.integrations.transformers.apply`.

    Raises:
        TypeError, ValueError: as ``apply``.

    Example:
        >>> import adasplash2
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from adasplash2.integrations.transformers.schedule import alpha_setter
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> schedule = adasplash2.nn.AlphaSchedule(alpha_setter(model), steps=4, target=1.5)
        >>> schedule.step()
        >>> schedule.alpha
        1.125
    """
    seen = _nobody if observer is None else observer
    # The name is of this model alone, since it is observed.
    name = apply(model, 1.5, backend, seen, packed=packed).name
    attention = AttentionInterface()[name]
    attention.observer = observer

    def set_alpha(alpha: float) -> None:
        attention.alpha = check_alpha(alpha)  # not registered anew: compiled graphs stay
        store(model, {"alpha": attention.alpha, "learn": False})  # for a checkpoint of this step

    return set_alpha


class AlphaScheduleCallback(TrainerCallback):
    """Lets a ``transformers.Trainer`` drive alpha: softmax at first, its target after ``steps``.

    A run that goes on from a checkpoint goes on with the alpha of its step.

        trainer = Trainer(model, ..., callbacks=[AlphaScheduleCallback(steps=1000, target=1.5)])

    Args:
        steps, target, start, warmup, shape: as for :class:`adasplash2.nn.AlphaSchedule`, in
            optimizer steps.
        backend, observer, packed: as for :func:`adasplash2.integrations.transformers.apply`. An
            :class:`adasplash2.nn.AttentionMonitor` as observer is stepped too.

    Raises:
        TypeError, ValueError: as :class:`adasplash2.nn.AlphaSchedule`, or as ``apply``, what is
            about the model when training begins.

    Example:
        >>> from adasplash2.integrations.transformers.schedule import AlphaScheduleCallback
        >>> callback = AlphaScheduleCallback(steps=1000, target=1.5)
        >>> callback.schedule.alpha
        1.0
    """

    def __init__(
        self,
        steps: int,
        target: float = 1.5,
        start: float = 1.0,
        warmup: int = 0,
        shape: str = "linear",
        backend: str | None = None,
        observer: Observer | None = None,
        *,
        packed: bool = True,
    ) -> None:
        self.backend = check_backend(backend) or None
        self.packed = check_flag("packed", packed)
        self.observer = check_observer(observer)
        self._set: Callable[[float], object] = _nobody
        self.schedule = AlphaSchedule(lambda a: self._set(a), steps, target, start, warmup, shape)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The model runs our attention, with the alpha of its step."""
        self._set = alpha_setter(given["model"], self.backend, self.observer, packed=self.packed)
        self._go_to(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The next step's alpha."""
        self._go_to(state.global_step)
        if callable(getattr(self.observer, "step", None)):
            self.observer.step()  # type: ignore[union-attr]

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The model keeps the last alpha."""
        apply(given["model"], self.schedule.alpha, self.backend, packed=self.packed)

    def _go_to(self, step: int) -> None:
        self.schedule.load_state_dict(self.schedule.state_dict() | {"last_step": step})


def _nobody(*_: object) -> None:
    """Observes nothing."""

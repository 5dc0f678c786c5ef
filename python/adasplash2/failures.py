"""Which failures pass by themselves: what they prevented is tried again at the next call."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import torch

_SHORTAGES = {
    getattr(errno, name)
    for name in (
        "EAGAIN",
        "EBUSY",
        "EDQUOT",
        "EINTR",
        "EIO",
        "EMFILE",
        "ENFILE",
        "ENOBUFS",
        "ENOMEM",
        "ENOSPC",
        "ESTALE",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
}

_WORDS = ("out of memory", *(os.strerror(number).lower() for number in sorted(_SHORTAGES)))
"""How libraries tell of them in errors of their own, as a loader does that finds no descriptor."""


def may_pass(error: BaseException) -> bool:
    """Whether the next try may end otherwise though nothing was installed or repaired: for lack of
    memory, file descriptors, disk space or time."""
    return any(
        isinstance(each, MemoryError | torch.OutOfMemoryError)
        or (isinstance(each, OSError) and each.errno in _SHORTAGES)
        or any(words in str(each).lower() for words in _WORDS)
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    met: set[int] = set()
    while error is not None and id(error) not in met:
        met.add(id(error))
        yield error
        error = error.__cause__ or error.__context__

"""Files kept between processes: where they are, and how they are written and read.

A cache may be missing, broken, read-only or full at any time. That costs a warning, once a
process, and a slower start; never an exception in a caller's face and never a wrong answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "ADASPLASH2_CACHE_DIR"
"""Environment variable that names the folder; without it the user's cache folder holds it."""

PARTS = ("speeds", "cuda")
"""Folders in it, one an owner: measured speeds, and what each backend compiled. Only these are
deleted: the variable may name a folder with other things in it."""

LOCK_SECONDS = 10.0
"""How long a writer waits for another one; each holds the lock for milliseconds."""

_DIGEST = 16
"""Hexadecimal digits of a content's checksum in a file name."""

_warned: set[str] = set()


def directory() -> Path:
    """The folder of everything that is kept; it need not exist."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen))
    import platformdirs

    return platformdirs.user_cache_path("adasplash2", appauthor=False)


def warn(text: str) -> None:
    """Warn of a broken cache, once a process in the same words."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def digest(content: bytes) -> str:
    """Checksum of ``content``, as names of sealed files have it."""
    return hashlib.sha256(content).hexdigest()[:_DIGEST]


def write(path: Path, content: bytes) -> None:
    """Write ``path`` so that readers see what was there before or all of ``content``.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_sealed(folder: Path, name: str, suffix: str, content: bytes) -> Path:
    """Write ``content`` under a name that ends in its checksum; see :func:`find_sealed`.

    Raises:
        OSError: as :func:`write`.
    """
    path = folder / f"{name}-{digest(content)}{suffix}"
    write(path, content)
    return path


def find_sealed(folder: Path, name: str, suffix: str) -> Path | None:
    """The file that :func:`write_sealed` left under ``name``; None where there is none, or none
    that can be read or whose content still has the checksum of its name."""
    try:
        for path in sorted(folder.glob(f"{name}-{'?' * _DIGEST}{suffix}")):
            if path.stem == f"{name}-{digest(path.read_bytes())}":
                return path
            warn(f"adasplash2 found {path} damaged and does without it")
    except OSError as error:
        warn(f"adasplash2 cannot read its cache {folder} ({error}) and does without it")
    return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other writers of ``path`` out.

    Raises:
        OSError: the lock cannot be had, or not within :data:`LOCK_SECONDS` (``TimeoutError``).
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_SECONDS):
            yield
    except filelock.Timeout as error:  # a TimeoutError, with words that name no path
        raise TimeoutError(f"another process holds {path.name}.lock") from error


def leftovers(path: Path) -> Iterator[Path]:
    """What writers of ``path`` that were killed left behind; complete only while it is locked."""
    return path.parent.glob(f".{path.name}.*.tmp")

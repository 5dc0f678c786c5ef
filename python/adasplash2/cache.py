"""Files kept between processes: where they are, whose they are, how they are written and read.

A cache may be missing, broken, read-only or full at any time. That costs a warning, once a
process, and a slower start; never an exception in a caller's face and never a wrong answer.

What is read decides which machine code runs. So a folder is used only where nobody but the user
and root can put anything into it, and a file only if it is theirs. Checksums in file names tell
damage; whoever can write a file can write its name too.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import os
import reprlib
import secrets
import shutil
import stat
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

MAX_BYTES = 64 * 2**20
"""Of a file that is read: far above the largest kernel."""

_DIGEST = 16
"""Hexadecimal digits of a content's checksum in a file name."""

_LINKS = 40
"""On the way to a folder; more are a circle."""

_OPEN_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY")
)
"""A link is not followed, and a pipe without a writer is opened at once, to be refused."""

_warned: set[str] = set()

_words = reprlib.Repr()
_words.maxstring = _words.maxother = 80


class Unsafe(OSError):
    """Somebody else could put files into the folder. The message is for :func:`warn`."""

    @staticmethod
    def of(path: Path, reason: str) -> Unsafe:
        """That ``path`` is so."""
        return Unsafe(
            f"adasplash2 does without its cache, since {path} {reason}: a folder that is the "
            f"user's alone is needed, and {VARIABLE} can name one"
        )


class Unfit(OSError):
    """What lies where a file of ours is expected is not one: it may be put out of the way."""


def directory() -> Path:
    """The folder of everything that is kept; it need not exist. Where none can be named, as
    without a home, a folder for this process alone, and a warning."""
    chosen = os.environ.get(VARIABLE)
    try:
        if chosen:
            found = os.path.expanduser(chosen)
        else:
            import platformdirs

            found = str(platformdirs.user_cache_path("adasplash2", appauthor=False))
        if found.startswith("~"):
            raise OSError(f"the home folder of {found} is not known")
        if b"\0" in os.fsencode(found):
            raise OSError(f"{shown(found)} cannot be a path")
        return Path(os.path.abspath(found))
    except (OSError, RuntimeError, ValueError) as error:
        warn(
            f"adasplash2 has no cache folder ({error}) and keeps nothing between processes; "
            f"{VARIABLE} can name one"
        )
        return private()


@functools.cache
def private() -> Path:
    """A folder for this process alone: nobody knows its name, and it is deleted at the end. It is
    made when something is written."""
    try:
        parent = tempfile.gettempdir()
    except OSError:
        parent = os.sep  # where it cannot be made, which its user is told
    path, owner = Path(parent, f"adasplash2-{secrets.token_hex(8)}"), os.getpid()

    def delete() -> None:
        if os.getpid() == owner:  # not in a fork
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(delete)
    return path


def writable() -> Path:
    """The folder of everything that is kept, or the one of this process where that takes nothing:
    what other processes of ours have to be told (:data:`VARIABLE`)."""
    for path in (directory(), private()):
        with contextlib.suppress(OSError):
            if all(os.access(claim(path / part), os.W_OK) for part in PARTS):
                return path
    return directory()


def claim(folder: Path) -> Path:
    """``folder`` without links in its path, made for the user alone where it is not there.

    Raises:
        Unsafe: somebody else could put files into it.
        OSError: it cannot be made.
    """
    found = _resolve(folder, make=True)
    _check_folder(found)
    return found


def check() -> None:
    """
    Raises:
        OSError: the folder of everything that is kept, or a part of it, cannot be used.
    """
    for part in PARTS:
        folder = _resolve(directory() / part)
        _check_folder(folder)
        place = folder
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def warn(text: str) -> None:
    """Warn of a broken cache, once a process in the same words."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def shown(value: object) -> str:
    """``value``, whatever it is, in a few characters that any terminal can show."""
    return _words.repr(value).encode("ascii", "backslashreplace").decode()


def digest(content: bytes) -> str:
    """Checksum of ``content``, as names of sealed files have it."""
    return hashlib.sha256(content).hexdigest()[:_DIGEST]


def read(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a file of the user or root, as one look at it has it.

    Raises:
        FileNotFoundError: there is none.
        Unfit: it is a link, a pipe or the like, above ``limit`` bytes, or somebody else can write
            it.
        Unsafe: its folder is not the user's alone.
        OSError: it cannot be read.
    """
    folder = _resolve(path.parent)
    _check_folder(folder)
    try:
        handle = os.open(folder / path.name, _OPEN_FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise Unfit(f"{path} is no regular file") from None
        raise
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise Unfit(f"{path} is no regular file")
        if reason := _exposed(found):
            raise Unfit(f"{path} {reason}")
        content = file.read(limit + 1) if found.st_size <= limit else b""
        if max(found.st_size, len(content)) > limit:
            raise Unfit(f"{path} has more than {limit} bytes")
        return content


def write(path: Path, content: bytes) -> None:
    """Write ``path`` so that readers see what was there before or all of ``content``.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    folder = claim(path.parent)
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, folder / path.name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def keep_sealed(part: str, name: str, suffix: str, content: bytes) -> None:
    """Keep ``content`` under a name that ends in its checksum; see :func:`find_sealed`. Where the
    folder is unsafe, for this process alone.

    Raises:
        OSError: it cannot be written.
    """
    file = f"{name}-{digest(content)}{suffix}"
    try:
        write(directory() / part / file, content)
    except Unsafe as error:
        warn(str(error))
        write(private() / part / file, content)


def find_sealed(part: str, name: str, suffix: str) -> bytes | None:
    """What :func:`keep_sealed` was given under ``name``; None where there is nothing, or nothing
    that may be read and still has the checksum of its name. What is returned was checked: nobody
    reads it again."""
    pattern = f"{name}-{'?' * _DIGEST}{suffix}"
    for folder in (directory() / part, private() / part):
        try:
            for path in sorted(folder.glob(pattern)):
                try:
                    content = read(path)
                except FileNotFoundError:  # deleted meanwhile
                    continue
                except Unfit as error:
                    warn(f"adasplash2 does without a file of its cache: {error}")
                    continue
                if path.stem == f"{name}-{digest(content)}":
                    return content
                warn(f"adasplash2 found {path} damaged and does without it")
        except Unsafe as error:
            warn(str(error))
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

    lock = claim(path.parent) / f"{path.name}.lock"
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(lock)
        if not stat.S_ISREG(found.st_mode) or _exposed(found):
            os.unlink(lock)
    try:
        with filelock.FileLock(lock, timeout=LOCK_SECONDS):
            yield
    except filelock.Timeout as error:  # a TimeoutError, with words that name no path
        raise TimeoutError(f"another process holds {path.name}.lock") from error


def leftovers(path: Path) -> Iterator[Path]:
    """What writers of ``path`` that were killed left behind; complete only while it is locked."""
    return path.parent.glob(f".{path.name}.*.tmp")


def sizes() -> list[int]:
    """Bytes of each file that is kept and can be seen; no link is followed."""
    found = []
    for part in PARTS:
        for folder, _, names in os.walk(directory() / part):
            for name in names:
                with contextlib.suppress(OSError):
                    found.append(os.lstat(os.path.join(folder, name)).st_size)
    return found


def kept_parts() -> list[str] | None:
    """The :data:`PARTS` that are there; None where the folder is not.

    Raises:
        OSError: the folder cannot be looked into.
    """
    folder = directory()
    try:
        return [name for name in PARTS if name in os.listdir(folder)]
    except FileNotFoundError:
        return None


def clear(parts: list[str]) -> None:
    """Delete ``parts`` of the cache, and of links the links alone.

    Raises:
        OSError: something cannot be deleted, or somebody else could lead us elsewhere.
    """
    folder = _resolve(directory())
    for part in parts:
        path = folder / part
        try:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:  # somebody else clears
            if os.path.lexists(path):
                raise


# Who can write what


def _resolve(path: Path, make: bool = False) -> Path:
    """``path`` without links, as far as it exists; with ``make`` all of it does.

    Every folder above it must be such that nobody but the user and root can exchange what the next
    name stands for: then what was checked stays so.

    Raises:
        Unsafe: it is not.
        OSError: a folder cannot be looked into or made.
    """
    place, names, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    while names:
        _check_folder(place, is_parent=True)
        name = names.pop()
        if name == "..":
            place = place.parent
            continue
        step = place / name
        try:
            found = os.lstat(step)
        except FileNotFoundError:
            if not make:
                return step.joinpath(*reversed(names))
            with contextlib.suppress(FileExistsError):  # another process was first
                os.mkdir(step, 0o700)
            found = os.lstat(step)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            if reason := _exposed(found):
                raise Unsafe.of(step, reason)
            target = Path(os.readlink(step))
            place = Path(target.anchor) if target.is_absolute() else place
            names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            place = step
    return place


def _check_folder(path: Path, is_parent: bool = False) -> None:
    """
    Raises:
        Unsafe: somebody else can exchange what is in ``path``.
        OSError: it is no folder, or cannot be looked at.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if reason := _exposed(found, is_parent):
        raise Unsafe.of(path, reason)


def _exposed(found: os.stat_result, is_parent: bool = False) -> str | None:
    """Why others can change a file or folder, in words; None where the user and root alone can.

    A parent folder may be sticky, as ``/tmp`` is: others add to it and exchange nothing.
    """
    if not hasattr(os, "geteuid"):  # Windows keeps profiles apart by access lists
        return None
    mode, trusted = found.st_mode, {0, os.geteuid()}
    if is_parent:
        trusted.add(os.stat(os.sep).st_uid)  # what root is called in a user namespace
        if mode & stat.S_ISVTX:
            mode &= ~(stat.S_IWOTH | stat.S_IWGRP)
    if found.st_uid not in trusted:
        return f"belongs to user {found.st_uid}"
    others = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_own_group(found.st_gid))
    if others and not stat.S_ISLNK(mode):  # a link's mode means nothing
        return f"can be written by others (mode {stat.S_IMODE(mode):o})"
    return None


def _is_own_group(number: int) -> bool:
    """Whether the group is the one of the user's own name, with nobody else in it: many systems
    give each user one, and let it write."""
    try:
        import grp
        import pwd

        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(number)
    except (ImportError, KeyError):
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}

"""Kernel sources to cubins: NVRTC, and a disk cache keyed by all that a cubin depends on."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from adasplash2 import problem

CACHE_VERSION = 1
"""Part of every key: raise it when the meaning of a cached file changes."""


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message is its log."""


@cache
def sources() -> dict[str, str]:
    """The kernel files by the name under which they include each other."""
    kernels = resources.files("adasplash2.backends.cuda") / "kernels"
    files = {
        entry.name: entry.read_text()
        for entry in kernels.iterdir()
        if entry.name.endswith((".cu", ".cuh"))
    }
    shared = Path(problem.__file__).parent / "include" / "adasplash2"
    return files | {f"adasplash2/{path.name}": path.read_text() for path in shared.glob("*.h")}


@cache
def nvrtc_version() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    major, minor = nvrtc.getVersion()
    return major, minor


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of the target for a device's compute capability."""
    major, minor = capability
    return "sm_90a" if capability == (9, 0) else f"sm_{major}{minor}"  # 90a has wgmma


class Compiled(NamedTuple):
    """``log``: what the assembler says of each kernel's registers, shared memory and spills."""

    cubin: bytes
    log: str


def compile_unit(unit: str, defines: dict[str, int], arch: str) -> Compiled:
    """Compile ``unit`` (a ``.cu`` file of this package); needs NVRTC, not a GPU.

    Raises:
        CompileError: the source does not compile; the message is NVRTC's log.
    """
    from cupy.cuda import nvrtc

    files = sources()
    headers = {n.encode(): t.encode() for n, t in files.items() if not n.endswith(".cu")}
    program = nvrtc.createProgram(files[unit], unit, tuple(headers.values()), tuple(headers))
    options = (
        f"-arch={arch}",
        "-std=c++17",
        "-default-device",
        "--ptxas-options=-v",
        *(f"-DADASPLASH2_{name}={value}" for name, value in sorted(defines.items())),
    )
    try:
        nvrtc.compileProgram(program, options)
        return Compiled(bytes(nvrtc.getCUBIN(program)), nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        raise CompileError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


def cubin_path(unit: str, defines: dict[str, int], arch: str) -> Path:
    """Path of the compiled ``unit``, from the disk cache where it is there."""
    key = hashlib.sha256()
    for part in (CACHE_VERSION, nvrtc_version(), arch, unit, sorted(defines.items())):
        key.update(f"{part}\n".encode())
    for name, text in sorted(sources().items()):
        key.update(f"{name}\n{text}\n".encode())
    path = cache_directory() / f"{Path(unit).stem}-{arch}-{key.hexdigest()[:32]}.cubin"
    if path.is_file() and path.stat().st_size:
        return path
    cubin = compile_unit(unit, defines, arch).cubin
    try:
        return _write(path, cubin)
    except OSError as error:
        warnings.warn(
            f"adasplash2 cannot keep compiled kernels in {path.parent} ({error}); "
            "they are compiled again in every process",
            RuntimeWarning,
            stacklevel=2,
        )
        return _write(Path(tempfile.mkdtemp(prefix="adasplash2-")) / path.name, cubin)


def cache_directory() -> Path:
    """``$ADASPLASH2_CACHE_DIR``, or ``adasplash2`` under the user's cache folder."""
    chosen = os.environ.get("ADASPLASH2_CACHE_DIR")
    if chosen:
        return Path(chosen) / "cuda"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "adasplash2" / "cuda"


def _write(path: Path, content: bytes) -> Path:
    """Write so that a reader sees nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path

"""Kernel sources to cubins: NVRTC, and a disk cache keyed by all that a cubin depends on."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from adasplash2 import cache, problem
from adasplash2.backends.cuda import layout

CACHE_VERSION = 2
"""Part of every key: raise it when the meaning of a cached file changes."""

FOLDER, SUFFIX = "cuda", ".cubin"
"""Of the cached files."""


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message is its log."""


@functools.cache
def sources() -> dict[str, str]:
    """The kernel files, and what ``layout.py`` makes, by the name under which they include each
    other."""
    kernels = resources.files("adasplash2.backends.cuda") / "kernels"
    files = {
        entry.name: entry.read_text()
        for entry in kernels.iterdir()
        if entry.name.endswith((".cu", ".cuh"))
    }
    shared = Path(problem.__file__).parent / "include" / "adasplash2"
    files["layout.cuh"] = layout.header()
    return files | {f"adasplash2/{path.name}": path.read_text() for path in shared.glob("*.h")}


@functools.cache
def sources_hash() -> str:
    """Of all kernel files and their names."""
    key = hashlib.sha256()
    for name, text in sorted(sources().items()):
        key.update(f"{name}\n{text}\n".encode())
    return key.hexdigest()


@functools.cache
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
        # CuPy cuts off the last byte, a zero: drivers do not mind, disassemblers do.
        cubin = bytes(nvrtc.getCUBIN(program)) + b"\0"
        return Compiled(cubin, nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        raise CompileError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


def cubin(unit: str, defines: dict[str, int], arch: str) -> bytes:
    """The compiled ``unit``, from the disk cache where it is there and undamaged."""
    key = hashlib.sha256()
    for part in (CACHE_VERSION, nvrtc_version(), arch, unit, sorted(defines.items())):
        key.update(f"{part}\n".encode())
    key.update(sources_hash().encode())
    name = f"{Path(unit).stem}-{arch}-{key.hexdigest()[:32]}"
    found = cache.find_sealed(FOLDER, name, SUFFIX)
    if found is not None:
        return found
    made = compile_unit(unit, defines, arch).cubin
    try:
        cache.keep_sealed(FOLDER, name, SUFFIX, made)
    except OSError as error:
        cache.warn(
            f"adasplash2 cannot keep compiled kernels in {cache.directory() / FOLDER} ({error}); "
            "they are compiled again in every process"
        )
    return made

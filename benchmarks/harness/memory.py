"""The memory of one call, on the CPU in a process of its own; and what is free."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch

from harness.cases import Case
from harness.contender import BOTH, Contender, run
from harness.tables import progress

MEBIBYTE = 2**20


def peak_bytes(case: Case, contender: Contender) -> int:
    """Memory at the peak of a forward and backward above the inputs and the output's gradient;
    output and gradients count.

    On CUDA what torch's allocator handed out; on the CPU resident pages, in a process of its own,
    whose peak nothing else has raised.
    """
    progress(f"{contender.name}, {case}: peak memory")
    if case.device == "cuda":
        inputs = case.inputs()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, contender, inputs, BOTH)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    arguments = (case, contender, torch.get_num_threads(), sender)
    child = spawn.Process(target=_send_peak_bytes, args=arguments)
    child.start()
    sender.close()
    try:
        peak: int = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(
            f"measuring the memory of {contender.name} ended with exit code "
            f"{child.exitcode} (-9: too little memory)"
        ) from None
    child.join()
    return peak


def _send_peak_bytes(case: Case, contender: Contender, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    short = case.short()
    run(short, contender, short.inputs(), BOTH)  # loads what is loaded at a first call
    inputs = case.inputs()
    before = _status_bytes("VmRSS")
    run(case, contender, inputs, BOTH)
    sender.send(_status_bytes("VmHWM") - before)


def no_peak_memory(device: str) -> str | None:
    """Why :func:`peak_bytes` cannot measure here; None where it can."""
    if device == "cpu" and not Path("/proc/self/status").exists():
        return "peak memory on the CPU is read from /proc/self/status, which Linux alone has"
    return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def free_bytes(device: str) -> int:
    """Memory that can still be allocated."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""Time from the start of a process to its first result, with an empty and with a full cache.

Each measurement is a process of its own that imports, makes tensors and calls ``entmax_attention``
forward and backward twice. Cold runs find an empty cache folder; warm runs what the cold one left.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import command_line, records, tables
from harness.cases import DTYPES

STEPS = ("import torch", "import adasplash2", "device", "first call", "second call")

CHILD = """
import json, sys, time
took = {}
def lap(step):
    global last
    now = time.perf_counter()
    took[step] = now - last
    last = now
device, backend, dtype, length = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
last = time.perf_counter()
import torch
lap("import torch")
import adasplash2
lap("import adasplash2")
def settle():
    if device == "cuda":
        torch.cuda.synchronize()
tensors = [torch.randn(1, 8, length, 64, device=device, dtype=getattr(torch, dtype)) for _ in "qkv"]
for tensor in tensors:
    tensor.requires_grad_()
one = torch.ones(1, device=device, requires_grad=True)
torch.autograd.grad(one * 2, one, torch.ones_like(one))  # the first one imports more of torch
settle()
lap("device")
for step in ("first call", "second call"):
    out = adasplash2.entmax_attention(*tensors, is_causal=True, backend=backend)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    settle()
    lap(step)
print(json.dumps(took))
"""


def first_call(
    device: str, backend: str, dtype: str, length: int, folder: Path
) -> dict[str, float]:
    """Seconds of each of :data:`STEPS`, and from start to end of the process."""
    environment = {
        **os.environ,
        "ADASPLASH2_CACHE_DIR": str(folder / "adasplash2"),
        # Drivers and Triton keep caches of their own: empty where ours is.
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "CUDA_CACHE_PATH": str(folder / "driver"),
    }
    command = [sys.executable, "-c", CHILD, device, backend, dtype, str(length)]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"error: the call with {backend} failed:\n{done.stderr}")
    return {**json.loads(done.stdout), "process": took}


def usable(device: str) -> list[str]:
    """Backends that can run the call."""
    import torch

    from adasplash2 import dispatch
    from adasplash2.problem import Inputs, attention_problem

    tensor = torch.zeros(1, 8, 64, 64, device=device, dtype=torch.float32)
    problem = attention_problem(
        Inputs(tensor, tensor, tensor),
        alpha=1.5,
        scale=None,
        is_causal=True,
        enable_gqa=False,
        needs_grad=True,
    )
    return list(dispatch.able(problem))


def main() -> None:
    parser = command_line.plain_parser(__doc__.partition("\n")[0], device="cpu")
    add = parser.add_argument
    add("--backends", nargs="+", help="default: all that can")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on the CPU")
    count = command_line.positive_int
    add("--length", type=count, default=1024, help="default %(default)s")
    add("--repeats", type=count, default=3, help="warm runs; default %(default)s")
    options = command_line.parsed(parser)
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for backend in options.backends or usable(options.device):
        with tempfile.TemporaryDirectory() as folder:
            call = functools.partial(
                first_call, options.device, backend, dtype, options.length, Path(folder)
            )
            tables.progress(f"{backend}: cold")
            cold = call()
            tables.progress(f"{backend}: warm")
            warm = [call() for _ in range(options.repeats)]
        medians = {step: statistics.median(run[step] for run in warm) for step in cold}
        found[backend] = {"cold": cold, "warm": medians}
    rows = [
        (backend, state, *(f"{times[step]:.3f}" for step in (*STEPS, "process")))
        for backend, states in found.items()
        for state, times in states.items()
    ]
    environment = records.environment(options.device)
    print(records.describe(environment))
    print(
        f"{dtype}, 8 heads, length {options.length}, head_dim 64, forward and backward; seconds\n"
    )
    print(tables.table(("backend", "cache", *STEPS, "process"), rows))
    if options.json:
        record = {"program": "first_call", "environment": environment, "seconds": found}
        records.write(options.json, record)


if __name__ == "__main__":
    main()

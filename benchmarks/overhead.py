"""What the library costs around the kernels: imports, a decision, a call beside its backend's.

On tiny tensors, so that the backend's own work is small. ``direct`` calls the backend's function
with a ready problem; ``call`` is the public function, which validates and decides first. With
``backward`` it is a forward and backward, where torch's autograd takes its part too.
"""

from __future__ import annotations

import subprocess
import sys
import time
import timeit
from collections.abc import Callable

import torch
from harness import command_line, records, tables
from harness.targets import Target

import adasplash2
from adasplash2 import dispatch
from adasplash2.problem import Inputs, Problem, attention_problem

DECISION_US, CALL_US, IMPORT_S = 5.0, 20.0, 0.15
"""The limits."""

IMPORT = (
    "import time, torch; began = time.perf_counter(); import adasplash2; "
    "print(time.perf_counter() - began)"
)


def microseconds(calls: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Each call's best block of many made in turn: what other programs take is not its cost. On a
    GPU, what the host spends."""
    number, blocks = 200, 30
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e6 * timeit.timeit(call, number=number) / number)
    return {name: min(taken) for name, taken in times.items()}


def import_seconds() -> float:
    command = [sys.executable, "-c", IMPORT]
    return min(
        float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in "12345"
    )


def main() -> None:
    parser = command_line.plain_parser(__doc__.partition("\n")[0], device="cpu", threads=1)
    command_line.add_targets(parser)
    options = command_line.parsed(parser)
    device = options.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = [torch.randn(1, 1, 16, 16, device=device, dtype=dtype) for _ in "qkv"]
    inputs = Inputs(*tensors)

    def problem(needs_grad: bool = False) -> Problem:
        return attention_problem(
            inputs, alpha=1.5, scale=None, is_causal=True, enable_gqa=False, needs_grad=needs_grad
        )

    asked, equal, trained = problem(), problem(), problem(needs_grad=True)
    chosen, config, _ = dispatch.choose(asked)
    to_train = dispatch.choose(trained)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    grad_out = torch.randn_like(tensors[0])

    def direct_backward() -> None:
        result = to_train.backend.forward(trained, inputs, to_train.config)
        to_train.backend.backward(trained, inputs, result.kept, grad_out, to_train.config)

    @torch.enable_grad()
    def call_backward() -> None:
        out = adasplash2.entmax_attention(*leaves, is_causal=True)
        torch.autograd.grad(out, leaves, grad_out)

    calls = {
        "decision": lambda: dispatch.choose(equal),
        "validation": problem,
        "direct": lambda: chosen.forward(asked, inputs, config),
        "call": lambda: adasplash2.entmax_attention(*tensors, is_causal=True),
        "direct, backward": direct_backward,
        "call, backward": call_backward,
    }
    with torch.no_grad():
        for call in calls.values():
            call()
        times = microseconds(calls, device)
    began = time.perf_counter()
    seconds = import_seconds()
    tables.progress(f"imports took {time.perf_counter() - began:.0f} s")
    targets = [
        Target("a decision made before", "us", times["decision"], DECISION_US),
        Target("a call above its backend's", "us", times["call"] - times["direct"], CALL_US),
        Target("import above torch's", "s", seconds, IMPORT_S),
    ]
    environment = records.environment(device)
    print(records.describe(environment))
    print(f"backend {chosen.name}, microseconds, best of 30 blocks\n")
    print(tables.table(("what", "us"), [(name, f"{us:.2f}") for name, us in times.items()]))
    print()
    for target in targets:
        print(target)
    if options.json:
        record = {
            "program": "overhead",
            "environment": environment,
            "microseconds": times,
            "import_seconds": seconds,
            "targets": [target.record() for target in targets],
        }
        records.write(options.json, record)
    if options.targets and not all(target.met for target in targets):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""What an installed package must do, on nothing but Python and torch: see ``make wheel``.

Run it with the interpreter of the environment, from anywhere. It asks of the package what a first
user would: attention forward and backward, entmax, the command. And that there is one OpenMP
library in the process, torch's: a second one would have threads that torch does not count.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import adasplash2
from adasplash2 import _core


def bisected(scores: torch.Tensor) -> torch.Tensor:
    """1.5-entmax of float64 rows: the threshold halved until float64 has no more digits."""
    z = scores / 2
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        enough = (z - middle).clamp(min=0).square().sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return (z - low).clamp(min=0).square()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.double() - expected).abs().max()
    return bool(error <= 1e-5 * expected.abs().max())


def check_numbers() -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 3, 300, 40, requires_grad=True) for _ in range(3))
    out = adasplash2.entmax_attention(query, key, value, is_causal=True)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))

    leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
    scores = (leaves[0] @ leaves[1].mT / 40**0.5).masked_fill(
        torch.ones(300, 300).triu(1).bool(), float("-inf")
    )
    assert close(adasplash2.entmax15(scores), bisected(scores.detach()))
    # The derivative of a row's entmax is known from its support alone.
    p = bisected(scores.detach())
    expected = p @ leaves[2]
    assert close(out, expected)
    grad_out = 2 * expected.detach()
    grad_p, slope = grad_out @ leaves[2].detach().mT, p.sqrt()
    grad_p = slope * (grad_p - (slope * grad_p).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True))
    q, k = (t.detach() for t in leaves[:2])
    assert close(grads[0], grad_p @ k / 40**0.5)
    assert close(grads[1], grad_p.mT @ q / 40**0.5)
    assert close(grads[2], p.mT @ grad_out)


def check_command() -> None:
    command = Path(sysconfig.get_path("scripts"), "adasplash2")
    told = subprocess.run([command, "info"], check=True, capture_output=True, text=True).stdout
    assert re.search(r"backend cpu\s+usable", told), told
    print(told)


def openmp_libraries() -> set[str]:
    """The files of OpenMP libraries that this process has loaded, as Linux tells."""
    mapped = Path("/proc/self/maps").read_text().split()
    return {path for path in mapped if re.search(r"/lib[gi]?omp[^/]*\.so", path)}


def main() -> None:
    folder = Path(adasplash2.__file__).parent
    assert "site-packages" in folder.parts, f"{folder} is not installed, but a checkout"
    check_numbers()
    check_command()
    if platform.system() == "Linux":
        assert _core.OPENMP
        [library] = openmp_libraries()
        print("OpenMP:", library)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"adasplash2 {adasplash2.__version__} works on Python {platform.python_version()} with "
        f"torch {torch.__version__}; {size / 2**20:.1f} MiB in {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())

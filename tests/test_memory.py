"""Memory of a forward and backward on the CPU grows with the length, not with its square.

Each measurement has a process of its own, whose peak is the kernel's count of resident pages.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc/self/status"
)

MEBIBYTE = 2**20

PRELUDE = """
import sys
import torch
import adasplash2

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(2)
torch.manual_seed(0)
"""


def told_by(program: str, *arguments: str) -> int:
    """What a process of its own prints that runs :data:`PRELUDE` and ``program``."""
    command = [sys.executable, "-c", PRELUDE + program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


PROGRAM = """
heads, length, sharpness, alpha, compiled = (float(argument) for argument in sys.argv[1:])
shape = (1, int(heads), int(length), 64)

def forward_and_backward(tensors):
    leaves = [t.requires_grad_() for t in tensors[:3]]
    return torch.autograd.grad(attend(*leaves), leaves, tensors[3])

def attend(*leaves):
    return adasplash2.entmax_attention(*leaves, alpha=alpha, is_causal=True, backend="cpu")

if compiled:
    attend = torch.compile(attend, backend="aot_eager", dynamic=True)
forward_and_backward([torch.randn(1, 1, 64, 64) for _ in range(4)])  # loads what loads lazily
tensors = [torch.randn(shape) for _ in range(4)]
tensors[0] *= sharpness
before = resident("VmRSS")
gradients = forward_and_backward(tensors)
assert all(gradient.isfinite().all() for gradient in gradients)
print(resident("VmHWM") - before)
"""


def peak_above_inputs(
    *, heads: int, length: int, sharpness: float, alpha: float = 1.5, compiled: bool = False
) -> int:
    """Bytes at the peak of a forward and backward above query, key, value and the output's
    gradient; output and gradients count."""
    return told_by(PROGRAM, *map(str, (heads, length, sharpness, alpha, int(compiled))))


@pytest.mark.parametrize(
    ("alpha", "sharpness"),
    [(1.5, 1.0), (2.0, 1.0), (1.5, 0.01), (2.0, 0.001), (2.0, 0.01)],
    ids=["sparse", "sparse-alpha2", "flat", "flat-alpha2", "long-lists"],
)
def test_far_below_a_dense_buffer(alpha: float, sharpness: float) -> None:
    """Half of one head's float32 scores would already be more."""
    length = 8192 if sharpness == 1.0 else 6144
    peak = peak_above_inputs(heads=2, length=length, sharpness=sharpness, alpha=alpha)
    assert peak < length**2 * 4 / 2


@pytest.mark.parametrize("sharpness", [1.0, 0.01], ids=["sparse", "flat"])
def test_grows_with_the_length(sharpness: float) -> None:
    short, long = (
        peak_above_inputs(heads=1, length=length, sharpness=sharpness) for length in (2048, 8192)
    )
    assert long < 6 * short  # linear: 4; quadratic: 16


def test_a_compiled_step_touches_no_more() -> None:
    """Its ``saved`` has room for 2,048 entries a row, 512 MiB of which these rows need 5 or so:
    more than ten times what a step takes. What malloc keeps differs from run to run by a tenth and
    more."""
    eager, compiled = (
        min(
            peak_above_inputs(heads=4, length=8192, sharpness=4.0, compiled=compiled)
            for _ in range(2)
        )
        for compiled in (False, True)
    )
    assert compiled < 1.25 * eager


SOFTMAX = """
length, asked, compiled = 6144, sys.argv[1], int(sys.argv[2])
ends = torch.tensor([0, 2000, 2000, 4500, length], dtype=torch.int32)
said, packed = {
    "window": ({"window": (500, 20)}, False),
    "bottom right": ({"is_causal": True, "causal_align": "bottom-right"}, False),
    "sinks": ({"is_causal": True, "sinks": torch.zeros(2), "softcap": 5.0}, False),
    "dropout": ({"window": (500, 20), "dropout_p": 0.1}, False),
    "packed": ({"is_causal": True}, True),
    "packed with slopes": ({"is_causal": True, "alibi_slopes": torch.rand(4, 2)}, True),
}[asked]

def attend(q, k, v):
    if not packed:
        return adasplash2.entmax_attention(q, k, v, **said, alpha=1.0)
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    places = torch.where(ends > len(q), len(q), ends)
    return adasplash2.entmax_attention_varlen(q, k, v, places, places, **said, alpha=1.0)

def forward_and_backward(q, k, v):
    leaves = [t.requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(attend(*leaves).sum(), leaves)

if compiled:
    attend = torch.compile(attend, backend="aot_eager", dynamic=True, fullgraph=True)
less = asked == "bottom right"
forward_and_backward(*(torch.randn(1, 2, n, 64) for n in (100 - less, 100, 100)))
tensors = [torch.randn(1, 2, n, 64) for n in (length - less, length, length)]
before = resident("VmRSS")
gradients = forward_and_backward(*tensors)
assert all(gradient.isfinite().all() for gradient in gradients)
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize(("asked", "compiled"), [
    *((asked, 0) for asked in ("window", "bottom right", "sinks", "dropout", "packed")),
    ("packed with slopes", 0), ("packed", 1), ("window", 1),
])  # fmt: skip
def test_softmax_keeps_no_scores(asked: str, compiled: int) -> None:
    """Of 6,144 positions and two heads those in float32 are 288 MiB, and there are some of them."""
    assert told_by(SOFTMAX, asked, str(compiled)) < 160 * MEBIBYTE


DECODING = """
sharpness, heads, queries = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
keys = torch.randn(1, 1, 2**20, 64)
query = torch.randn(1, heads, queries, 64) * sharpness

def attend(keys):
    return adasplash2.entmax_attention(query, keys, keys, enable_gqa=True, backend="cpu")

attend(keys[:, :, :64])
before = resident("VmHWM")
out = attend(keys)
assert out.isfinite().all()
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("sharpness", ["1.0", "0.01"], ids=["sparse", "flat"])
@pytest.mark.parametrize(("heads", "queries"), [("1", "1"), ("1", "16"), ("4", "16")])
def test_few_queries_copy_no_cache(heads: str, queries: str, sharpness: str) -> None:
    """A million keys of it are 256 MiB; lists of all keys 8 MiB for each row."""
    assert told_by(DECODING, sharpness, heads, queries) < 64 * MEBIBYTE


FAULTS_PROGRAM = """
import resource

tensors = [torch.randn(1, 1, 16, 16, requires_grad=True) for _ in range(3)]

def calls(number):
    for _ in range(number):
        out = adasplash2.entmax_attention(*tensors, backend="cpu")
        torch.autograd.grad(out, tensors, out)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
before = calls(300)
print(calls(500) - before)
"""


def test_short_calls_take_no_new_pages() -> None:
    """What a call gives back to the system, the next one waits for."""
    assert told_by(FAULTS_PROGRAM) < 500


SUPPORT_PROGRAM = """
keys = int(sys.argv[1])
query = torch.zeros(1, 1, 1, 1, requires_grad=True)
key, value = torch.zeros(2, 1, 1, keys, 1)
out, aux = adasplash2.entmax_attention(query, key, value, backend="cpu", return_aux=True)
torch.autograd.grad(out, query, out)
print(aux.support.item())
"""


def test_a_support_is_counted_beyond_what_float_holds() -> None:
    keys = 2**24 + 3
    assert told_by(SUPPORT_PROGRAM, str(keys)) == keys


@pytest.mark.slow
def test_a_long_sequence_fits() -> None:
    """32,768 positions, 8 heads, head_dim 64: 0.41 GiB. One head's scores are 4 GiB."""
    assert peak_above_inputs(heads=8, length=32768, sharpness=1.0) < 480 * MEBIBYTE


PROBABILITIES = """
_, aux = adasplash2.entmax_attention(*torch.randn(3, 1, 1, 64, 32), return_aux=True)
aux.probabilities()  # loads what loads lazily
_, aux = adasplash2.entmax_attention(*torch.randn(3, 1, 4, 2048, 32), return_aux=True)
before = resident("VmRSS")
aux.probabilities()
print(resident("VmHWM") - before)
"""


def test_probabilities_take_little_beside_what_is_found() -> None:
    """17 million scores, of which 0.2 million are found, of 16 bytes."""
    assert told_by(PROBABILITIES) <= 128 * MEBIBYTE

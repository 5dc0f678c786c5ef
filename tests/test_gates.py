"""What runs the tests fails where it must: ``on_gpu.sh``, the options of ``conftest.py``, the
bounds of ``fuzz.py``, the calls for compute-sanitizer. No GPU is needed: programs stand for it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import conftest
import fuzz
import pytest
import small_calls
import torch

import adasplash2
from adasplash2 import backends, dispatch
from adasplash2.backends import cuda
from adasplash2.backends.triton import sizes as triton_sizes
from adasplash2.problem import Inputs, attention_problem

pytest_plugins = "pytester"

TESTS = Path(__file__).parent
SCRIPT = TESTS / "on_gpu.sh"

HEALTHY = """
case " $* " in
*" pytest "*) for name in cuda triton none; do
    echo "backend $name: 3 passed, 0 failed, 2 skipped"
  done
  echo "9 passed, 6 skipped in 1.00s" ;;
*fuzz.py*) echo "0 of 7 failed, seed 1" ;;
*) echo "done" ;;
esac
"""
"""What an interpreter says where all is well."""


class OnGpu:
    """Runs the script on a machine with programs of our own."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self._bin = folder / "bin"
        self._bin.mkdir()
        self.program("nvidia-smi", 'echo "GPU 0: one"; echo "GPU 1: another"')
        self.program("compute-sanitizer", 'echo "ERROR SUMMARY: 0 errors"; "${@:5}"')
        self.python(HEALTHY)

    def program(self, name: str, text: str) -> None:
        path = self._bin / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def python(self, text: str) -> None:
        """The interpreter, which notes what it was asked."""
        self.program("python", f'echo "$CUDA_VISIBLE_DEVICES $*" >>"{self._bin}/asked"\n{text}')

    @property
    def asked(self) -> list[str]:
        """Since the last time."""
        notes = self._bin / "asked"
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return lines

    def __call__(self, *stages: str, **said: str) -> tuple[int, str]:
        names = "GPUS", "RESUME", "FUZZ_SECONDS", "MAY_SKIP"
        kept = {name: value for name, value in os.environ.items() if name not in names}
        path = f"{self._bin}:{os.environ['PATH']}"
        own = {"PATH": path, "PYTHON": "python", "PROCESSES": "8", "PARTS": "2"}
        found = subprocess.run(
            ["bash", SCRIPT, self.out, *stages],
            env={**kept, **own, **said},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return found.returncode, found.stdout


@pytest.fixture
def on_gpu(tmp_path: Path) -> OnGpu:
    return OnGpu(tmp_path)


def test_a_gpu_run_passes_where_all_is_well(on_gpu: OnGpu) -> None:
    code, said = on_gpu("tests", "fuzz", "tools")
    assert code == 0, said
    assert said.endswith("all passed\n")
    assert "cuda: 6 tests passed, 4 skipped\n" in said  # of two parts
    assert "gpu triton: 24 tests passed, 16 skipped\n" in said
    asked = on_gpu.asked
    assert len(asked) == 28
    assert {line.split()[0] for line in asked} == {"0", "1"}, "all GPUs are used"
    assert all("--expect-backends cuda,triton --judge-skips" in x for x in asked if "pytest" in x)


def test_a_gpu_run_is_taken_up_where_it_ended(on_gpu: OnGpu) -> None:
    on_gpu.python(f'[[ $* != *"--kind language"* ]] || exit 1\n{HEALTHY}')
    code, said = on_gpu("fuzz")
    assert (code, said.splitlines()[-1]) == (
        1,
        "failed: fuzz-cuda-language fuzz-triton-language",
    )
    assert len(on_gpu.asked) == 4
    on_gpu.python(HEALTHY)
    assert on_gpu("fuzz", RESUME="1") == (0, "0 of 7 failed, seed 1\n" * 4 + "all passed\n")
    assert len(on_gpu.asked) == 2
    code, said = on_gpu("fuzz", RESUME="1", PARTS="3")
    assert code == 2
    assert "other PARTS" in said


@pytest.mark.parametrize(
    "tells", ['echo "NVIDIA-SMI has failed"; exit 9', "exit 127", 'echo "No devices were found"']
)
def test_a_gpu_run_needs_a_gpu(on_gpu: OnGpu, tells: str) -> None:
    on_gpu.program("nvidia-smi", tells)
    code, said = on_gpu("fuzz")
    assert code == 2
    assert said.startswith("no GPU: ")
    assert not on_gpu.out.exists()


@pytest.mark.parametrize("stage", ["test", "check", "tests,fuzz"])
def test_a_stage_that_is_not_there_is_told_first(on_gpu: OnGpu, stage: str) -> None:
    assert on_gpu("fuzz", stage) == (2, f"no stage {stage}: tests fuzz tools speed\n")
    assert not on_gpu.asked


@pytest.mark.parametrize(
    ("python", "failed"),
    [
        ("exit 1", "cuda0"),
        ("exit 0", "cuda0"),
        ("kill -9 $PPID", "cuda0-ended-without-a-word"),
        (HEALTHY.replace("cuda triton", "triton"), "gpu-cuda-passed-nothing"),
        (HEALTHY.replace("triton none", "triton"), "rest-passed-nothing"),
        (HEALTHY.replace(": 3 passed", ": 0 passed"), "triton-nothing-passed-nothing"),
        (f"{HEALTHY}[[ $* != *--part?1/2* ]]", "triton1"),
    ],
    ids=["false", "true", "killed", "no cuda", "no rest", "skipped", "one part"],
)
def test_parts_that_do_not_pass_fail_a_gpu_run(on_gpu: OnGpu, python: str, failed: str) -> None:
    on_gpu.python(python)
    code, said = on_gpu("tests", PARTS="2" if failed == "triton1" else "1")
    assert code == 1
    assert failed in said.splitlines()[-1].removeprefix("failed: ").split()


@pytest.mark.parametrize(
    ("stage", "python", "failed"),
    [
        ("fuzz", "exit 0", "fuzz-cuda-plain"),
        ("fuzz", "echo 0 of 0 failed", "fuzz-cuda-plain"),
        ("fuzz", "kill -9 $PPID", "fuzz-triton-language-ended-without-a-word"),
        ("tools", "exit 1", "racecheck-cuda"),
        ("speed", "exit 0", "tune"),
        ("speed", "exit 0", "benchmarks"),
    ],
)
def test_other_checks_that_do_not_pass_fail_it(
    on_gpu: OnGpu, stage: str, python: str, failed: str
) -> None:
    on_gpu.python(python)
    code, said = on_gpu(stage)
    assert code == 1
    assert failed in said.splitlines()[-1].removeprefix("failed: ").split()


def test_a_sanitizer_that_does_not_start_fails_it(on_gpu: OnGpu) -> None:
    on_gpu.program("compute-sanitizer", '"${@:5}"')
    code, said = on_gpu("tools")
    assert code == 1
    assert "memcheck-cuda" in said


def test_every_table_of_tests_runs_on_gpus() -> None:
    """Files with tests by backend are in the script's tables; those of configurations a part."""
    line = next(x for x in SCRIPT.read_text().splitlines() if x.startswith("tables="))
    command = f'{line}; printf "%s\\n" "${{tables[@]}}"'
    tables = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    listed = {Path(name).name for name in tables.stdout.split()}
    assert all((TESTS / name).exists() for name in listed)
    by_backend = {
        path.name
        for path in TESTS.glob("test_*.py")
        if re.search(r"=\s*usable_backends\(\)|\"(backend|name)\",\s.*usable_backends\(\)",
                     path.read_text())
    }  # fmt: skip
    assert {"test_attention.py", "test_compat.py", "test_configs.py"} <= by_backend
    assert by_backend - {"test_configs.py"} <= listed
    assert "part configs tests/test_configs.py" in SCRIPT.read_text()


def test_everything_that_is_interpreted_runs_in_make_test() -> None:
    """However a file takes the mark; and nothing else is named, so that no list grows old."""
    told = subprocess.run(
        ["make", "--dry-run", "test-interpreted-0"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    listed = {Path(name).name for name in re.findall(r"tests/test_\w+\.py", told.stdout)}
    marked = {
        path.name
        for path in {*TESTS.glob("test_*.py")} - {Path(__file__)}
        if re.search(r"\binterpreted\b", path.read_text())
    }
    assert {"test_decoding.py", "test_features.py", "test_attention.py"} <= listed
    assert listed == marked


def test_what_a_gpu_run_prefers_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100: else the tests would run again with what they ran with before."""
    for name, room in (("shared_memory", cuda.sizes.SharedMemory(232_448, 233_472)),
                       ("_has_wgmma", True)):  # fmt: skip
        monkeypatch.setattr(cuda.configurations, name, lambda _, room=room: room)
    x = torch.empty(1, 2, 300, 64, dtype=torch.bfloat16, device="meta")
    said = {"scale": None, "is_causal": False, "enable_gqa": False, "needs_grad": True}
    asked = attention_problem(Inputs(x, x, x), alpha=1.5, **said)
    limits = triton_sizes.Limits(232_448, True, True)
    offered = {
        "scan": {config["scan"] for config in cuda.configurations.offered(asked)},
        "whole": {config["whole"] for config in triton_sizes.configs(asked, limits)},
    }
    for key, values in offered.items():
        loop = re.search(rf"for {key} in (.+); do", SCRIPT.read_text())
        assert loop
        assert set(loop[1].split()) <= values


# The options of conftest.py

PLANTED = """
import pytest

@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_of_a_backend(backend):
    pass

@pytest.mark.parametrize("name", ["cpu"])
def test_of_a_name(name):
    pass

@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_device(device):
    pass

@pytest.mark.parametrize("length", [80, 120, 1120])
def test_cuda_by_its_name(length):
    pass

@pytest.mark.parametrize("call", [slice(80, 90)])
def test_fields(call):
    pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Runs a file of tests with the options of ours."""

    def run(text: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(text)
        # Each run would import all of hypothesis anew.
        how = ("-p", "no:hypothesispytest", *options)
        return pytester.runpytest_inprocess(*how, plugins=[conftest])

    return run


Run = Callable[..., pytest.RunResult]


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        (("--only-backend", "cuda"), 1),
        (("--only-backend", "cpu"), 2),
        (("--only-backend", "none"), 6),
        (("--without", "length=120,80"), 8),
        (("--without", "start=80,8"), 9),
        (("--without", "stop=80"), 10),
        (("--only-backend", "none", "--without", "length=120", "--part", "1/2", "--together"), 3),
    ],
)
def test_tests_are_chosen_by_parameters(run: Run, options: tuple[str, ...], passed: int) -> None:
    result = run(PLANTED, *options)
    result.assert_outcomes(passed=passed, deselected=10 - passed - ("--part" in options) * 2)


REFUSED = "backend 'cuda' cannot run entmax of 3 rows of 4, float64 on cuda:0\\n"
REASONS = {
    "a graph holds kernels of the GPU": True,
    REFUSED + "  cuda: dtype torch.float64 is computed by other backends only": True,
    REFUSED + "  cuda: its kernels failed before": False,
    REFUSED + "  cuda: `window` is computed by other backends only\\n  cuda: no device": False,
    REFUSED: False,
    "torch sees no CUDA device": False,
    "the Triton backend cannot run here": False,
    "could not import 'transformers': No module named 'transformers'": False,
}


@pytest.mark.parametrize(("reason", "allowed"), REASONS.items(), ids=range(len(REASONS)))
def test_skips_are_judged(run: Run, reason: str, allowed: bool) -> None:
    text = f'import pytest\ndef test_it():\n    pytest.skip("""{reason}""")\ndef test(): pass\n'
    run(text).assert_outcomes(passed=1, skipped=1)
    result = run(text, "--judge-skips")
    result.assert_outcomes(passed=1, skipped=int(allowed), failed=int(not allowed))
    assert result.ret == (0 if allowed else 1)


def test_marks_and_files_that_are_skipped_are_judged(run: Run) -> None:
    marked = 'import pytest\n@pytest.mark.skip(reason="as it is")\ndef test_it(): pass\n'
    run(marked, "--judge-skips").assert_outcomes(errors=1)
    run(marked, "--judge-skips", "--may-skip", "as it").assert_outcomes(skipped=1)
    file = 'import pytest\npytest.importorskip("no_such_package")\ndef test_it(): pass\n'
    assert run(file, "--judge-skips").ret == pytest.ExitCode.INTERRUPTED
    assert run(file, "--judge-skips", "--may-skip", "could not").ret != pytest.ExitCode.INTERRUPTED


def test_what_a_backend_refuses_may_be_skipped() -> None:
    """In its own words; not that tensors are not on its device."""
    x = torch.ones(1, 1, 4, 4)
    for dtype, alpha, more in ((torch.float64, 1.5, {}), (torch.float32, 1.5, {"softcap": 3.0}),
                               (torch.float32, 1.0, {}), (torch.float32, 99.0, {})):  # fmt: skip
        tensors = Inputs(*(x.to(dtype) for _ in range(3)))
        said = {"scale": None, "is_causal": False, "enable_gqa": False, "needs_grad": True}
        asked = attention_problem(tensors, alpha=alpha, **said, **more)
        for refusals, allowed in ((cuda.refusals_anywhere, True), (cuda.refusals, False)):
            answer = dispatch.Answer("cuda", tuple(refusals(asked)))
            message = str(adasplash2.BackendRefused.of(asked, (answer,)))
            assert any(re.match(known, message) for known in conftest.SKIPS) == allowed, message


def test_expected_backends_must_pass_tests(run: Run) -> None:
    skips = 'import pytest\n@pytest.mark.parametrize("backend", ["cpu"])\ndef test_it(backend): '
    assert run(skips + "pass\n", "--expect-backends", "cpu").ret == 0
    result = run(skips + 'pytest.skip("so")\n', "--expect-backends", "cpu")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["backend cpu: expected, but no test passed"])


# Random problems, and what is launched for the sanitizer


@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_too_many_steps_are_a_failure(monkeypatch: pytest.MonkeyPatch, alpha: float) -> None:
    tensors = [torch.randn(1, 1, 9, 4) for _ in range(4)]
    case = fuzz.Attention(*tensors, alpha=alpha, scale=None, is_causal=False)
    assert not fuzz.check_attention(case, "cpu").failures
    of = adasplash2.attention_stats
    for more, failures in ((0, []), (1, ["iterations: 1 rows"])):

        def stats(*args: object, more: int = more, **said: object) -> adasplash2.AttentionStats:
            found = of(*args, **said)
            found.iterations[0, 0, 3] = fuzz.most_steps(alpha, "cpu") + more
            return found

        monkeypatch.setattr(adasplash2, "attention_stats", stats)
        assert fuzz.check_attention(case, "cpu").failures == failures


def test_loops_may_take_more_steps() -> None:
    root = Path(backends.__file__).parent
    for path, name in (
        (root / "cuda" / "kernels" / "common.cuh", "kSolveSteps"),
        (root / "triton" / "launch.py", "MAX_STEPS"),
    ):
        found = re.search(rf"\b{name} = (\d+)", path.read_text())
        assert found
        assert int(found[1]) > max(fuzz.most_steps(x, "cuda") for x in (1.5, 2.0, 9.0))
    assert fuzz.most_steps(9.0, "cpu") < 128, "the bisections of src/cpp/power.h"


def test_a_run_that_judges_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise adasplash2.BackendRefused("all")

    monkeypatch.setattr("sys.argv", ["fuzz.py", "--problems", "3", "--seed", "1"])
    assert fuzz.main() == 0
    monkeypatch.setattr(fuzz, "check", refuse)
    assert fuzz.main() == 1


def test_small_calls_run_and_know_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    small_calls.of_cuda("cpu")
    small_calls.of_triton("cpu")
    units = (Path(backends.__file__).parent / "cuda" / "kernels").glob("*.cu")
    kernels = sum(unit.read_text().count("__global__") for unit in units)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert len(small_calls.kernels_of_cuda()) == kernels > 20

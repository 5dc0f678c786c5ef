"""The command line: what it prints, as tables and JSON, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import adasplash2
from adasplash2 import backends, cache, cli, dispatch, records, tuning
from adasplash2.problem import Problem

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(dispatch, "AUTOTUNE", "cached")
    monkeypatch.setattr(dispatch, "FORCED", None)
    dispatch.forget()
    return tmp_path / "cache"


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def answer(*arguments: str, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


TINY = ("--shape", "1,2,16,8", "--device", "cpu")


def test_info_tells_versions_devices_backends_and_the_cache(folder: Path) -> None:
    found = answer("info")
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert {status["name"] for status in found["backends"]} == set(cli.REGISTRY)
    assert found["backend_versions"]["cpu"]["isa"]
    assert found["cache"] == str(folder)
    text = run("info").stdout
    assert "backend cpu" in text
    assert "usable: ready" in text
    assert torch.__version__ in text


def test_info_says_why_a_backend_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "REGISTRY", {"broken": "adasplash2_no_such_module"})
    dispatch.forget()
    assert "does not import" in run("info", code=cli.NO).stdout
    dispatch.forget()


def test_explain_tells_who_runs_a_call() -> None:
    told = answer("explain", *TINY, "--causal", "--alpha", "2", "--dtype", "bfloat16")
    assert told["chosen"] == "cpu"
    assert told["problem_class"].startswith("attention bfloat16 head_dim 8,8 lengths 16,16 causal")
    assert "alpha 2.0 training" in told["problem_class"]
    text = run("explain", *TINY, "--no-grad", "--heads-kv", "1", "--length-k", "5").stdout
    assert "query (1, 2, 16, 8), key (1, 1, 5, 8)" in text
    assert "without gradient" in text
    assert "chosen" in text


def test_explain_of_softmax_answers_as_python_does() -> None:
    told = answer("explain", *TINY, "--alpha", "1")
    q = torch.ones(1, 2, 16, 8, requires_grad=True)
    expected = dataclasses.asdict(adasplash2.explain(q, q, q, alpha=1))
    assert {key: told[key] for key in expected} == json.loads(json.dumps(expected))
    assert "softmax" in run("explain", *TINY, "--alpha", "1").stdout


# Every option, by what it changes


class Seen(Exception):
    """Ends a command where its options have arrived."""


OPTIONS = [
    ((), {}),
    (("--shape", "2,6,32,16"), {"batch": 2, "heads_q": 6, "length_q": 32, "head_dim": 16}),
    (("--heads-kv", "1"), {"heads_kv": 1}),
    (("--length-k", "5"), {"length_k": 5}),
    (("--dtype", "float16"), {"dtype": torch.float16}),
    (("--alpha", "1.7"), {"alpha": 1.7}),
    (("--no-grad",), {"needs_grad": False}),
    (("--device", "cpu"), {"device": torch.device("cpu")}),
]


@pytest.mark.parametrize(("options", "changed"), OPTIONS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("command", ["explain", "tune"])
def test_options_of_a_call_arrive(
    monkeypatch: pytest.MonkeyPatch, command: str, options: tuple[str, ...], changed: dict[str, Any]
) -> None:
    seen: list[Problem] = []

    def see(problem: Any, *_: Any, **__: Any) -> Any:
        seen.append(problem if command == "explain" else problem[0][0])
        raise Seen

    monkeypatch.setattr(
        *((dispatch, "explain", see) if command == "explain" else (tuning, "tune", see))
    )
    shape = () if "--shape" in options else ("--shape", "1,2,16,8")
    for causal in ("--causal", "--no-causal"):
        result = CliRunner().invoke(cli.main, [command, *shape, *options, causal])
        assert isinstance(result.exception, Seen), result.output
        asked = seen[-1]
        expected = {
            "batch": 1, "heads_q": 2, "heads_kv": changed.get("heads_q", 2), "length_q": 16,
            "length_k": changed.get("length_q", 16), "head_dim": 8, "dtype": torch.float32,
            "alpha": 1.5, "needs_grad": True, **changed,
        }  # fmt: skip
        assert {key: getattr(asked, key) for key in expected} == expected
        assert asked.scores.is_causal is (causal == "--causal")


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        (("--seconds", "7"), 7),
        (("--seconds", "7", "--quick"), 7),
        (("--quick",), cli.QUICK_SECONDS["cpu"]),
        ((), cli.SECONDS["cpu"]),
    ],
)
def test_tune_has_the_seconds_it_is_given(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], seconds: float
) -> None:
    told = []
    monkeypatch.setattr(
        tuning, "tune", lambda able, *, seconds, progress: told.append(seconds) or []
    )
    run("tune", "--device", "cpu", *options)
    assert told == [seconds]


def test_tune_measures_what_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(tuning, "tune", lambda able, **_: told.append(able) or [])
    run("tune", "--device", "cpu", "--shape", "1,2,16,8", "--shape", "1,2,64,8", "--backend", "cpu")
    assert [problem.length_q for problem, _ in told[0]] == [16, 64]
    assert [list(backends) for _, backends in told[0]] == [["cpu"], ["cpu"]]
    run("tune", "--device", "cpu", "--shape", "1,2,16,8", "--backend", "cuda")
    assert [list(backends) for _, backends in told[1]] == [[]]
    for quick in ([], ["--quick"]):
        run("tune", "--device", "cpu", *quick)
        common = cli.common_problems(torch.device("cpu"), bool(quick))
        assert [problem for problem, _ in told[-1]] == list(common)


def test_explain_asks_the_backend_it_is_told_to() -> None:
    assert answer("explain", *TINY, "--backend", "cpu")["why"].startswith("forced")
    assert answer("explain", *TINY, "--backend", "cuda", code=cli.NO)["chosen"] is None


def compared(monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Any, ...]:
    """What ``bench`` gives to :func:`entmax_attention`: a query, and keywords."""
    calls: list[Any] = []

    def attention(query: Any, key: Any, value: Any, **keywords: Any) -> Any:
        calls.append((query.detach().clone(), keywords))
        return query + 0 * (key + value)

    monkeypatch.setattr(cli, "entmax_attention", attention)
    run("bench", "--device", "cpu", "--length", "32", *options)
    return calls[0]


def test_options_of_bench_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keywords = compared(monkeypatch)
    assert query.shape == (1, 8, 32, 64)
    assert query.dtype == torch.float32
    assert query.std() == pytest.approx(4.0, rel=0.1)
    assert keywords == {"alpha": 1.5, "is_causal": True}
    assert compared(monkeypatch, "--alpha", "2")[1] == {"alpha": 2.0, "is_causal": True}
    assert compared(monkeypatch, "--no-causal")[1] == {"alpha": 1.5, "is_causal": False}
    assert torch.equal(compared(monkeypatch, "--sharpness", "8")[0], 2 * query)
    assert compared(monkeypatch, "--heads", "3")[0].shape == (1, 3, 32, 64)
    assert compared(monkeypatch, "--head-dim", "16")[0].shape == (1, 8, 32, 16)
    assert compared(monkeypatch, "--dtype", "float64")[0].dtype == torch.float64


def test_the_options_are_those_that_are_tried() -> None:
    """A new one needs a test above."""
    names = {name: {o for p in c.params for o in p.opts} for name, c in cli.main.commands.items()}
    call = {"--heads-kv", "--length-k", "--dtype", "--causal", "--alpha", "--grad", "--device"}
    assert names["explain"] == call | {"--shape", "--backend", "--json"}
    assert names["tune"] == call | {"--quick", "--shape", "--backend", "--seconds", "--json"}
    assert names["bench"] == {
        "--length", "--heads", "--head-dim", "--dtype", "--causal", "--alpha", "--sharpness",
        "--device", "--json",
    }  # fmt: skip


@pytest.mark.parametrize("command", sorted(cli.main.commands))
def test_help_shows_limits_that_there_are(command: str) -> None:
    assert "None" not in run(command, "--help").stdout


# What is printed, and where


def started(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "adasplash2", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # What a shell runs in the background ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_tune_tells_on_standard_error_what_it_does() -> None:
    result = run("tune", *TINY, "--shape", "1,2,64,8", "--seconds", "20", "--json")
    json.loads(result.stdout)
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    for line, length in zip(lines, (16, 64, 16, 64), strict=True):
        assert f"lengths {length},{length}" in line


def test_bench_tells_on_standard_error_what_it_does() -> None:
    result = run("bench", "--length", "32", "--length", "64", "--device", "cpu", "--heads", "1")
    assert result.stderr.splitlines() == ["1/2 length 32", "2/2 length 64"]


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_what_is_printed_fits_the_columns(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """A record takes few lines of them."""
    monkeypatch.setenv("COLUMNS", str(columns))
    tuned = run("tune", *TINY, "--seconds", "20").stdout.splitlines()
    shown = run("cache", "show").stdout.splitlines()
    bench = run("bench", "--length", "32", "--device", "cpu", "--heads", "1").stdout.splitlines()
    for lines in (tuned[:-1], shown[:-1], bench):
        assert max(map(len, lines)) <= columns
    if columns >= 60:
        assert len(tuned) <= 9
        assert len(shown) <= 7
        assert len(bench) <= 6


@pytest.mark.parametrize("columns", [40, 60])
def test_what_info_explain_and_features_print_fits_the_columns(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (("info",), ("explain", *TINY), ("features",), ("report",)):
        assert max(map(len, run(*command).stdout.splitlines())) <= columns
    summary = run("--help").stdout.partition("Commands:")[2].splitlines()
    assert all("..." not in line for line in summary) or columns < 60


def test_milliseconds_have_no_exponent() -> None:
    assert [cli._ms(ms) for ms in (0.01234, 12.345, 123.45, 123456.7)] == [
        "0.0123",
        "12.3",
        "123",
        "123457",
    ]


def test_an_empty_cache_says_so(folder: Path) -> None:
    told = run("cache", "show").stdout.splitlines()
    assert told == [
        "no records of speeds: adasplash2 tune makes them",
        f"nothing is kept in {folder}",
    ]


# Reports of bugs


def test_report_has_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answer("report")
    assert found["packages"]["torch"] == torch.__version__
    assert found["platform"]
    assert {status["name"] for status in found["backends"]} == set(cli.REGISTRY)
    assert found["sample"]["chosen"]
    assert found["cache"].startswith("0 files")
    monkeypatch.setattr(dispatch, "FORCED", "cdua")
    text = run("report").stdout  # of a backend that is none
    assert "got 'cdua'" in text
    assert "chosen" in text


def test_report_names_no_folder_and_no_variable_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "a home" / "cache"
    folder.parent.mkdir()
    folder.write_text("a file, which is a trouble that names it")
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(folder))
    monkeypatch.setenv("ADASPLASH2_LOG", "/a/secret")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with pytest.warns(RuntimeWarning, match="cannot read measured speeds"):
        told = run("report").stdout + run("report", "--json").stdout
    assert "PATH" in told
    assert "ADASPLASH2_CACHE_DIR" in told
    for secret in (str(tmp_path), str(Path.home()), "a home", "hunter2", "SECRET_TOKEN", "secret"):
        assert secret not in told


@pytest.mark.parametrize("chosen", ["", "~janedoe/cache"])
def test_warnings_beside_a_report_name_no_folder(tmp_path: Path, chosen: str) -> None:
    """On standard error, which is pasted with it: of the cache, and of variables that are wrong."""
    home = tmp_path / "Jane Doe"
    (home / ".cache").mkdir(parents=True)
    (home / ".cache" / "adasplash2").write_text("a file, which is a trouble that names it")
    environment = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "ADASPLASH2_CACHE_DIR": chosen,
        "ADASPLASH2_LOG": "/disk/of Jane/a.log",
        "ADASPLASH2_AUTOTUNE": "always",
    }
    with started("report", **environment) as process:
        told, said = (output.decode() for output in process.communicate(timeout=120))
    assert process.returncode == 0, said
    assert len(said.splitlines()) == 3, said
    for words in ("ADASPLASH2_LOG", "ADASPLASH2_AUTOTUNE", "PATH"):
        assert words in told
        assert words in said
    for secret in (str(tmp_path), str(ROOT), "Jane", "Doe", "janedoe"):
        assert secret not in told + said


# Mistakes that end in a sentence


def test_a_wrong_forced_backend_is_named_by_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FORCED", "cdua")
    words = "got 'cdua' from ADASPLASH2_BACKEND"
    assert words in run("explain", *TINY, code=2).output
    assert words in run("bench", "--length", "16", "--device", "cpu", code=2).output


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_what_is_larger_than_the_memory_has_no_traceback(command: str) -> None:
    call = {
        "bench": ("--length", "100000000000"),
        "tune": ("--shape", "1,8,100000000000,64", "--seconds", "5"),
    }[command]
    result = run(command, "--device", "cpu", *call, code=cli.NO)
    assert "more than the machine has to give" in result.stderr


def test_tune_says_why_nothing_was_measured() -> None:
    result = run("tune", *TINY, "--backend", "cuda", "--seconds", "5", code=cli.NO)
    assert "cuda: " in result.stderr.splitlines()[-1]
    assert "triton" not in result.stderr


def test_tune_says_first_that_nothing_will_be_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="cannot keep measured speeds"):
        result = run("tune", *TINY, "--seconds", "5", code=cli.CACHE_FAILED)
    assert "will not be kept" in result.stderr.splitlines()[0]


def test_warnings_show_no_source() -> None:
    """Warnings of the library are for who typed the command, not for who wrote it."""
    with started("cache", "show", ADASPLASH2_CACHE_DIR=__file__) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == cli.CACHE_FAILED
    assert said.startswith(b"warning: ")
    assert len(said.splitlines()) == 2
    assert b"cli.py:" not in said


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_packages_the_command_says_what_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom adasplash2.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"the command adasplash2 needs {missing}: pip install {missing}\n"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ADASPLASH2_BACKEND", "nowhere", "must be one of cuda, triton, cpu"),
        ("ADASPLASH2_BACKEND", "cuda", "not usable, torch sees no CUDA device"),
        ("ADASPLASH2_AUTOTUNE", "always", "must be one of off, cached, on; cached is taken"),
        ("ADASPLASH2_LOG", "loud", "must be one of"),
        ("ADASPLASH2_ISA", "mmx", "must be one of"),
        ("ADASPLASH2_CACHE_DIR", "/dev/null", "Not a directory"),
        ("ADASPLASH2_CACHE_DIR", "/dev/null/more", "Not a directory"),
        ("ADASPLASH2_CACHEDIR", "/tmp", "no such variable"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="words for a machine without a GPU")
def test_info_names_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    is_backend = variable == "ADASPLASH2_BACKEND"
    if is_backend:
        monkeypatch.setattr(dispatch, "FORCED", value)
    told = run("info", code=cli.NO if is_backend else 0).stdout
    [line] = [line for line in told.splitlines() if line.startswith(variable)]
    assert value in line
    assert words in line


def test_info_of_an_instruction_set_that_is_none_has_no_traceback() -> None:
    with started("info", ADASPLASH2_ISA="mmx") as process:
        told, said = process.communicate(timeout=120)
    assert process.returncode == 1, said  # no backend is usable then
    assert re.search(rb"ADASPLASH2_ISA +mmx: must be one of", told)
    assert b"Traceback" not in said


def test_info_has_nothing_against_right_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"BACKEND": "cpu", "AUTOTUNE": "on", "LOG": "DEBUG", "ISA": "baseline"}
    for name, value in settings.items():
        monkeypatch.setenv(f"ADASPLASH2_{name}", value)
    told = {each["variable"]: each["trouble"] for each in answer("info")["environment"]}
    assert told == dict.fromkeys(cli.SETTINGS)


def test_info_shows_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer("info")["packages"]["transformers"] == cli._versions()["transformers"]
    assert "transformers" in run("info").stdout


def test_a_reader_that_leaves_gets_no_traceback() -> None:
    with started("info") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(timeout=120) in (0, 1)


def test_ctrl_c_is_no_answer() -> None:
    with started("tune", "--device", "cpu", "--seconds", "60") as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert b"Traceback" not in said


def test_any_name_can_be_printed(tmp_path: Path) -> None:
    """A cache folder whose name is in no coding of the terminal."""
    folder = os.fsencode(tmp_path) + b"/\xff\xe4\xb8\xad"
    variables = {
        "ADASPLASH2_CACHE_DIR": os.fsdecode(folder),
        "PYTHONIOENCODING": "ascii",
        "NO_COLOR": "1",
        "FORCE_COLOR": "1",
    }
    with started("info", **variables) as process:
        told, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert b"Traceback" not in said
    assert rb"\udcff\u4e2d" in told
    assert b"\x1b[3" not in told
    with started("cache", "path", **variables) as process:
        assert process.communicate(timeout=120)[0].rstrip(b"\n") == folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is here")
def test_explain_of_a_device_that_is_not_here_exits_with_1() -> None:
    told = answer("explain", "--shape", "1,2,16,8", "--device", "cuda", code=cli.NO)
    assert told["chosen"] is None
    assert ["cuda", ["torch sees no CUDA device"]] in told["others"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explain",), "--shape"),
        (("explain", "--shape", "1,2,3"), "four sizes above 0"),
        (("explain", "--shape", "1,2,0,4"), "four sizes above 0"),
        (("explain", "--shape", "1,2,x,4"), "four sizes above 0"),
        (("explain", "--shape", "1,2,16,300"), "head_dim of 1 to 256, got 300"),
        (("explain", "--shape", "1,4,16,8", "--heads-kv", "3"), "multiple of the heads"),
        (
            ("explain", *TINY, "--alpha", "0.5"),
            "alpha must be a finite number of at least 1, got 0.5",
        ),
        (("explain", *TINY, "--dtype", "int8"), "int8"),
        (("explain", *TINY, "--backend", "nowhere"), "got 'nowhere'"),
        (("explain", "--shape", "1,2,16,8", "--device", "tpu"), "must be cpu, cuda or cuda:N"),
        (("tune", *TINY, "--backend", "nowhere"), "got 'nowhere'"),
        (("tune", "--shape", "1,1,4,4", "--device", "cuda:77"), "cuda:77 is not here"),
        (("explain", "--shape", "1,8,99999999999999999999,64"), "larger than any tensor"),
        (("explain", "--shape", "9999999999,99999999,64,64"), "larger than any tensor"),
        (("explain", "--shape", "1,2,16,8", "--device", "cuda:300"), "must be cpu, cuda or cuda:N"),
        (("explain", "--shape", "1,2,16,8", "--device", "cpu:1"), "must be cpu, cuda or cuda:N"),
        (("tune", *TINY, "--alpha", "1"), "1 is softmax"),
        (("tune", "--seconds", "nan"), "must be a finite number"),
        (("bench", "--sharpness", "inf"), "must be a finite number"),
        (("tune", "--seconds", "0"), "must be at least 1, got 0"),
        (("bench", "--sharpness", "much"), "'much' is not a valid float"),
        (("nothing",), "nothing"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: tuple[str, ...], words: str) -> None:
    assert words in run(*arguments, code=2).output


def test_tune_records_what_explain_then_tells() -> None:
    told = answer("tune", *TINY, "--causal", "--seconds", "20")
    [outcome] = told["outcomes"]
    assert told["kept"]
    [record] = outcome["records"]
    assert record["backend"] == "cpu"
    configs = [trial["config"] for trial in outcome["trials"]]
    assert len(configs) == len({tuple(config.items()) for config in configs}) > 1
    dispatch.forget()
    explained = answer("explain", *TINY, "--causal")
    assert explained["config"] == record["config"]
    assert explained["why"] == f"measured {record['milliseconds']:.3g} ms for its class"
    assert "nothing measured" in answer("explain", *TINY)["why"]


def test_tune_prints_default_beside_tuned() -> None:
    text = run("tune", *TINY, "--seconds", "20").stdout
    assert "default ms" in text
    assert "tuned ms" in text
    assert "gained" in text
    assert "1 records in" in text


def test_tune_that_cannot_keep_exits_with_3(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot keep measured speeds"):
        result = run("tune", *TINY, "--seconds", "20", "--json", code=cli.CACHE_FAILED)
    assert json.loads(result.stdout)["kept"] is False
    assert "could not be kept" in result.stderr


def test_tune_where_nothing_can_run_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "REGISTRY", {})
    assert "nothing was measured" in run("tune", *TINY, code=cli.NO).stderr


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_common_problems_are_of_different_classes(device: str, quick: bool) -> None:
    common = list(cli.common_problems(torch.device(device), quick))
    assert len({records.problem_class(problem) for problem in common}) == len(common)
    assert len(common) <= (20 if quick else 100)
    assert all(problem.device == torch.device(device) for problem in common)


def test_cache_path_show_and_clear(folder: Path) -> None:
    assert run("cache", "path").stdout.strip() == str(folder)
    assert answer("cache", "show")["records"] == []
    assert "does not exist" in run("cache", "clear").stdout
    answer("tune", *TINY, "--seconds", "20")
    (folder / "mine").mkdir()
    (folder / "cuda").mkdir()
    shown = answer("cache", "show")
    assert [(r["backend"], r["valid"]) for r in shown["records"]] == [("cpu", True)]
    assert shown["bytes"] > 100
    assert "head_dim 8,8" in run("cache", "show").stdout
    assert CliRunner().invoke(cli.main, ["cache", "clear"], input="n\n").exit_code == 1
    assert (folder / "speeds").exists()
    assert "deleted speeds, cuda" in run("cache", "clear", "--yes").stdout
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_cache_show_says_that_it_cannot_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="cannot read measured speeds"):
        run("cache", "show", code=cli.CACHE_FAILED)


def test_cache_show_tells_records_of_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    answer("tune", *TINY, "--seconds", "20")
    monkeypatch.setattr(records, "versions", lambda backend: {"kernels": "newer"})
    assert [r["valid"] for r in answer("cache", "show")["records"]] == [False]
    assert "other versions" in run("cache", "show").stdout


@pytest.mark.parametrize("call", ["shutil.rmtree", "os.listdir", "os.lstat"])
def test_a_cache_that_cannot_be_deleted_exits_with_3(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (folder / "speeds").mkdir(parents=True)
    module, _, name = call.partition(".")
    real = getattr(sys.modules[module], name)

    def refuse(path: Path, *rest: Any, **more: Any) -> Any:
        if str(path).startswith(str(folder)):
            raise PermissionError("Permission denied")
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        result = run("cache", "clear", "--yes", code=cli.CACHE_FAILED)
    assert "cannot be deleted: Permission denied" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
@pytest.mark.parametrize(
    ("level", "mode"), [("cache", 0o000), ("cache", 0o500), ("cache/speeds", 0o500)]
)
def test_a_folder_without_permission_exits_with_3(level: str, mode: int) -> None:
    """As its owner, who is not root, and may not be let into this checkout: what is imported late
    must be there before."""
    (tmp := Path(tempfile.mkdtemp())).chmod(0o755)  # pytest's own folders are closed to others
    folder = tmp / "cache"
    (folder / "speeds" / "inner").mkdir(parents=True)
    for path in (tmp, folder, folder / "speeds", folder / "speeds" / "inner"):
        os.chown(path, 54321, 54321)
    (tmp / level).chmod(mode)
    code = (
        "import os, adasplash2.cli as cli, platformdirs, filelock, rich._emoji_codes\n"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
        f"os.environ['ADASPLASH2_CACHE_DIR'] = {str(folder)!r}\n"
        "cli.main(['cache', 'clear', '--yes'])"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        )
    finally:
        shutil.rmtree(tmp)
    assert "Traceback" not in done.stderr
    assert done.returncode == cli.CACHE_FAILED, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_clear_deletes_links_and_not_what_they_lead_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "victim" / "inner").mkdir(parents=True)
    (folder / "speeds").mkdir(parents=True)
    (folder / "speeds" / "link").symlink_to(tmp_path / "victim")
    (folder / "cuda").symlink_to(tmp_path / "victim")
    assert "deleted" in run("cache", "clear", "--yes").stdout
    assert list(folder.iterdir()) == []
    assert (tmp_path / "victim" / "inner").exists()


def test_clear_where_others_could_lead_it_elsewhere_exits_with_3(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "speeds").mkdir(parents=True)
    tmp_path.chmod(0o777)
    result = run("cache", "clear", "--yes", code=cli.CACHE_FAILED)
    assert "can be written by others" in result.stderr
    tmp_path.chmod(0o700)
    folder.chmod(0o777)  # this one can be cleared: what is unsafe should go
    run("cache", "clear", "--yes")
    assert list(folder.iterdir()) == []


def test_bench_stands_beside_sdpa() -> None:
    told = answer("bench", "--length", "32", "--length", "64", "--device", "cpu", "--heads", "1")
    assert [row["length"] for row in told["rows"]] == [32, 64]
    for row in told["rows"]:
        assert row["backend"] == "cpu"
        for mode in ("forward", "forward+backward"):
            assert set(row[mode]) == {"adasplash2", "sdpa"}
            assert all(ms > 0 for ms in row[mode].values())
    assert "sdpa" in run("bench", "--length", "32", "--device", "cpu", "--heads", "1").stdout


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "adasplash2", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith("adasplash2, version ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"adasplash2": "adasplash2.__main__:main"}

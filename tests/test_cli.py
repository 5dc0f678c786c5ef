"""The command line: what it prints, as tables and JSON, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from adasplash2 import cache, cli, dispatch, records

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
    monkeypatch.setattr(dispatch, "REGISTRY", {"broken": "adasplash2_no_such_module"})
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
        (("explain", *TINY, "--alpha", "1"), "softmax"),
        (("explain", *TINY, "--dtype", "int8"), "int8"),
        (("explain", *TINY, "--backend", "nowhere"), "got 'nowhere'"),
        (("explain", "--shape", "1,2,16,8", "--device", "tpu"), "must be cpu, cuda or cuda:N"),
        (("tune", *TINY, "--backend", "nowhere"), "got 'nowhere'"),
        (("tune", "--shape", "1,1,4,4", "--device", "cuda:77"), "cuda:77 is not here"),
        (("tune", "--seconds", "0"), "seconds"),
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
    monkeypatch.setattr(dispatch, "REGISTRY", {})
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


def test_cache_show_tells_records_of_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    answer("tune", *TINY, "--seconds", "20")
    monkeypatch.setattr(records, "versions", lambda backend: {"kernels": "newer"})
    assert [r["valid"] for r in answer("cache", "show")["records"]] == [False]
    assert "other versions" in run("cache", "show").stdout


def test_a_cache_that_cannot_be_deleted_exits_with_3(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "speeds").mkdir(parents=True)

    def refuse(path: Path) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr("shutil.rmtree", refuse)
    result = run("cache", "clear", "--yes", code=cli.CACHE_FAILED)
    assert "cannot be deleted: Permission denied" in result.stderr


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
    assert project["scripts"] == {"adasplash2": "adasplash2.cli:main"}

"""Measured speeds on disk: kept, merged, and ignored with one warning where they are broken."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import torch

from adasplash2 import cache, records
from adasplash2.backends import cuda, triton
from adasplash2.problem import (
    Inputs,
    Problem,
    RowProblem,
    ScoreTransform,
    attention_problem,
)
from adasplash2.records import Record, Store, problem_class

CPU = torch.device("cpu")
BACKEND: Any = SimpleNamespace(name="made_up", versions=lambda: {"kernels": "abc"})


def record(label: str = "a class", milliseconds: float = 2.0, **changes: Any) -> Record:
    fields = {
        "problem_class": label,
        "backend": "made_up",
        "versions": records.versions(BACKEND),
        "config": {"block": 64, "isa": "wide"},
        "milliseconds": milliseconds,
        "default_milliseconds": 3.0,
        "measured": "2026-01-01T00:00:00+00:00",
    }
    return Record(**{**fields, **changes})


def problem(length: int = 64, heads: int = 2, heads_kv: int = 2, **changes: Any) -> Problem:
    query, key = torch.ones(1, heads, length, 4), torch.ones(1, heads_kv, length, 4)
    options = {"alpha": 1.5, "scale": None, "is_causal": False, "enable_gqa": True}
    return attention_problem(Inputs(query, key, key), **{**options, "needs_grad": False, **changes})


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own, in which nothing has been warned about."""
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "cache" / "speeds"


def silently(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


def known() -> list[Record]:
    """What a new process would know, which must not have anything to warn about."""
    return silently(lambda: list(Store(CPU)))


# Classes


def test_a_class_is_blind_to_batch_heads_scale_and_small_steps_of_length() -> None:
    label = problem_class(problem(4096))
    assert label == (
        "attention float32 head_dim 4,4 lengths 4096,4096 full group 1 alpha 1.5 inference"
    )
    assert problem_class(problem(5000, heads=8, heads_kv=8, scale=3.0)) == label
    assert problem_class(problem(2049)) == label


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 1024},
        {"is_causal": True},
        {"alpha": 2.0},
        {"alpha": 1.7},
        {"needs_grad": True},
        {"heads": 4},
    ],
)
def test_a_class_tells_what_changes_speed(changes: dict[str, Any]) -> None:
    assert problem_class(problem(**{"length": 4096, **changes})) != problem_class(problem(4096))


@pytest.mark.parametrize("base", [Problem, ScoreTransform, RowProblem])
def test_a_new_option_is_in_the_class(base: type) -> None:
    """Whoever adds a field need not think of records."""
    new = dataclasses.make_dataclass(
        "New", [("warmth", float, dataclasses.field(default=0.0))], bases=(base,), frozen=True
    )
    asked = RowProblem(5, 1000, torch.float32, CPU, 1.5, True) if base is RowProblem else problem()
    holder = asked.scores if base is ScoreTransform else asked
    values = {field.name: getattr(holder, field.name) for field in dataclasses.fields(base)}

    def label(**option: float) -> str:
        held = new(**values, **option)
        return problem_class(
            dataclasses.replace(asked, scores=held) if base is ScoreTransform else held
        )

    assert label() == problem_class(asked)
    assert label(warmth=30.0) == f"{label()} warmth 30.0"


def test_alphas_without_a_closed_form_are_one_class() -> None:
    assert problem_class(problem(alpha=1.7)) == problem_class(problem(alpha=1.3))


def test_rows_have_classes_of_their_own() -> None:
    rows = RowProblem(5, 1000, torch.float32, CPU, 1.5, needs_grad=True)
    assert problem_class(rows) == "rows float32 length 1024 alpha 1.5 training"
    rows = dataclasses.replace(rows, alphas=True)
    assert problem_class(rows) == "rows float32 length 1024 alphas alpha 1.5 training"


@pytest.mark.parametrize(("length", "bucket"), [(0, 1), (1, 1), (3, 4), (64, 64), (2**20, 2**20)])
def test_lengths_go_to_the_nearest_power_of_four(length: int, bucket: int) -> None:
    assert f"lengths {bucket},{bucket} " in problem_class(problem(length))


# What is kept


def test_records_are_found_by_another_process() -> None:
    assert known() == []
    assert silently(lambda: Store(CPU).add([record("one"), record("two")]))
    assert known() == [record("one"), record("two")]
    store = Store(CPU)
    assert store.find("one", BACKEND) == record("one")
    assert store.find("three", BACKEND) is None
    assert store.names("one") == {"made_up"}


def test_the_file_can_be_read_by_people(folder: Path) -> None:
    Store(CPU).add([record()])
    [path] = folder.glob("*.json")
    data = json.loads(path.read_text())
    assert path.name.startswith("cpu-")
    assert data["format"] == "adasplash2 measured speeds"
    assert data["schema"] == 1
    assert data["device"]["type"] == "cpu"
    assert data["records"] == [dataclasses.asdict(record())]
    assert len(path.read_text().splitlines()) > 10


def test_a_record_of_other_versions_is_kept_but_not_found() -> None:
    other: Any = SimpleNamespace(name="made_up", versions=lambda: {"kernels": "def"})
    Store(CPU).add([record()])
    Store(CPU).add([record(versions=records.versions(other), milliseconds=1.0)])
    store = Store(CPU)
    assert store.find("a class", BACKEND).milliseconds == 2.0
    assert store.find("a class", other).milliseconds == 1.0
    assert store.find("a class", SimpleNamespace(name="made_up", versions=dict)) is None


def test_versions_name_the_releases() -> None:
    found = records.versions(BACKEND)
    assert found["torch"] == torch.__version__
    assert set(found) == {"adasplash2", "torch", "kernels"}


def test_old_versions_go_when_there_are_many() -> None:
    made = [
        record(versions={"kernels": str(i)}, measured=f"2026-01-{i + 1:02d}T00:00:00+00:00")
        for i in range(records.KEPT_VERSIONS + 3)
    ]
    Store(CPU).add(made)
    assert {r.versions["kernels"] for r in known()} == {
        str(i) for i in range(3, records.KEPT_VERSIONS + 3)
    }


def test_a_newer_record_replaces_its_elder() -> None:
    Store(CPU).add([record(milliseconds=2.0)])
    Store(CPU).add([record(milliseconds=1.0)])
    assert [r.milliseconds for r in known()] == [1.0]


def test_writers_that_read_before_each_other_wrote_lose_nothing() -> None:
    first, second = Store(CPU), Store(CPU)
    first.add([record("one")])
    second.add([record("two")])
    assert known() == [record("one"), record("two")]


# What is broken


def good_file() -> bytes:
    Store(CPU).add([record()])
    content = Store(CPU).path.read_bytes()
    Store(CPU).path.unlink()
    return content


def changed(**changes: Any) -> Callable[[], bytes]:
    return lambda: json.dumps({**json.loads(good_file()), **changes}).encode()


BROKEN = {
    "empty": lambda: b"",
    "cut short": lambda: good_file()[:-20],
    "cut very short": lambda: good_file()[:20],
    "not text": lambda: b"\xff\xfe\x00",
    "endless nesting": lambda: b"[" * 200_000,
    "another JSON": lambda: b"[1, 2]",
    "another table": lambda: b'{"format": "something else"}',
    "another device": changed(device={"type": "cpu", "name": "Z80"}),
    "no schema": changed(schema=None),
    "schema of true": changed(schema=True),
    "schema of text": changed(schema="1"),
    "no list": changed(records={}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_ours_is_set_aside(content: Callable[[], bytes]) -> None:
    made = content()
    path = Store(CPU).path
    cache.write(path, made)
    with pytest.warns(RuntimeWarning, match=r"set .* aside as .*\.json\.broken") as told:
        assert list(Store(CPU)) == []
    assert len(told) == 1
    assert path.with_name(f"{path.name}.broken").read_bytes() == made
    assert not path.exists()
    assert silently(lambda: Store(CPU).add([record()]))
    assert known() == [record()]


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_breaks_before_a_write_is_set_aside(content: Callable[[], bytes]) -> None:
    made = content()
    store = Store(CPU)
    cache.write(store.path, made)
    with pytest.warns(RuntimeWarning, match="aside"):
        assert store.add([record()])
    assert known() == [record()]


@pytest.mark.parametrize(
    "change",
    [
        {"milliseconds": -1.0},
        {"milliseconds": 0},
        {"milliseconds": float("nan")},
        {"milliseconds": float("inf")},
        {"milliseconds": "2"},
        {"milliseconds": True},
        {"default_milliseconds": None},
        {"config": ["isa"]},
        {"config": {"isa": None}},
        {"config": {"isa": 1.5}},
        {"versions": {"torch": 2}},
        {"versions": None},
        {"backend": 7},
        {"problem_class": None},
        {"more": 1},
        {"milliseconds": 10**400},
        {"milliseconds": 10**5000},
        {"milliseconds": 1e300},
        {"milliseconds": 1e-300},
        {"milliseconds": [1.0]},
        {"default_milliseconds": -(10**400)},
        {"config": {"block": 2**63}},
        {"config": {"block": -(10**5000)}},
        {"config": {"block": True}},
        {"config": {"block": "x" * 10**6}},
        {"config": {"\udcff": 1}},
        {"config": {"isa": "\x1b[31m"}},
        {"config": {str(i): i for i in range(1000)}},
        {"versions": {"torch": "\ud800"}},
        {"versions": {"": "1"}},
        {"backend": "\udcff"},
        {"backend": "a\nb"},
        {"backend": ""},
        {"problem_class": "x" * 1000},
        {"problem_class": "a class\x00"},
        {"measured": "yesterday"},
        {"measured": "2026-01-01T00:00:00"},
        {"measured": "9" * 200},
        {"measured": 2026},
    ],
)
def test_a_broken_record_takes_no_other_with_it(change: dict[str, Any]) -> None:
    Store(CPU).add([record("one"), record("two")])
    path = Store(CPU).path
    data = json.loads(path.read_text())
    data["records"][0] |= change
    path.write_text(dumped(data))
    with pytest.warns(RuntimeWarning, match="leaves out a record") as told:
        assert list(Store(CPU)) == [record("two")]
    [text] = [str(warning.message) for warning in told]
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 600


def dumped(data: object) -> str:
    """JSON, whose numbers may have more digits than Python writes."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(data)
    finally:
        sys.set_int_max_str_digits(before)


def test_many_broken_records_are_one_warning() -> None:
    Store(CPU).add([record(str(i)) for i in range(20)])
    path = Store(CPU).path
    path.write_text(path.read_text().replace('"milliseconds": 2.0', '"milliseconds": -2.0'))
    with pytest.warns(RuntimeWarning, match=r"and 19 more: milliseconds is no time: -2\.0") as told:
        assert list(Store(CPU)) == []
    assert len(told) == 1


def test_the_least_and_most_of_a_time_are_times() -> None:
    both = [record("fast", 1e-6), record("slow", 1e9)]
    Store(CPU).add(both)
    assert known() == both


def test_a_date_in_the_future_pushes_nothing_out() -> None:
    planted = [
        record(versions={"kernels": f"planted {i}"}, measured=f"{2990 + i}-01-01T00:00:00+00:00")
        for i in range(records.KEPT_VERSIONS)
    ]
    Store(CPU).add(planted)
    Store(CPU).add([record(measured=records.now())])
    found = {r.versions["kernels"] for r in known()}
    assert "abc" in found
    assert len(found) == records.KEPT_VERSIONS


def test_a_file_never_grows_beyond_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_BYTES", 10_000)
    made = [record(str(i), measured=f"2026-01-01T00:00:{i:02d}+00:00") for i in range(60)]
    Store(CPU).add(made)
    assert Store(CPU).path.stat().st_size <= 10_000
    assert 5 < len(known()) < 60
    assert record("59", measured="2026-01-01T00:00:59+00:00") in known()


@pytest.mark.parametrize("kind", ["pipe", "link", "huge", "of others"])
def test_what_is_no_file_of_ours_is_set_aside(tmp_path: Path, kind: str) -> None:
    """And not waited for, not followed, not read."""
    Store(CPU).add([record()])
    path = Store(CPU).path
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.write_bytes((tmp_path / "elsewhere").read_bytes())
        path.chmod(0o666)
    with pytest.warns(RuntimeWarning, match=r"set .* aside"):
        assert list(Store(CPU)) == []
    assert silently(lambda: Store(CPU).add([record("new")]))
    assert known() == [record("new")]
    assert json.loads((tmp_path / "elsewhere").read_text())["records"]


def test_a_folder_that_others_can_write_is_neither_read_nor_written() -> None:
    Store(CPU).add([record()])
    path = Store(CPU).path
    before = path.read_bytes()
    path.parent.chmod(0o777)
    with warnings.catch_warnings(record=True, action="always") as told:
        store = Store(CPU)
        assert list(store) == []
        assert not store.add([record("new")])
    [warning] = told
    assert "can be written by others (mode 777)" in str(warning.message)
    assert list(store) == [record("new")]
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_size_limit_costs_a_warning(size: int) -> None:
    """As a full disk: the write itself fails, in a process of its own."""
    code = f"""
import resource, warnings
store.add([record("before")])
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
with warnings.catch_warnings(record=True, action="always") as told:
    assert not store.add([record("after")])
assert "File too large" in str(told[0].message), told[0].message
"""
    assert start(code).wait(timeout=120) == 0
    assert known() == [record("before")]


def test_a_shortage_while_reading_is_raised_to_be_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    Store(CPU).add([record()])
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read", fail)
        with pytest.raises(OSError, match="Too many open files"):
            Store(CPU)
    assert known() == [record()]


def test_a_device_whose_name_cannot_be_read_now_gets_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A record would lie where nobody looks for it."""

    def fail(path: Path) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    named = records.identity(CPU)
    records.identity.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(OSError, match="Too many open files"):
            records.identity(CPU)
    assert records.identity(CPU) == named


# What a record holds for


@pytest.mark.parametrize("part", ["core", "isa", "threads", "torch", "adasplash2"])
def test_a_cpu_record_holds_for_one_core_and_its_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str
) -> None:
    """The compiled core is changed by a byte, in a copy."""
    from adasplash2.backends import cpu

    Store(CPU).add([record(backend="cpu", versions=records.versions(cpu))])
    assert Store(CPU).find("a class", cpu) is not None
    if part == "core":
        content = bytearray(Path(cpu._core.__file__).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "core.so").write_bytes(content)
        changed = SimpleNamespace(
            __file__=str(tmp_path / "core.so"),
            isa=cpu._core.isa,
            usable_isas=cpu._core.usable_isas,
            OPENMP=cpu._core.OPENMP,
        )
        monkeypatch.setattr(cpu, "_core", changed)
        cpu._core_hash.cache_clear()
    elif part == "isa":
        monkeypatch.setattr(cpu, "_core", SimpleNamespace(isa=lambda: "another", OPENMP=True))
    elif part == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    elif part == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr(records, "version", lambda name: "0.0")
    try:
        assert Store(CPU).find("a class", cpu) is None
    finally:
        monkeypatch.undo()
        cpu._core_hash.cache_clear()


def copied_package(monkeypatch: pytest.MonkeyPatch, module: Any, folder: Path) -> Path:
    """A copy of a backend's files, which its ``resources`` reads instead."""
    copy = folder / "package"
    shutil.copytree(Path(module.__file__).parent, copy, ignore=shutil.ignore_patterns("*cache*"))
    monkeypatch.setattr(module, "resources", SimpleNamespace(files=lambda name: copy))
    return copy


TRITON = Path(triton.__file__).parent
TRITON_SOURCES = sorted(str(path.relative_to(TRITON)) for path in TRITON.rglob("*.py"))


@pytest.mark.parametrize("source", TRITON_SOURCES)
def test_a_triton_record_holds_for_one_set_of_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    digest = triton._source_digest
    copy = copied_package(monkeypatch, triton, tmp_path)
    before = digest.__wrapped__()
    assert before == digest()
    (copy / source).write_bytes((copy / source).read_bytes() + b"\n")
    assert digest.__wrapped__() != before


@pytest.mark.parametrize("module", [triton, cuda], ids=["triton", "cuda"])
def test_records_hold_for_the_hash_of_the_sources(
    monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    monkeypatch.setattr(cuda.compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="1"))
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda name: "3.0")
    Store(CPU).add([record(backend=module.name, versions=records.versions(module))])
    assert Store(CPU).find("a class", module) is not None
    monkeypatch.setattr(triton, "_source_digest", lambda: "another")
    monkeypatch.setattr(cuda.compiler, "sources_hash", lambda: "another" * 9)
    assert Store(CPU).find("a class", module) is None


@pytest.mark.parametrize("entry", [None, 1, "x", [], {}])
def test_an_entry_that_is_no_record_is_left_out(entry: object) -> None:
    Store(CPU).add([record()])
    path = Store(CPU).path
    data = json.loads(path.read_text())
    data["records"].append(entry)
    path.write_text(json.dumps(data))
    with pytest.warns(RuntimeWarning, match="leaves out a record"):
        assert list(Store(CPU)) == [record()]


def test_a_file_of_a_later_release_is_left_alone() -> None:
    content = changed(schema=records.SCHEMA + 1)()
    path = Store(CPU).path
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="ignores the measured speeds in .*schema 2"):
        store = Store(CPU)
    with pytest.warns(RuntimeWarning, match="keeps no measured speeds"):
        assert not store.add([record()])
    assert list(store) == [record()]
    assert path.read_bytes() == content
    assert silently(lambda: list(Store(CPU))) == []


def test_a_folder_in_the_files_place_is_ignored() -> None:
    path = Store(CPU).path
    path.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot read measured speeds"):
        store = Store(CPU)
    with pytest.warns(RuntimeWarning, match="cannot keep measured speeds"):
        assert not store.add([record()])
    assert list(store) == [record()]


def test_a_file_that_may_not_be_read_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    Store(CPU).add([record()])

    def refuse(path: Path, limit: int) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache, "read", refuse)
    with pytest.warns(RuntimeWarning, match="cannot read measured speeds .*Permission denied"):
        assert list(Store(CPU)) == []


def test_a_cache_folder_that_cannot_be_made_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="measured speeds"):
        store = Store(CPU)
    with pytest.warns(RuntimeWarning, match="cannot keep measured speeds"):
        assert not store.add([record()])
    assert list(store) == [record()]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("tempfile.mkstemp", OSError(errno.EROFS, "Read-only file system")),
        ("tempfile.mkstemp", PermissionError(errno.EACCES, "Permission denied")),
        ("os.fdopen", OSError(errno.ENOSPC, "No space left on device")),
        ("os.replace", OSError(errno.ENOSPC, "No space left on device")),
        ("os.replace", OSError(errno.EDQUOT, "Disk quota exceeded")),
        ("filelock.FileLock", PermissionError(errno.EACCES, "Permission denied")),
    ],
    ids=str,
)
def test_a_disk_that_takes_nothing_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, call: str, error: OSError
) -> None:
    Store(CPU).add([record("before")])
    store = Store(CPU)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.warns(RuntimeWarning, match=f"cannot keep .*{error.strerror}") as told:
            kept = [store.add([record("after")]), store.add([record("again")])]
    assert kept == [False, False]
    assert len(told) == 1
    assert {r.problem_class for r in store} == {"before", "after", "again"}
    assert known() == [record("before")]
    assert sorted(store.path.parent.glob(".*")) == []


def test_a_lock_that_is_never_freed_costs_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.05)
    store = Store(CPU)
    store.path.parent.mkdir(parents=True)
    with (
        filelock.FileLock(f"{store.path}.lock", is_singleton=False),
        pytest.warns(RuntimeWarning, match="another process holds"),
    ):
        assert not store.add([record()])
    assert silently(lambda: store.add([record()]))


# Other processes


HEAD = """
import os, signal, sys, tempfile, torch
sys.path.insert(0, sys.argv[1])
from test_records import record, records
store = records.Store(torch.device("cpu"))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    here = str(Path(__file__).parent)
    return subprocess.Popen([sys.executable, "-c", HEAD + code, here, *arguments])


@pytest.mark.parametrize("moment", ["os.replace", "os.fdopen", "tempfile.mkstemp"])
def test_a_writer_that_is_killed_breaks_nothing(moment: str) -> None:
    Store(CPU).add([record("before")])
    module, name = moment.split(".")
    kill = f"{module}.{name} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
    dying = start(kill + "store.add([record('lost')])")
    assert dying.wait(timeout=120) == -signal.SIGKILL
    assert known() == [record("before")]
    left = list(Store(CPU).path.parent.glob(".*.tmp"))
    assert len(left) == (moment != "tempfile.mkstemp")
    assert silently(lambda: Store(CPU).add([record("next")]))
    assert known() == [record("before"), record("next")]
    assert not list(Store(CPU).path.parent.glob(".*.tmp"))


def test_processes_that_write_at_once_lose_nothing() -> None:
    code = "for i in range(25): assert store.add([record(f'{sys.argv[2]} {i:02d}')])"
    writers = [start(code, str(number)) for number in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert len(known()) == 75
    assert {r.problem_class for r in known()} == {
        f"{n} {i:02d}" for n in range(3) for i in range(25)
    }
    assert not list(Store(CPU).path.parent.glob("*.broken"))


def test_a_reader_beside_a_writer_sees_whole_files() -> None:
    code = "for i in range(60): assert store.add([record(str(i), config={'x': 'y' * 5000})])"
    writer = start(code)
    seen = 0
    while writer.poll() is None:
        seen = max(seen, len(known()))
    assert writer.returncode == 0
    assert len(known()) == 60
    assert seen > 0


def test_identities_tell_devices_apart() -> None:
    cpu = records.identity(CPU)
    assert cpu["type"] == "cpu"
    assert cpu["name"]
    assert records.identity(torch.device("meta")) == {"type": "meta"}
    assert Store(CPU).path != Store(torch.device("meta")).path
    assert os.path.basename(Store(torch.device("meta")).path).startswith("meta-")

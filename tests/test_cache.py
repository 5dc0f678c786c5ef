"""Files between processes: whole or not there, checked by their names, and never in the way."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import filelock
import pytest

from adasplash2 import cache, problem
from adasplash2.backends.cuda import compile as compiler
from adasplash2.backends.cuda import layout


@pytest.fixture(autouse=True)
def _fresh(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A cache of its own, in which nothing has been warned about."""
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    private = tmp_path_factory.mktemp("private")
    monkeypatch.setattr(cache, "private", lambda: private)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "here"))
    assert cache.directory() == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", "~/there")
    assert cache.directory() == tmp_path / "there"


def test_without_it_the_folder_is_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ADASPLASH2_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *a, **k: tmp_path / a[0])
    assert cache.directory() == tmp_path / "adasplash2"


def test_a_file_is_written_into_folders_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    cache.write(path, b"one")
    cache.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("call", ["os.replace", "tempfile.mkstemp", "os.fdopen"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    cache.write(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(call, full_disk)
        with pytest.raises(OSError, match="No space left"):
            cache.write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def seal(name: str, content: bytes = b"kernel") -> Path:
    """The file that is kept."""
    before = set(kept())
    cache.keep_sealed("cuda", name, ".cubin", content)
    [path] = set(kept()) - before
    return path


def kept() -> list[Path]:
    return list((cache.directory() / "cuda").glob("*"))


def find(name: str) -> bytes | None:
    return cache.find_sealed("cuda", name, ".cubin")


def silently(name: str) -> bytes | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return find(name)


def test_a_sealed_file_is_found_again() -> None:
    assert silently("scan") is None
    seal("scan-sm_90")
    assert silently("scan-sm_90") == b"kernel"
    assert silently("scan-sm_80") is None
    assert silently("scan") is None


@pytest.mark.parametrize("content", [b"", b"kern", b"kernel and more", b"Kernel"])
def test_a_damaged_sealed_file_is_not_found_and_warned_about_once(content: bytes) -> None:
    path = seal("scan")
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"found .*scan-.*\.cubin damaged"):
        assert find("scan") is None
    assert silently("scan") is None
    cache.keep_sealed("cuda", "scan", ".cubin", b"kernel")
    assert silently("scan") == b"kernel"


def test_a_damaged_one_hides_no_good_one() -> None:
    path = seal("scan")
    path.with_name(f"scan-{'0' * 16}.cubin").write_bytes(b"something")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert find("scan") == b"kernel"


def test_a_sealed_file_that_cannot_be_read_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    seal("scan")

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache, "read", refuse)
    with pytest.warns(RuntimeWarning, match="cannot read its cache .*Permission denied"):
        assert find("scan") is None


# Whose it is


def test_folders_are_made_for_the_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        path = seal("scan")
    finally:
        os.umask(before)
    for place in (path.parent, path.parent.parent):
        assert place.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


OTHER = 54321
"""A user who is not there."""


def exposed(path: Path, how: str) -> None:
    """Let somebody else write ``path``."""
    if how == "world":
        path.chmod(0o777 if path.is_dir() else 0o666)
    elif how == "group":
        os.chown(path, -1, OTHER)
        path.chmod(0o770 if path.is_dir() else 0o660)
    elif how == "sticky":
        path.chmod(0o1777)
    else:
        os.chown(path, OTHER, -1)


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
WAYS = ["world", pytest.param("group", marks=AS_ROOT), pytest.param("owner", marks=AS_ROOT)]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_folder_that_others_can_write_is_done_without(
    tmp_path: Path, how: str, level: int
) -> None:
    """The folder itself, and what is above it: who can exchange it can exchange its content. One
    warning, and a folder of this process has what is made from then on."""
    path = seal("scan", b"planted")
    exposed([path.parent, tmp_path / "cache", tmp_path][level], how)
    with warnings.catch_warnings(record=True, action="always") as told:
        assert find("scan") is None
        cache.keep_sealed("cuda", "scan", ".cubin", b"kernel")
        assert find("scan") == b"kernel"
    [warning] = told
    assert re.search("does without its cache, since .* (written|belongs)", str(warning.message))
    with pytest.raises(cache.Unsafe), cache.locked(path):
        pytest.fail("locked in a folder of others")
    with pytest.raises(cache.Unsafe):
        cache.write(path, b"ours")
    assert path.read_bytes() == b"planted"
    [made] = (cache.private() / "cuda").iterdir()
    assert made.stat().st_mode & 0o777 == 0o600
    assert cache.private().stat().st_mode & 0o777 == 0o700


def test_a_sticky_folder_may_be_above_but_not_the_last(tmp_path: Path) -> None:
    path = seal("scan")
    exposed(tmp_path, "sticky")
    assert silently("scan") == b"kernel"
    exposed(path.parent, "sticky")
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        assert find("scan") is None


@pytest.mark.parametrize("how", WAYS)
def test_a_file_that_others_can_write_is_not_read(how: str) -> None:
    exposed(seal("scan"), how)
    with pytest.warns(RuntimeWarning, match="does without a file of its cache"):
        assert find("scan") is None


def test_the_users_own_group_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each user has a group of his own name; with somebody else in it it is another one."""
    import grp
    import pwd

    path = seal("scan")
    path.parent.chmod(0o770)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: pwd.struct_passwd(["ann", *"x11---"]))
    members: list[str] = []
    for name, others, is_own in (("ann", [], True), ("ann", ["eve"], False), ("all", [], False)):
        members[:] = others
        monkeypatch.setattr(
            grp, "getgrgid", lambda n, name=name: grp.struct_group((name, "x", n, members))
        )
        assert cache._is_own_group(path.parent.stat().st_gid) is is_own


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "huge", "socket"])
def test_what_is_no_file_of_ours_is_not_read_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = seal("scan")
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    with pytest.warns(RuntimeWarning, match="does without a file of its cache"):
        assert find("scan") is None
    cache.keep_sealed("cuda", "scan", ".cubin", b"kernel")
    assert find("scan") == b"kernel"


def test_a_file_that_grows_while_it_is_read_is_not_taken(tmp_path: Path) -> None:
    cache.write(tmp_path / "file", b"12345")
    assert cache.read(tmp_path / "file", 5) == b"12345"
    with pytest.raises(cache.Unfit, match="more than 4 bytes"):
        cache.read(tmp_path / "file", 4)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_is_a_file_of_the_user(tmp_path: Path, kind: str) -> None:
    lock, victim = tmp_path / "file.lock", tmp_path / "victim"
    victim.write_text("precious")
    lock.symlink_to(victim) if kind == "link" else os.mkfifo(lock)
    with cache.locked(tmp_path / "file"):
        assert lock.is_file()
        assert not lock.is_symlink()
    assert victim.read_text() == "precious"


def test_links_of_the_user_lead_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another disk, say; one that leads nowhere yet is made."""
    (tmp_path / "a").symlink_to("b/../c")
    (tmp_path / "b").mkdir(0o700)
    (tmp_path / "c").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "a" / "cache"))
    seal("scan")
    assert silently("scan") == b"kernel"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["cache"]
    (tmp_path / "disk").chmod(0o777)
    with pytest.warns(RuntimeWarning, match="disk can be written by others"):
        assert find("scan") is None


def test_links_in_a_circle_cost_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "a"))
    assert find("scan") is None
    with pytest.raises(OSError, match="Too many levels"):
        seal("scan")


# No folder


@pytest.mark.parametrize("variable", [None, "~/here", "~nobody-of-this-name/here"])
def test_without_a_home_there_is_a_folder_for_this_process(
    monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    homeless(monkeypatch)
    if variable is None:
        monkeypatch.delenv("ADASPLASH2_CACHE_DIR")
    else:
        monkeypatch.setenv("ADASPLASH2_CACHE_DIR", variable)
    with warnings.catch_warnings(record=True, action="always") as told:
        cache.keep_sealed("cuda", "scan", ".cubin", b"kernel")
        assert find("scan") == b"kernel"
        assert cache.directory() == cache.private() == cache.writable()
    [warning] = told
    assert "has no cache folder" in str(warning.message)


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's user without an entry in the list of users."""
    import pwd

    def nobody(_: object) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)


def test_a_working_directory_that_is_gone_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", "relative")
    monkeypatch.chdir(tmp_path)
    assert cache.directory() == tmp_path / "relative"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.warns(RuntimeWarning, match="has no cache folder"):
        assert cache.directory() == cache.private()


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "\udcff", "with a\nline"])
def test_any_name_of_a_folder_costs_at_most_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find("scan")
        with contextlib.suppress(OSError):
            seal("scan")
            found = find("scan")
    assert found in (None, b"kernel")


def test_what_is_private_goes_with_the_process(tmp_path: Path) -> None:
    """And not with a fork of it."""
    code = (
        "import os, sys; from adasplash2 import cache\n"
        "cache.claim(cache.private() / 'cuda'); print(cache.private())\n"
        "child = os.fork()\n"
        "if not child: sys.exit()\n"
        "os.waitpid(child, 0); print(cache.private().exists())"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    path, _, kept = done.stdout.partition("\n")
    assert kept.split()[-1] == "True"
    assert Path(path.strip()).parent == tmp_path
    assert not Path(path.strip()).exists()


def test_a_lock_keeps_others_out_for_so_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.05)
    path = tmp_path / "records.json"
    with (
        filelock.FileLock(tmp_path / "records.json.lock", is_singleton=False),
        pytest.raises(TimeoutError, match=r"another process holds records\.json\.lock"),
        cache.locked(path),
    ):
        pytest.fail("the lock was held by another one")
    with cache.locked(path):
        pass


def test_an_error_under_the_lock_is_passed_on_and_frees_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), cache.locked(tmp_path / "x"):
        full_disk()
    with cache.locked(tmp_path / "x"):
        pass


# Compiled kernels


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[str]:
    """A cache folder of its own and a compiler that counts what it is asked for."""
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    asked: Counter[str] = Counter()

    def compile_unit(unit: str, defines: dict[str, int], arch: str) -> compiler.Compiled:
        asked[unit] += 1
        return compiler.Compiled(f"{unit} {defines} {arch}".encode(), "")

    monkeypatch.setattr(compiler, "compile_unit", compile_unit)
    return asked


def test_a_unit_is_compiled_once(compiled: Counter[str]) -> None:
    assert compiler.cubin("rows.cu", {"DTYPE": 0}, "sm_90") == b"rows.cu {'DTYPE': 0} sm_90"
    assert compiler.cubin("rows.cu", {"DTYPE": 0}, "sm_90") == b"rows.cu {'DTYPE': 0} sm_90"
    assert compiled == {"rows.cu": 1}
    for defines, arch in (({"DTYPE": 1}, "sm_90"), ({"DTYPE": 0}, "sm_80")):
        assert compiler.cubin("rows.cu", defines, arch) == f"rows.cu {defines} {arch}".encode()
    assert compiled == {"rows.cu": 3}


SOURCES = compiler.sources()


@pytest.mark.parametrize("name", SOURCES)
def test_any_source_that_changes_is_compiled_anew(
    compiled: Counter[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A byte of one file, what a file is called, and a file more."""
    before = compiler.sources_hash()
    compiler.cubin("rows.cu", {}, "sm_90")
    changed = SOURCES | {name: SOURCES[name].replace("(", "( ", 1)}
    renamed = {f"{key}x" if key == name else key: text for key, text in SOURCES.items()}
    hashes = {before}
    for sources in (changed, renamed, SOURCES | {f"{name}.more.cuh": ""}):
        monkeypatch.setattr(compiler, "sources", lambda sources=sources: sources)
        compiler.sources_hash.cache_clear()
        hashes.add(compiler.sources_hash())
        compiler.cubin("rows.cu", {}, "sm_90")
    monkeypatch.undo()
    compiler.sources_hash.cache_clear()
    assert len(hashes) == 4
    assert compiled == {"rows.cu": 4}
    assert compiler.sources_hash() == before


def test_all_that_a_cubin_is_made_of_is_hashed() -> None:
    """The files on disk and what is generated are hashed: no kernel file is forgotten."""
    package = Path(compiler.__file__).parent / "kernels"
    shared = Path(problem.__file__).parent / "include" / "adasplash2"
    files = {path.name: path for path in package.iterdir() if path.suffix in (".cu", ".cuh")}
    files |= {f"adasplash2/{path.name}": path for path in shared.iterdir()}
    assert "adasplash2/threshold.h" in files
    texts = {name: path.read_text() for name, path in files.items()}
    assert texts | {"layout.cuh": layout.header()} == SOURCES
    included = {n for text in SOURCES.values() for n in re.findall(r'#include "([^"]+)"', text)}
    assert included <= SOURCES.keys()


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("CACHE_VERSION", 1000), ("nvrtc_version", lambda: (99, 0)), ("sources_hash", lambda: "x")],
)
def test_another_release_compiles_anew(
    compiled: Counter[str], monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any
) -> None:
    compiler.cubin("rows.cu", {}, "sm_90")
    monkeypatch.setattr(compiler, attribute, value)
    compiler.cubin("rows.cu", {}, "sm_90")
    compiler.cubin("scan.cu", {}, "sm_90")
    assert compiled == {"rows.cu": 2, "scan.cu": 1}


@pytest.mark.parametrize("keep", [0, 5])
def test_a_cut_off_cubin_is_compiled_anew(compiled: Counter[str], keep: int) -> None:
    whole = compiler.cubin("rows.cu", {}, "sm_90")
    [path] = kept()
    path.write_bytes(whole[:keep])
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert compiler.cubin("rows.cu", {}, "sm_90") == whole
    assert path.read_bytes() == whole
    assert compiled == {"rows.cu": 2}


def test_a_cache_that_takes_no_cubin_costs_a_warning(
    compiled: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ADASPLASH2_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels") as told:
        cubins = [compiler.cubin("rows.cu", {}, arch) for arch in ("sm_80", "sm_90")]
    assert len(told) == 1
    assert cubins == [b"rows.cu {} sm_80", b"rows.cu {} sm_90"]
    assert compiled == {"rows.cu": 2}


def test_a_planted_cubin_is_not_loaded(
    compiled: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the checksum of its content in its name, in a folder that others can write."""
    made = compiler.cubin("rows.cu", {}, "sm_90")
    [path] = kept()
    name = path.name.replace(cache.digest(made), cache.digest(b"planted"))
    path.unlink()
    (path.parent / name).write_bytes(b"planted")
    assert compiler.cubin("rows.cu", {}, "sm_90") == b"planted"  # by the user's own hand
    path.parent.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by others") as told:
        assert [compiler.cubin("rows.cu", {}, "sm_90") for _ in range(3)] == [made] * 3
    assert len(told) == 1
    assert compiled == {"rows.cu": 2}

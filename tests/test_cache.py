"""Files between processes: whole or not there, checked by their names, and never in the way."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import filelock
import pytest

from adasplash2 import cache


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_warned", set())


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


def test_a_sealed_file_is_found_again(tmp_path: Path) -> None:
    assert cache.find_sealed(tmp_path / "not there", "scan", ".cubin") is None
    path = cache.write_sealed(tmp_path, "scan-sm_90", ".cubin", b"kernel")
    assert cache.find_sealed(tmp_path, "scan-sm_90", ".cubin") == path
    assert cache.find_sealed(tmp_path, "scan-sm_80", ".cubin") is None
    assert cache.find_sealed(tmp_path, "scan", ".cubin") is None


@pytest.mark.parametrize("content", [b"", b"kern", b"kernel and more", b"Kernel"])
def test_a_damaged_sealed_file_is_not_found_and_warned_about_once(
    tmp_path: Path, content: bytes
) -> None:
    path = cache.write_sealed(tmp_path, "scan", ".cubin", b"kernel")
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"found .*scan-.*\.cubin damaged"):
        assert cache.find_sealed(tmp_path, "scan", ".cubin") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.find_sealed(tmp_path, "scan", ".cubin") is None
    assert cache.write_sealed(tmp_path, "scan", ".cubin", b"kernel") == path
    assert cache.find_sealed(tmp_path, "scan", ".cubin") == path


def test_a_damaged_one_hides_no_good_one(tmp_path: Path) -> None:
    good = cache.write_sealed(tmp_path, "scan", ".cubin", b"kernel")
    (tmp_path / f"scan-{'0' * 16}.cubin").write_bytes(b"something")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cache.find_sealed(tmp_path, "scan", ".cubin") == good


def test_a_sealed_file_that_cannot_be_read_is_not_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache.write_sealed(tmp_path, "scan", ".cubin", b"kernel")

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.warns(RuntimeWarning, match="cannot read its cache .*Permission denied"):
        assert cache.find_sealed(tmp_path, "scan", ".cubin") is None


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

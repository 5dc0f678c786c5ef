"""What a JSON file holds beside numbers: when, on what and with which versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

import adasplash2
from harness.cases import ROOT
from harness.packages import version
from harness.tables import progress


def environment(device: str) -> dict[str, object]:
    """When, on what and with which versions."""
    packages = ("adasplash2", "torch", "entmax", "adasplash", "triton", "numpy")
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device_name(device),
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # over the last minute: a busy machine spoils times
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        **_backend(device),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def describe(found: dict[str, object]) -> str:
    """An environment in two lines."""
    counts = f"{found['cores']} cores, {found['threads']} threads, load {found['load']:.1f}"
    names = ("adasplash2", "torch", "entmax", "adasplash", "python")
    versions = ", ".join(f"{name} {found[name]}" for name in names if found[name])
    backend = " ".join(str(found[name]) for name in ("backend", "isa") if found.get(name))
    return f"{found['date']}  {found['device']}, {counts}\n{versions}; backend {backend or 'none'}"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _backend(device: str) -> dict[str, object]:
    """What adasplash2 would run a small attention with."""
    tensor = torch.zeros(1, 1, 1, 1, device=device)
    explanation = adasplash2.explain(tensor, tensor, tensor)
    return {"backend": explanation.chosen, **explanation.config}


def _commit() -> str | None:
    """The git commit of this folder, with a plus sign if tracked files have been changed."""

    def git(*arguments: str) -> str:
        command = ("git", "--no-optional-locks", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, record: Mapping[str, object]) -> None:
    """Writes what a program has found as JSON."""
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    progress(f"wrote {path}")

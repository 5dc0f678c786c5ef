"""What is written once: no run of lines stands in two places of the public functions, the
operators, the backends and the core of the CPU; and a mask has one file of CUDA."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 5
"""Lines that may be equal in a row, whatever their indentation."""

FILES = [
    *(ROOT / "python" / "adasplash2" / name for name in ("functional.py", "ops.py")),
    *(path for suffix in ("py", "cu", "cuh") for path in (ROOT / "backends").rglob(f"*.{suffix}")),
    *(path for suffix in ("h", "cpp") for path in (ROOT / "src").rglob(f"*.{suffix}")),
]


def lines_of(path: Path) -> list[tuple[int, str]]:
    """Numbers and texts of all lines but empty ones."""
    lines = enumerate(path.read_text().splitlines(), start=1)
    return [(n, line.strip()) for n, line in lines if line.strip()]


def repeated(files: list[Path], longest: int) -> list[str]:
    """Where runs begin that are longer, and stand elsewhere too."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in files:
        lines = lines_of(path)
        for i in range(len(lines) - longest):
            run = tuple(line for _, line in lines[i : i + longest + 1])
            places[run].append(f"{path.name}:{lines[i][0]}")
    return [" and ".join(found) for found in places.values() if len(found) > 1]


def test_no_lines_stand_twice() -> None:
    assert len(FILES) > 60
    assert repeated(FILES, LONGEST) == []


def test_a_copy_is_found(tmp_path: Path) -> None:
    lines = [f"x{i} = {i}" for i in range(LONGEST + 1)]
    one, other = tmp_path / "one.py", tmp_path / "other.cu"
    one.write_text("import torch\n\n" + "\n".join(lines))
    other.write_text("{\n" + "\n\n".join(f"    {line}" for line in lines) + "\n}\n")
    assert repeated([one, other], LONGEST) == ["one.py:3 and other.cu:2"]
    one.write_text("\n".join(lines[1:]))
    assert repeated([one, other], LONGEST) == []
    assert repeated([other, other], LONGEST) != []


def test_masks_are_named_in_one_file_of_cuda() -> None:
    flags = "kCausal", "ADASPLASH2_CAUSAL"
    named = [path.name for path in FILES if any(flag in path.read_text() for flag in flags)]
    assert named == ["score.cuh"]

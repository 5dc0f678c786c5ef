"""The shape of the code: each thing is written once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINES = 6
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp"}


def sources() -> dict[str, str]:
    paths = [ROOT / "python/adasplash2" / name for name in ("functional.py", "ops.py")]
    paths += [path for path in (ROOT / "backends").rglob("*") if path.suffix in SUFFIXES]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def repeated(texts: Mapping[str, str]) -> dict[tuple[str, ...], list[str]]:
    """Runs of lines that stand more than once, empty ones and indentation aside: where they do."""
    places = defaultdict(list)
    for name, text in texts.items():
        lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        for at in range(len(lines) - LINES + 1):
            run = tuple(line for _, line in lines[at : at + LINES])
            places[run].append(f"{name}:{lines[at][0]}")
    return {run: found for run, found in places.items() if len(found) > 1}


def with_flag(texts: Mapping[str, str], flag: str) -> list[str]:
    return [name for name, text in texts.items() if flag in text]


def test_no_six_lines_stand_twice() -> None:
    assert not repeated(sources())


def test_a_planted_copy_is_found() -> None:
    texts = sources()
    lines = texts["backends/cuda/kernels/score.cuh"].splitlines()
    texts["backends/cuda/kernels/work.cuh"] += "\n".join(lines[40:50])
    assert repeated(texts)


def test_the_mask_of_what_is_behind_a_query_has_one_file_of_cuda() -> None:
    assert with_flag(sources(), "kCausal") == ["backends/cuda/kernels/score.cuh"]

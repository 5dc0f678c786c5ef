"""Random problems against the float64 reference: see ``fuzz.py``.

Each run has a seed of its own, which is printed at its end, also where all is well.
"""

from __future__ import annotations

import fuzz
import pytest
from cases import interpreted, usable_backends

from adasplash2.backends.triton.sizes import INTERPRETED


@interpreted()
@pytest.mark.parametrize("backend", usable_backends())
def test_random_problems(backend: str, fuzz_seed: int) -> None:
    """In the interpreter, where one takes seconds, a few that are small."""
    count, largest = (10, 40) if INTERPRETED else (300, fuzz.LARGEST)
    report = fuzz.run(fuzz_seed, range(count), backend, largest=largest, say=lambda line: None)
    assert not report.failed, "\n".join(report.lines)
    judged = report.counts["rows"] + report.counts["attention"]
    assert judged > count // 2, report.counts

"""Numbers that must not pass their limits: what ``--targets`` judges."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Target:
    """A number that must not pass its limit."""

    text: str
    unit: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return (
            f"{'met   ' if self.met else 'MISSED'}  {self.text}: {self.measured:.3g} {self.unit}, "
            f"{bound} {self.limit:g}"
        )

    def record(self) -> dict[str, object]:
        return {**asdict(self), "met": self.met}

"""What was found, beside what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tests.bench.measure import Run
from tests.bench.rows import Ratio, percentile

Sense = Literal["≤", "<", "≥"]


@dataclass(frozen=True)
class Finding:
    """One figure.

    Args:
        part: idle, scale, memory or curves.
        case: what was there, or how many.
        measure: what was measured.
        value: the figure.
        unit: its unit.
        sense: how it is compared with its target.
        target: what was asked for; None where nothing was.
        note: what else there is to know.

    """

    part: str
    case: str
    measure: str
    value: float
    unit: str = ""
    sense: Sense = "≤"
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it is as asked for; None where nothing was."""
        if self.target is None:
            return None
        match self.sense:
            case "≤":
                return self.value <= self.target
            case "<":
                return self.value < self.target
            case "≥":
                return self.value >= self.target

    def line(self) -> dict[str, Any]:
        """One line of `.bench/scale.jsonl`."""
        return {**asdict(self), "value": round(self.value, 4), "met": self.met}


@dataclass
class Findings:
    """All that one run has found.

    Args:
        tell: told of each as it comes.
        say: told what is being done meanwhile.

    """

    tell: Callable[[Finding], None]
    say: Callable[[str], None]
    all: list[Finding] = field(default_factory=list)

    def add(self, *found: Finding) -> None:
        """Keep these and tell them."""
        for one in found:
            self.all.append(one)
            self.tell(one)


def of_ratio(part: str, case: str, measure: str, ratio: Ratio | None, least: float | None) -> list[Finding]:
    """The median of the pairs, and how far they lie apart; nothing where there are none."""
    if ratio is None:
        return []
    note = f"{ratio.least:.2f} to {ratio.most:.2f} in {ratio.pairs} pairs"
    return [Finding(part, case, measure, ratio.median, "×", "≥", least, note)]


def of_latencies(part: str, case: str, run: Run) -> list[Finding]:
    """The two percentiles."""
    return [
        Finding(part, case, f"latency p{round(share * 100)}", found, "ms")
        for share in (0.5, 0.99)
        if (found := percentile(run.latencies, share)) is not None
    ]

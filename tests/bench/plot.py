"""The rows as a picture that a browser shows in light and in dark. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

from tests.bench.workloads import EXARQ, LIMIT

WIDTH: Final = 760
_NAMES: Final = 120  # of which the systems' names take so much
_VALUES: Final = 110
_BAR: Final = 16
_STEP: Final = 24
_TITLE: Final = 30
_GAP: Final = 18
SIZE: Final = 13

_PANELS: Final = (
    ("noop", "jobs_per_s", "jobs that do nothing, jobs/s"),
    ("orm", "jobs_per_s", "one insert through a session, jobs/s"),
    ("legacy", "jobs_per_s", "three statements and a lazy load in sync code, jobs/s"),
    ("latency", "p50_ms", "from before the enqueue to the job's first line, median ms (less is better)"),
)

_STYLE: Final = f"""
text {{ font: {SIZE}px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }}
.title {{ font-weight: 600; }}
.value, .foot {{ fill: #59636e; }}
.peer {{ fill: #afb8c1; }}
.ours {{ fill: #2f81f7; }}
.limit {{ fill: none; stroke: #8b949e; stroke-dasharray: 4 3; }}
.axis {{ stroke: #8b949e; }}
.line {{ fill: none; stroke-width: 2; }}
.line.ours {{ stroke: #2f81f7; }}
.line.peer {{ stroke: #afb8c1; }}
@media (prefers-color-scheme: dark) {{
  text {{ fill: #e6edf3; }}
  .value, .foot {{ fill: #9198a1; }}
  .peer {{ fill: #57606a; }}
  .line {{ fill: none; }}
  .line.peer {{ stroke: #57606a; }}
}}
"""

Row = Mapping[str, Any]


def plot(rows: Sequence[Row]) -> str:
    """Bars for one process: a panel for each workload that was measured."""
    parts: list[str] = []
    top = 0
    for workload, key, title in _PANELS:
        found = [row for row in rows if row["workload"] == workload and row["processes"] == 1 and row[key] is not None]
        if found:
            parts += _panel(found, key, title, top)
            top += _TITLE + len(found) * _STEP + _GAP
    foot = "medians of alternating runs, one process each, the same durable servers: make bench"
    parts.append(text(0, top + SIZE, foot, "foot"))
    return picture(parts, top + 2 * SIZE)


def picture(parts: Sequence[str], height: float) -> str:
    """These, as a file of its own."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return "\n".join([f'{head} role="img">', f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


def _panel(rows: Sequence[Row], key: str, title: str, top: int) -> list[str]:
    most = max(row[key] for row in rows)
    parts = [text(0, top + SIZE + 4, title, "title")]
    for place, row in enumerate(sorted(rows, key=lambda row: row[key], reverse=key == "jobs_per_s")):
        name, value = row["system"], row[key]
        y = top + _TITLE + place * _STEP
        length = max((WIDTH - _NAMES - _VALUES) * value / most, 1)
        parts += [
            text(0, y + SIZE, name),
            f'<rect class="{_kind(name)}" x="{_NAMES}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2"/>',
            text(_NAMES + length + 8, y + SIZE, f"{value:,.0f}" if value >= 100 else f"{value:.1f}", "value"),
        ]
    return parts


def _kind(name: str) -> str:
    return {EXARQ: "ours", LIMIT: "limit"}.get(name, "peer")


def text(x: float, y: float, said: str, kind: str = "name") -> str:
    """A line of words, from here on."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(said)}</text>'

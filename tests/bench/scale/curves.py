"""How cost grows, as a picture of four curves that a browser shows in light and in dark. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from tests.bench.plot import SIZE, WIDTH, picture, text
from tests.bench.scale.findings import Finding

_WIDE: Final = WIDTH / 2
_HIGH: Final = 220
_TOP, _BOTTOM, _LEFT, _RIGHT = 34, 52, 14, 96  # around the lines of a panel
_DOT: Final = 3
_LETTER: Final = 6.6


class _Line(NamedTuple):
    """One line of a panel.

    Args:
        called: the word at its end.
        counted: what the cases count: all that begin so.
        measure: what it shows.

    """

    called: str
    counted: str
    measure: str


class _Panel(NamedTuple):
    """One small picture; `beside_the_first` divides each line's figures by the first of them."""

    title: str
    beside_the_first: bool
    lines: tuple[_Line, ...]


_BESIDE_PLAIN: Final = "noop beside the plain run"
_PANELS: Final = (
    _Panel("waiting jobs: jobs/s, × none", False, (_Line("noop", "waiting, due later", _BESIDE_PLAIN),)),
    _Panel("finished jobs: jobs/s, × none", False, (_Line("noop", "finished", _BESIDE_PLAIN),)),
    _Panel("processes: jobs/s, × one", True, (_Line("noop", "process", "noop"), _Line("orm", "process", "orm"))),
    _Panel(
        "workers, × one: SQL/s idle, PostgreSQL's CPU a job",
        True,
        (
            _Line("CPU", "busy worker", "PostgreSQL's CPU of noop"),
            _Line("SQL/s", "idle worker", "SQL statements of all"),
        ),
    ),
)
"""What is drawn."""

Points = list[tuple[str, float]]


def curves(found: Sequence[Finding]) -> str | None:
    """The panels of which this run has found something; None where of none."""
    panels = [(panel, drawn) for panel in _PANELS if (drawn := _drawn(panel, found))]
    if not panels:
        return None
    parts = []
    for place, (panel, drawn) in enumerate(panels):
        parts += _parts(panel, drawn, place % 2 * _WIDE, place // 2 * _HIGH)
    height = (len(panels) + 1) // 2 * _HIGH
    foot = "medians, the same durable servers; dashed: no growth: make bench-scale"
    return picture([*parts, text(0, height + SIZE, foot, "foot")], height + 2 * SIZE)


def points(found: Iterable[Finding], counted: str, measure: str) -> Points:
    """What was measured, by how many there were: the first word of a case is a number."""
    split = [(*one.case.partition(" ")[::2], one) for one in found if one.measure == measure]
    return [(count, one.value) for count, what, one in split if what.startswith(counted)]


def _drawn(panel: _Panel, found: Sequence[Finding]) -> list[tuple[_Line, Points]]:
    drawn = []
    for line in panel.lines:
        if at := points(found, line.counted, line.measure):
            first = at[0][1] if panel.beside_the_first else 1.0
            drawn.append((line, [(count, value / first) for count, value in at] if first else []))
    return [(line, at) for line, at in drawn if at]


def _parts(panel: _Panel, drawn: list[tuple[_Line, Points]], left: float, top: float) -> list[str]:
    most = max(1.0, *(value for _, at in drawn for _, value in at)) * 1.1
    bottom, start, end = top + _HIGH - _BOTTOM, left + _LEFT, left + _WIDE - _RIGHT

    def y(value: float) -> float:
        return bottom - (bottom - top - _TOP) * value / most

    parts = [
        text(left, top + SIZE + 4, panel.title, "title"),
        f'<path class="limit" d="M{start:.1f} {y(1):.1f}H{end:.1f}"/>',
        f'<path class="axis" d="M{start:.1f} {bottom:.1f}H{end:.1f}"/>',
    ]
    said: list[float] = []
    for number, (line, at) in enumerate(drawn):
        kind = "peer" if number else "ours"
        places = [
            (start + (end - start) * place / max(len(at) - 1, 1), y(value)) for place, (_, value) in enumerate(at)
        ]
        way = "L".join(f"{x:.1f} {height:.1f}" for x, height in places)
        parts.append(f'<path class="line {kind}" d="M{way}"/>')
        parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{height:.1f}" r="{_DOT}"/>' for x, height in places]
        x, height = places[-1]
        said.append(max([height, *(other + SIZE for other in said if abs(other - height) < SIZE)]))
        parts.append(text(x + 8, said[-1] + SIZE / 3, f"{line.called} {at[-1][1]:.2f}"))
    for place, (count, _) in enumerate(drawn[0][1]):
        x = start + (end - start) * place / max(len(drawn[0][1]) - 1, 1)
        parts.append(text(max(x - _LETTER * len(count) / 2, left), bottom + SIZE + 6, count, "value"))
    return parts

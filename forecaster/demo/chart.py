"""A chart of one stream in a terminal's characters: what was, as a line of dots; what is forecast, as a fan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.text import Text

from forecaster.demo.board import Ahead

# Braille: two columns of four dots in a character. The bit of the dot at [row][column].
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BRAILLE = 0x2800
_LABEL = 9
_FAN_PART = 0.2


def fan_chart(values: Sequence[float], ahead: Sequence[Ahead], width: int, rows: int) -> Text:
    """Values up to now, the forecasts' medians and intervals after it.

    Args:
        values: the oldest first, NaN where one is missing.
        ahead: one forecast for each horizon, ascending.
        width: of the chart in characters.
        rows: likewise.
    """
    fan = max(8, int((width - _LABEL) * _FAN_PART))
    past = width - _LABEL - fan
    shown = list(values)[-2 * past :]
    seen = [value for value in shown if math.isfinite(value)]
    forecast = [each for each in ahead if math.isfinite(each.low + each.median + each.high)]
    if not seen or not forecast or rows < 3:  # noqa: PLR2004 - less is no chart
        return Text("\n" * max(rows - 1, 0))
    low = min(*seen, *(each.low for each in forecast))
    high = max(*seen, *(each.high for each in forecast))
    dots = 4 * rows - 1
    scale = dots / (high - low) if high > low else 0.0

    def height(value: float) -> int:
        """Of its dot, counted from the top."""
        return dots - round((value - low) * scale) if scale else dots // 2

    lines = _line(shown, past, rows, height)
    fans = _fan(seen[-1], forecast, fan, rows, height)
    text = Text(no_wrap=True)
    for row in range(rows):
        edge = {0: high, rows - 1: low}.get(row)
        text.append(f"{'' if edge is None else f'{edge:,.2f}':>{_LABEL - 1}} ", style="dim")
        text.append(lines[row], style="blue")
        text.append_text(fans[row])
        text.append("\n" if row < rows - 1 else "")
    return text


def _line(values: Sequence[float], columns: int, rows: int, height: object) -> list[str]:
    """The values as one line of dots, the newest at the right; neighbours are joined."""
    assert callable(height)
    cells = [[0] * columns for _ in range(rows)]
    start = 2 * columns - len(values)
    before: int | None = None
    for i, value in enumerate(values, start):
        if not math.isfinite(value):
            before = None
            continue
        at = height(value)
        # Down or up from the dot before, half of the way in its own column is enough to look joined.
        reach = range(min(at, before), max(at, before) + 1) if before is not None else range(at, at + 1)
        for dot in reach:
            cells[dot // 4][i // 2] |= _DOTS[dot % 4][i % 2]
        before = at
    return ["".join(chr(_BRAILLE + cell) if cell else " " for cell in row) for row in cells]


def _fan(last: float, ahead: Sequence[Ahead], columns: int, rows: int, height: object) -> list[Text]:
    """Medians and intervals, drawn between the horizons as straight lines that begin at the last value."""
    assert callable(height)
    points = [Ahead(0, last, last, last), *ahead]
    steps_max = ahead[-1].steps
    lines = [Text() for _ in range(rows)]
    for column in range(columns):
        at = _between(points, steps_max * (column + 1) / columns)
        top, middle, bottom = (height(value) // 4 for value in (at.high, at.median, at.low))
        for row in range(rows):
            if row == middle:
                lines[row].append("━", style="bold yellow")
            elif top <= row <= bottom:
                lines[row].append("░", style="cyan")
            else:
                lines[row].append(" ")
    return lines


def _between(points: Sequence[Ahead], steps: float) -> Ahead:
    """The forecast at a fraction of a step, on the straight line between its neighbours."""
    for left, right in itertools.pairwise(points):
        if steps <= right.steps:
            part = (steps - left.steps) / (right.steps - left.steps)
            median, low, high = (a + part * (b - a) for a, b in zip(left[1:], right[1:], strict=True))
            return Ahead(right.steps, median, low, high)
    return points[-1]

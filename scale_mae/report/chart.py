"""Charts as data. The script of the page draws them; tables and tests use the same data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from scale_mae.report.html_elements import Markup, details, table, tag
from scale_mae.report.log_lines import Floats

MAX_POINTS = 2000  # of one curve; a longer one is thinned, and keeps its smallest and largest values
TABLE_ROWS = 25  # of the table below a chart
Style = Literal["line", "faint", "dots", "area", "band"]


@dataclass(frozen=True)
class Series:
    """One curve of a chart.

    Attributes:
        name: Name in the legend.
        images: Horizontal position in images seen, ``[N]``.
        steps: Horizontal position in optimizer steps, ``[N]``.
        values: Vertical position, ``[N]``. NaN leaves a gap.
        style: ``area`` is stacked on the previous areas. ``band`` is filled down to ``low``.
        low: Lower edge of a band, ``[N]``.
    """

    name: str
    images: Floats
    steps: Floats
    values: Floats
    style: Style = "line"
    low: Floats | None = None

    def at(self, indices: Any) -> Series:
        """Return the series with only the points at these indices."""
        low = None if self.low is None else self.low[indices]
        return replace(self, images=self.images[indices], steps=self.steps[indices], values=self.values[indices], low=low)

    def data(self) -> dict[str, Any]:
        """Return the series as JSON data for the script of the page."""
        columns = {"images": self.images, "steps": self.steps, "y": self.values}
        if self.low is not None:
            columns["low"] = self.low
        lists = {key: [v if math.isfinite(v) else None for v in values.tolist()] for key, values in columns.items()}
        return {"name": self.name, "style": self.style, **lists}


@dataclass(frozen=True)
class EventMarker:
    """An event, drawn as a vertical line in a chart.

    Attributes:
        kind: Kind of the event, shown in the legend.
        images: Position in images seen.
        steps: Position in optimizer steps.
        text: Description.
    """

    kind: str
    images: float
    steps: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: Identifier, unique on the page.
        title: Heading.
        caption: Description of the curves.
        unit: Unit of the vertical axis.
        series: Curves.
        markers: Events that are drawn as vertical lines.
        log_scale: Whether the control "logarithmic loss" applies to it.
    """

    name: str
    title: str
    caption: str
    unit: str
    series: Sequence[Series]
    markers: Sequence[EventMarker] = field(default=())
    log_scale: bool = False

    def thinned(self) -> Chart:
        """Return the chart with at most :data:`MAX_POINTS` points per curve. Stacked curves keep the same points."""
        stacked = [s for s in self.series if s.style == "area"]
        stacked_indices = None
        if stacked:
            points = MAX_POINTS // len(stacked)
            stacked_indices = np.unique(np.concatenate([thin(s.values, points) for s in stacked]))
        series = [
            s.at(stacked_indices if stacked_indices is not None and s.style == "area" else thin(s.values, MAX_POINTS))
            for s in self.series
        ]
        return replace(self, series=series)

    def data(self) -> dict[str, Any]:
        """Return the chart as JSON data for the script of the page."""
        return {
            "name": self.name,
            "unit": self.unit,
            "log_scale": self.log_scale,
            "series": [s.data() for s in self.series],
            "markers": [vars(marker) for marker in self.markers],
        }

    def summary(self) -> str:
        """Return a description of the curves for screen readers."""
        curves = []
        for s in self.series:
            known = np.flatnonzero(np.isfinite(s.values))
            if len(known) and s.style not in ("faint", "dots"):
                values = s.values[known]
                curves.append(
                    f"{s.name}: first {values[0]:.4g}, last {values[-1]:.4g}, "
                    f"lowest {values.min():.4g}, highest {values.max():.4g}"
                )
        return f"{self.title}, {self.unit}. " + "; ".join(curves)

    def figure(self) -> Markup:
        """Return the HTML of the chart: the element that the script draws in, the caption, and a table."""
        hint = f"{self.name}-hint"
        area = tag(
            "div", id=f"chart-{self.name}", class_="chart", role="img", tabindex="0", aria_label=self.summary(),
            aria_describedby=hint, data_chart=self.name,
        )  # fmt: skip
        keys = "Keys: plus and minus zoom, the arrow keys move, 0 shows everything."
        caption = tag("figcaption", self.caption, " ", tag("span", keys, id=hint, class_="keys"))
        return tag("figure", tag("h3", self.title), area, caption, details("Table", self._table()))

    def _table(self) -> Markup:
        curves = [s for s in self.series if s.style != "dots"]
        images = np.unique(np.concatenate([s.images for s in curves]))
        shown = images[np.unique(np.linspace(0, len(images) - 1, min(TABLE_ROWS, len(images))).astype(int))]
        steps = {x: step for s in curves for x, step in zip(s.images.tolist(), s.steps.tolist(), strict=True)}
        columns = []
        for s in curves:
            values = dict(zip(s.images.tolist(), s.values.tolist(), strict=True))
            lows = {} if s.low is None else dict(zip(s.images.tolist(), s.low.tolist(), strict=True))
            columns.append([_cell(values.get(x), lows.get(x)) for x in shown.tolist()])
        rows = [[format_number(x), format_number(steps[x]), *cells] for x, *cells in zip(shown.tolist(), *columns, strict=True)]
        caption = f"{self.title}, {self.unit}: {len(rows)} of {len(images)} points"
        return table(caption, ["images", "step", *(s.name for s in curves)], rows)


def _cell(value: float | None, low: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return format_number(value) if low is None else f"{format_number(low)} to {format_number(value)}"


def format_number(value: float) -> str:
    """Return a number as text: integers with commas, others with four significant digits."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def thin(values: Floats, max_points: int) -> Any:
    """Return the increasing indices of at most ``max_points`` values to draw.

    They contain both ends. Of each interval between, they contain the smallest value, the largest value, and a missing one.
    """
    if len(values) <= max_points:
        return np.arange(len(values))
    kept = [np.array([0, len(values) - 1])]
    for interval in np.array_split(np.arange(1, len(values) - 1), max(1, (max_points - 2) // 3)):
        known = interval[np.isfinite(values[interval])]
        if len(known):
            kept.append(known[[values[known].argmin(), values[known].argmax()]])
        if len(known) < len(interval):
            kept.append(interval[~np.isfinite(values[interval])][:1])
    return np.unique(np.concatenate(kept))


def script_data(data: Any) -> Markup:
    """Return JSON for a script element. It escapes ``<``, because ``</script>`` and ``<!--`` must not occur there."""
    return Markup(json.dumps(data, allow_nan=False).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))

"""Charts as data: what the page's script draws, its tables show and tests read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from scale_mae.report.markup import Markup, disclosure, table, tag
from scale_mae.report.record import Floats

POINTS = 2000  # of one series; what is longer is thinned, smallest and largest values kept
ROWS = 25  # of the table under a chart
Style = Literal["line", "faint", "dots", "area", "band"]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: in the legend.
        images: place in the schedule, ``[N]``.
        steps: likewise in optimizer steps, ``[N]``.
        values: NaN leaves a gap, ``[N]``.
        style: ``area`` is stacked on the ones before it; ``band`` is filled down to ``low``.
        low: lower edge of a band, ``[N]``.
    """

    name: str
    images: Floats
    steps: Floats
    values: Floats
    style: Style = "line"
    low: Floats | None = None

    def at(self, kept: Any) -> Series:
        """Some of its points."""
        low = None if self.low is None else self.low[kept]
        return Series(self.name, self.images[kept], self.steps[kept], self.values[kept], self.style, low)

    def data(self) -> dict[str, Any]:
        """For the page's script."""
        found: dict[str, Any] = {"name": self.name, "style": self.style}
        columns = {"images": self.images, "steps": self.steps, "y": self.values}
        if self.low is not None:
            columns["low"] = self.low
        return found | {key: [v if math.isfinite(v) else None for v in values.tolist()] for key, values in columns.items()}


@dataclass(frozen=True)
class Mark:
    """Something that happened, drawn across a chart."""

    kind: str
    images: float
    steps: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart with its words.

    Attributes:
        name: unique on the page.
        title: heading.
        caption: what is shown, in a sentence.
        unit: of the vertical axis.
        series: its curves.
        marks: drawn across it.
        log_scale: whether it is asked for a logarithmic vertical axis along with the loss.
    """

    name: str
    title: str
    caption: str
    unit: str
    series: Sequence[Series]
    marks: Sequence[Mark] = field(default=())
    log_scale: bool = False

    def thinned(self) -> Chart:
        """The same with at most :data:`POINTS` points a curve; stacked curves keep the same ones."""
        stacked = [s for s in self.series if s.style == "area"]
        kept = None
        if stacked:
            share = POINTS // len(stacked)
            kept = np.unique(np.concatenate([thin(s.values, share) for s in stacked]))
        series = [s.at(kept if kept is not None and s.style == "area" else thin(s.values, POINTS)) for s in self.series]
        return Chart(self.name, self.title, self.caption, self.unit, series, self.marks, self.log_scale)

    def data(self) -> dict[str, Any]:
        """For the page's script."""
        return {
            "name": self.name,
            "unit": self.unit,
            "log_scale": self.log_scale,
            "series": [s.data() for s in self.series],
            "marks": [vars(mark) for mark in self.marks],
        }

    def summary(self) -> str:
        """What one would see, in words."""
        found = []
        for s in self.series:
            known = np.flatnonzero(np.isfinite(s.values))
            if len(known) and s.style not in ("faint", "dots"):
                values = s.values[known]
                found.append(
                    f"{s.name}: first {values[0]:.4g}, last {values[-1]:.4g}, "
                    f"lowest {values.min():.4g}, highest {values.max():.4g}"
                )
        return f"{self.title}, {self.unit}. " + "; ".join(found)

    def figure(self) -> Markup:
        """The place the script draws in, its caption, and its table."""
        hint = f"{self.name}-hint"
        place = tag(
            "div", id=f"chart-{self.name}", class_="chart", role="img", tabindex="0", aria_label=self.summary(),
            aria_describedby=hint, data_chart=self.name,
        )  # fmt: skip
        keys = "Keys when focused: plus and minus zoom, arrows move, 0 shows all."
        caption = tag("figcaption", self.caption, " ", tag("span", keys, id=hint, class_="keys"))
        return tag("figure", tag("h3", self.title), place, caption, disclosure("Table", self._table()))

    def _table(self) -> Markup:
        curves = [s for s in self.series if s.style != "dots"]
        images = np.unique(np.concatenate([s.images for s in curves]))
        chosen = images[np.unique(np.linspace(0, len(images) - 1, min(ROWS, len(images))).astype(int))]
        steps = {x: step for s in curves for x, step in zip(s.images.tolist(), s.steps.tolist(), strict=True)}
        columns = []
        for s in curves:
            known = dict(zip(s.images.tolist(), s.values.tolist(), strict=True))
            lower = {} if s.low is None else dict(zip(s.images.tolist(), s.low.tolist(), strict=True))
            columns.append([_cell(known.get(x), lower.get(x)) for x in chosen.tolist()])
        rows = [[number(x), number(steps[x]), *cells] for x, *cells in zip(chosen.tolist(), *columns, strict=True)]
        words = f"{self.title}, {self.unit}: {len(rows)} of {len(images)} points"
        return table(words, ["images", "step", *(s.name for s in curves)], rows)


def _cell(value: float | None, low: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return number(value) if low is None else f"{number(low)} to {number(value)}"


def number(value: float) -> str:
    """A number for people: whole ones with commas, others to four digits."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def thin(values: Floats, most: int) -> Any:
    """Which of ``values`` to draw, rising: the ends; of each stretch the smallest, the largest, and one that is missing."""
    if len(values) <= most:
        return np.arange(len(values))
    kept = [np.array([0, len(values) - 1])]
    for part in np.array_split(np.arange(1, len(values) - 1), max(1, (most - 2) // 3)):
        known = part[np.isfinite(values[part])]
        if len(known):
            kept.append(known[[values[known].argmin(), values[known].argmax()]])
        if len(known) < len(part):
            kept.append(part[~np.isfinite(values[part])][:1])
    return np.unique(np.concatenate(kept))


def script_data(data: Any) -> Markup:
    """JSON inside a script element, where ``</script>`` and ``<!--`` may not appear."""
    return Markup(json.dumps(data, allow_nan=False).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))

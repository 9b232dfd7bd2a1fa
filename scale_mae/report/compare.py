"""Compares the loss curves of several runs with each other, and each with its reference curve."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import scale_mae
from scale_mae.config import UserError
from scale_mae.report.chart import Chart, Series
from scale_mae.report.html_elements import note, section, table
from scale_mae.report.log_lines import Floats
from scale_mae.report.reference_band import (
    BandCheck,
    ReferenceCurve,
    check_band,
    no_matching_curve,
    read_curves,
    shipped_curves,
)
from scale_mae.report.run_record import RunRecord, read_run_record

TABLE_ROWS = 8
NO_OVERLAP = "The runs have no part of the schedule in common."


@dataclass(frozen=True)
class Comparison:
    """A comparison of runs.

    Attributes:
        names: A unique name for each run.
        records: The runs.
        checks: The comparison of each run with its reference curve.
        curves: The reference curves that were used.
        images: Numbers of images seen that all runs have reached, ``[P]``; empty without an overlap.
        losses: Smoothed loss of each run at these numbers, ``[R, P]``.
    """

    names: Sequence[str]
    records: Sequence[RunRecord]
    checks: Sequence[BandCheck]
    curves: Sequence[ReferenceCurve]
    images: Floats
    losses: Floats

    @property
    def outside(self) -> bool:
        """Whether any run lies outside its band."""
        return any(check.outside for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        runs = []
        for name, record, check, losses in zip(self.names, self.records, self.checks, self.losses, strict=True):
            fields = {key: getattr(check, key) for key in ("reference", "nearest", "intervals", "above", "below", "outside")}
            fields |= {"differences": list(check.differences), "text": str(check)}
            values = [None if np.isnan(loss) else loss for loss in losses.tolist()]
            runs.append({"run": name, "dir": str(record.dir), "loss": values, "band_check": fields})
        return {"images": self.images.tolist(), "runs": runs}

    def show(self) -> None:
        """Print a table of losses, and one line per run."""
        if len(self.images):
            grid = Table(box=None, pad_edge=False, title="Smoothed loss by images seen", title_justify="left")
            grid.add_column("images", justify="right")
            for name in self.names:
                grid.add_column(Text(name), justify="right", overflow="fold")
            for row in self._rows():
                grid.add_row(*map(Text, row))
            Console(width=None if sys.stdout.isatty() else 200).print(grid)
        else:
            print(NO_OVERLAP)
        for name, check in zip(self.names, self.checks, strict=True):
            print(f"{name}: {check}")

    def _rows(self) -> list[list[str]]:
        return [
            [f"{images:,.0f}", *("-" if np.isnan(loss) else f"{loss:.4f}" for loss in losses)]
            for images, losses in zip(self.images.tolist(), self.losses.T.tolist(), strict=True)
        ]

    def chart(self) -> Chart:
        """Return a chart of all curves and their bands."""
        series = []
        for curve in self.curves:
            first = next(r for r, c in zip(self.records, self.checks, strict=True) if c.reference == curve.name)
            steps = curve.images / first.images_at(1)
            series.append(Series(f"band of {curve.name}", curve.images, steps, curve.high, "band", curve.low))
        for name, record in zip(self.names, self.records, strict=True):
            images, steps = record.images(record.log.lines), record.log.column("step")
            series.append(Series(name, images, steps, record.log.smoothed[0]))
        caption = "Smoothed loss of each run, and the bands of the reference curves."
        return Chart("loss", "Loss", caption, "loss", series, log_scale=True).thinned()

    def page(self) -> str:
        """Return an HTML page with the chart and the tables."""
        from scale_mae.report.page import render_page

        charts = [self.chart()]
        checks = list(zip(self.names, map(str, self.checks), strict=True))
        header = ["images", *self.names]
        losses = table("Smoothed loss by images seen", header, self._rows()) if len(self.images) else note(NO_OVERLAP)
        parts = [
            section("curves", "Loss curves", *(chart.figure() for chart in charts)),
            section("losses", "Losses", losses),
            section("references", "Reference curves", table("Comparison with the bands", ["run", "result"], checks)),
        ]
        return render_page(f"Loss of {', '.join(self.names)}", f"made by scale-mae {scale_mae.__version__}", parts, charts)

    def draw(self, out: Path) -> None:
        """Write the chart as a PNG picture.

        Raises:
            UserError: The file cannot be written.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for series in self.chart().series:
            label = series.name.replace("$", r"\$")
            if series.low is not None:
                axis.fill_between(series.images, series.low, series.values, alpha=0.25, label=label)
            else:
                axis.plot(series.images, series.values, label=label)
        axis.set_xlabel("images seen")
        axis.set_ylabel("smoothed loss")
        axis.grid(alpha=0.3)
        axis.legend()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=120, format="png")
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
        finally:
            pyplot.close(figure)


def compare_runs(runs: Sequence[Path], reference: Path | None = None) -> Comparison:
    """Compare runs with each other and with reference curves.

    Args:
        runs: Run directories.
        reference: Where reference curves come from. A file is used for every run, whatever its setting. A folder is searched
            for the curve with the setting of the run, before the shipped curves. ``None`` searches only the shipped curves.

    Raises:
        UserError: A path is not a run directory, or ``reference`` is not valid.
    """
    records = [read_run_record(run) for run in runs]
    given = read_curves(reference) if reference else []
    any_setting = bool(reference and not reference.is_dir())
    curves = given if any_setting else [*given, *shipped_curves()]
    checks, used = [], dict[str, ReferenceCurve]()
    for record in records:
        matching = next((curve for curve in curves if any_setting or not curve.differences(record)), None)
        checks.append(check_band(record, matching) if matching else no_matching_curve(record, curves))
        if matching:
            used[matching.name] = matching
    names = [record.name for record in records]
    names = [name if names.count(name) == 1 else str(record.dir) for name, record in zip(names, records, strict=True)]
    images, losses = _losses_at_common_images(records)
    return Comparison(names, records, checks, list(used.values()), images, losses)


def _losses_at_common_images(records: Sequence[RunRecord]) -> tuple[Floats, Floats]:
    """Return numbers of images that all runs have seen, ``[P]``, and the smoothed losses there, ``[R, P]``."""
    seen = [record.images(record.log.lines) for record in records]
    if not all(len(images) for images in seen):
        return np.zeros(0), np.zeros((len(records), 0))
    first, last = max(images[0] for images in seen), min(images[-1] for images in seen)
    if first > last:
        return np.zeros(0), np.zeros((len(records), 0))
    points = np.unique(np.linspace(first, last, TABLE_ROWS).round())
    # the last log line of each run up to each point
    indices = [np.maximum(0, np.searchsorted(images, points, side="right") - 1) for images in seen]
    return points, np.stack([record.log.smoothed[0][index] for record, index in zip(records, indices, strict=True)])

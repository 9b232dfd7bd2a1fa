"""Loss curves of several runs beside each other, and each against its reference band."""

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
from scale_mae.report.charts import Chart, Series
from scale_mae.report.markup import note, section, table
from scale_mae.report.record import Floats, Record, read_record
from scale_mae.report.reference import Reference, Verdict, judge, named, shipped, unjudged

POINTS = 8  # of the table


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        names: unique, one a run.
        records: the runs.
        verdicts: one a run.
        bands: the reference curves that were used.
        images: points that all runs have come to, ``[P]``; empty where there are none.
        losses: smoothed, at those, ``[R, P]``.
    """

    names: Sequence[str]
    records: Sequence[Record]
    verdicts: Sequence[Verdict]
    bands: Sequence[Reference]
    images: Floats
    losses: Floats

    @property
    def outside(self) -> bool:
        """Whether any run lies outside its band."""
        return any(verdict.outside for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        runs = []
        for name, record, verdict, losses in zip(self.names, self.records, self.verdicts, self.losses, strict=True):
            told = {k: getattr(verdict, k) for k in ("reference", "nearest", "judged", "above", "below")}
            told |= {"outside": verdict.outside, "differences": list(verdict.differences), "text": str(verdict)}
            values = [None if np.isnan(loss) else loss for loss in losses.tolist()]
            runs.append({"run": name, "dir": str(record.dir), "loss": values, "verdict": told})
        return {"images": self.images.tolist(), "runs": runs}

    def show(self) -> None:
        """Print a table and a line a run."""
        if len(self.images):
            grid = Table(box=None, pad_edge=False, title="Smoothed loss at images seen", title_justify="left")
            grid.add_column("images", justify="right")
            for name in self.names:
                grid.add_column(Text(name), justify="right", overflow="fold")
            for row in self._rows():
                grid.add_row(*map(Text, row))
            Console(width=None if sys.stdout.isatty() else 200).print(grid)
        else:
            print("The runs have no stretch of the schedule in common.")
        for name, verdict in zip(self.names, self.verdicts, strict=True):
            print(f"{name}: {verdict}")

    def _rows(self) -> list[list[str]]:
        losses = self.losses.T.tolist()
        return [
            [f"{images:,.0f}", *("-" if np.isnan(v) else f"{v:.4f}" for v in at)]
            for images, at in zip(self.images.tolist(), losses, strict=True)
        ]

    def chart(self) -> Chart:
        """All curves over their bands."""
        curves = []
        for reference in self.bands:
            first = next(r for r, v in zip(self.records, self.verdicts, strict=True) if v.reference == reference.name)
            steps = reference.images / first.images_at(1)
            curves.append(Series(f"band of {reference.name}", reference.images, steps, reference.high, "band", reference.low))
        for name, record in zip(self.names, self.records, strict=True):
            images, steps = record.images(record.log.lines), record.log.column("step")
            curves.append(Series(name, images, steps, record.log.smoothed[0]))
        words = "Smoothed loss of each run; bands are those of reference curves."
        return Chart("loss", "Loss", words, "loss", curves, log_scale=True).thinned()

    def page(self) -> str:
        """A page like a report's."""
        from scale_mae.report.page import render

        charts = [self.chart()]
        rows = list(zip(self.names, map(str, self.verdicts), strict=True))
        parts = [
            section("curves", "Loss curves", *(chart.figure() for chart in charts)),
            section(
                "points",
                "At common points",
                table("Smoothed loss at images seen", ["images", *self.names], self._rows())
                if len(self.images)
                else note("The runs have no stretch of the schedule in common."),
            ),
            section("references", "Reference bands", table("Each run against its band", ["run", "verdict"], rows)),
        ]
        return render(f"Loss of {', '.join(self.names)}", f"made by scale-mae {scale_mae.__version__}", parts, charts)

    def draw(self, out: Path) -> None:
        """The chart as a PNG picture.

        Raises:
            UserError: it cannot be written.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for curve in self.chart().series:
            label = curve.name.replace("$", r"\$")
            if curve.low is not None:
                axis.fill_between(curve.images, curve.low, curve.values, alpha=0.25, label=label)
            else:
                axis.plot(curve.images, curve.values, label=label)
        axis.set_xlabel("images seen")
        axis.set_ylabel("loss, smoothed")
        axis.grid(alpha=0.3)
        axis.legend()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=120, format="png")
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
        finally:
            pyplot.close(figure)


def compare(runs: Sequence[Path], reference: Path | None = None) -> Comparison:
    """Read runs and judge each.

    Args:
        runs: run directories.
        reference: a file: judge every run by it, whatever its setting; a folder: by the one for its setting, these before
            the shipped ones. None: by the shipped ones.

    Raises:
        UserError: no run directory, or no reference curve.
    """
    records = [read_record(run) for run in runs]
    own = named(reference) if reference else []
    forced = bool(reference and not reference.is_dir())
    known = own if forced else [*own, *shipped()]
    verdicts, bands = [], dict[str, Reference]()
    for record in records:
        fitting = next((one for one in known if forced or not one.differences(record)), None)
        verdicts.append(judge(record, fitting) if fitting else unjudged(record, known))
        if fitting:
            bands[fitting.name] = fitting
    names = [record.name for record in records]
    names = [name if names.count(name) == 1 else str(record.dir) for name, record in zip(names, records, strict=True)]
    images, losses = _common(records)
    return Comparison(names, records, verdicts, list(bands.values()), images, losses)


def _common(records: Sequence[Record]) -> tuple[Floats, Floats]:
    seen = [record.images(record.log.lines) for record in records]
    if not all(len(images) for images in seen):
        return np.zeros(0), np.zeros((len(records), 0))
    first, last = max(images[0] for images in seen), min(images[-1] for images in seen)
    if first > last:
        return np.zeros(0), np.zeros((len(records), 0))
    points = np.unique(np.linspace(first, last, POINTS).round())
    # the newest log line of each run at a point
    at = [np.maximum(0, np.searchsorted(images, points, side="right") - 1) for images in seen]
    return points, np.stack([record.log.smoothed[0][where] for record, where in zip(records, at, strict=True)])

"""Reference curves: bands in which the loss of a correct run of a certain setting lies. See docs/guides/reports.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from scale_mae.config import Config, UserError
from scale_mae.report.log_lines import Floats, running_mean
from scale_mae.report.run_record import RunRecord

FORMAT = 1
STANDARD_DEVIATIONS = 4.0  # half width of a band in standard deviations over the seeds ...
MIN_HALF_WIDTH = 0.01  # ... but at least this share of the mean
MAX_OUTSIDE_SHARE = 0.1  # share of the intervals that may lie outside


class ReferenceCurveError(UserError):
    """A file is not a valid reference curve."""


@dataclass(frozen=True)
class ReferenceCurve:
    """The band of a setting. Interval ``i`` contains the images seen after ``images[i - 1]`` and up to ``images[i]``.

    Attributes:
        name: Name of the curve.
        setting: Configuration values that a run must share, by ``section.key``. A missing ``run.task`` means ``pretrain``.
            ``data`` lists names or digests of the same images.
        images: Ends of the intervals in images seen, increasing, ``[P]``.
        low: Smallest mean loss of the log lines in each interval, ``[P]``.
        high: Largest mean loss of the log lines in each interval, ``[P]``.
    """

    name: str
    setting: dict[str, Any]
    images: Floats
    low: Floats
    high: Floats

    def differences(self, record: RunRecord) -> list[str]:
        """Return the values of a run that differ from the setting: ``section.key: value of the run, not required value``."""
        if record.config is None:
            return [f"the configuration of {record.name} is unknown"]
        differences = []
        for key, required in ({"run.task": "pretrain"} | self.setting).items():
            if key == "data":
                if not {record.config.data.source, _index_digest(record)} & set(required):
                    differences.append(f"data: {record.config.data.source}, not {required[0]}")
            elif (value := setting_value(record.config, key)) != required:
                differences.append(f"{key}: {value}, not {required}")
        return differences


def setting_value(config: Config, key: str) -> Any:
    """Return the value of ``section.key`` as JSON represents it."""
    section, _, name = key.partition(".")
    if key == "model.patch_size":
        return list(config.model.patch)
    value = getattr(getattr(config, section, None), name, None)
    return list(value) if isinstance(value, tuple) else value


def _index_digest(record: RunRecord) -> str | None:
    from scale_mae.data.index import INDEX_NAME, Index, existing_index

    try:
        index = existing_index(record.config.data.source) if record.config else None
        return Index.open(index or record.dir / INDEX_NAME).digest
    except (UserError, OSError):
        return None


def interval_means(images: Floats, loss: Floats, ends: Floats) -> Floats:
    """Return the mean loss of the log lines in each interval, ``[P]``.

    The mean is NaN for an interval that the run has not completed or that contains no line. It is infinite for an interval
    with a loss that is not finite.

    Args:
        images: Images seen at each line, ``[N]``.
        loss: Loss of each line, ``[N]``.
        ends: Ends of the intervals in images seen, ``[P]``.
    """
    means = np.full(len(ends), np.nan)
    start = 0.0
    for index, end in enumerate(ends.tolist()):
        inside = loss[(images > start) & (images <= end)]
        if len(inside) and images[-1] >= end:
            means[index] = inside.mean() if np.isfinite(inside).all() else np.inf
        start = end
    return means


def compute_band(losses: Floats) -> tuple[Floats, Floats]:
    """Return the lower and the upper edge of a band, ``[P]`` each, from the interval means of several seeds, ``[S, P]``.

    Few seeds estimate the variance of one interval poorly, so it is averaged with the variances of the neighboring intervals.
    """
    mean, variance = losses.mean(0), losses.var(0, ddof=1)
    half_width = np.maximum(STANDARD_DEVIATIONS * np.sqrt(running_mean(variance, 1)), MIN_HALF_WIDTH * mean)
    return mean - half_width, mean + half_width


@dataclass(frozen=True)
class BandCheck:
    """The result of a comparison of a run with a reference curve.

    Attributes:
        reference: Name of the curve; ``None`` if no curve has the setting of the run.
        intervals: Number of intervals that the run has completed.
        above: Number of these intervals above the band.
        below: Number of these intervals below the band.
        differences: Differences from the setting of the curve, or of ``nearest`` if no curve has the setting of the run.
        nearest: Without a matching curve, the one that differs in the fewest keys; ``None`` if the configuration is unknown.
    """

    reference: str | None
    intervals: int = 0
    above: int = 0
    below: int = 0
    differences: Sequence[str] = ()
    nearest: str | None = None

    @property
    def outside(self) -> bool:
        """Whether more than a tenth of the intervals lie outside the band."""
        return self.above + self.below > MAX_OUTSIDE_SHARE * self.intervals

    def __str__(self) -> str:
        differences = "; ".join(self.differences)
        if self.reference is None:
            reason = f"the nearest is {self.nearest}, which differs in {differences}" if self.nearest else differences
            return f"no reference curve has its setting; {reason}"
        suffix = f" (its setting differs in {differences})" if differences else ""
        if not self.intervals:
            return f"not far enough for a comparison with {self.reference}{suffix}"
        counts = f"{self.above} of {self.intervals} intervals above and {self.below} below"
        return f"{'OUTSIDE' if self.outside else 'inside'} the band of {self.reference}: {counts}{suffix}"


def check_band(record: RunRecord, reference: ReferenceCurve) -> BandCheck:
    """Compare a run with a reference curve."""
    loss = np.array([np.nan if line.get("loss") is None else line["loss"] for line in record.log.lines], np.float64)
    means = interval_means(record.images(record.log.lines), loss, reference.images)
    known = ~np.isnan(means)
    above, below = means[known] > reference.high[known], means[known] < reference.low[known]
    differences = reference.differences(record)
    return BandCheck(reference.name, int(known.sum()), int(above.sum()), int(below.sum()), differences)


def no_matching_curve(record: RunRecord, curves: Sequence[ReferenceCurve]) -> BandCheck:
    """Return the result for a run whose setting none of the curves has."""
    differences, name = min(((curve.differences(record), curve.name) for curve in curves), key=lambda pair: len(pair[0]))
    return BandCheck(None, differences=differences, nearest=name if record.config else None)


def read_curve(path: Path) -> ReferenceCurve:
    """Read a reference curve from a JSON file.

    Raises:
        ReferenceCurveError: The file cannot be read or is not a valid reference curve.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ReferenceCurveError(f"{path}: format {content['format']} is not supported. The supported format is {FORMAT}.")
        images, low, high = (np.array(content[key], np.float64) for key in ("images", "low", "high"))
        name, setting = content["name"], content["setting"]
    except OSError as error:
        raise ReferenceCurveError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ReferenceCurveError(
            f"{path}: not a reference curve ({type(error).__name__}: {error}). docs/guides/reports.md describes the format."
        ) from None
    if not (isinstance(name, str) and name and isinstance(setting, dict)):
        raise ReferenceCurveError(f"{path}: name must be a string, and setting must map section.key to a value")
    finite = all(np.isfinite(part).all() for part in (images, low, high))
    if not (images.ndim == 1 and len(images) and images.shape == low.shape == high.shape and finite):
        raise ReferenceCurveError(f"{path}: images, low and high must be lists of numbers of the same length")
    if (np.diff(images, prepend=0.0) <= 0).any() or (low > high).any():
        raise ReferenceCurveError(f"{path}: images must increase, and low must not exceed high")
    data = setting.get("data", ["any"])
    if not (isinstance(data, list) and data and all(isinstance(name, str) for name in data)):
        raise ReferenceCurveError(f"{path}: setting.data must be a list of names and digests of the same images")
    if unknown := [key for key in setting if key != "data" and not _is_config_key(key)]:
        raise ReferenceCurveError(f"{path}: setting.{unknown[0]} is not a configuration key. scale-mae schema lists the keys.")
    return ReferenceCurve(name, setting, images, low, high)


def _is_config_key(key: str) -> bool:
    section, _, name = key.partition(".")
    kind = Config.model_fields[section].annotation if section in Config.model_fields else None
    return key == "model.patch_size" or name in getattr(kind, "model_fields", {})


def shipped_curves() -> list[ReferenceCurve]:
    """Return the reference curves of this package."""
    folder = Path(str(files("scale_mae.reference_curves")))
    return [read_curve(path) for path in sorted(folder.glob("*.json"))]


def read_curves(path: Path) -> list[ReferenceCurve]:
    """Read the reference curves of a file or a folder.

    Raises:
        ReferenceCurveError: A file is not a valid reference curve, or the folder contains none.
    """
    if not path.is_dir():
        return [read_curve(path)]
    curves = [read_curve(file) for file in sorted(path.glob("*.json"))]
    if not curves:
        raise ReferenceCurveError(f"{path}: contains no .json file with a reference curve")
    return curves

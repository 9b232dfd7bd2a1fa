"""Reference curves: the band in which the loss of a run of a certain setting lies; see docs/guides/reports.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from scale_mae.config import Config, UserError
from scale_mae.report.record import Floats, Record, running_mean

FORMAT = 1
DEVIATIONS = 4.0  # of the seeds' losses, on either side of their mean ...
FLOOR = 0.01  # ... and at least this share of it
TOLERATED = 0.1  # share of the stretches that may lie outside


class ReferenceError(UserError):
    """A reference curve that cannot be used."""


@dataclass(frozen=True)
class Reference:
    """The band of a setting. Stretch ``i`` is the images seen after ``images[i - 1]`` and up to ``images[i]``.

    Attributes:
        name: of it.
        setting: ``section.key`` to value of what a run must share, ``run.task`` pretrain where it is not named; ``data`` lists
            names or digests of the same images.
        images: ends of the stretches, rising, ``[P]``.
        low: least mean loss of the log lines of each stretch, ``[P]``.
        high: largest, ``[P]``.
    """

    name: str
    setting: dict[str, Any]
    images: Floats
    low: Floats
    high: Floats

    def differences(self, record: Record) -> list[str]:
        """What a run does not share: ``section.key: this of the run, that of the reference``."""
        if record.config is None:
            return [f"the config of {record.name} is not known"]
        found = []
        for key, wanted in ({"run.task": "pretrain"} | self.setting).items():
            if key == "data":
                if not {record.config.data.source, _digest(record)} & set(wanted):
                    found.append(f"data: {record.config.data.source}, not {wanted[0]}")
            elif (own := setting_value(record.config, key)) != wanted:
                found.append(f"{key}: {own}, not {wanted}")
        return found


def setting_value(config: Config, key: str) -> Any:
    """The value of ``section.key`` as JSON writes it."""
    section, _, name = key.partition(".")
    if key == "model.patch_size":
        return list(config.model.patch)
    value = getattr(getattr(config, section, None), name, None)
    return list(value) if isinstance(value, tuple) else value


def _digest(record: Record) -> str | None:
    from scale_mae.data.index import INDEX_NAME, Index, existing_index

    try:
        own = existing_index(record.config.data.source) if record.config else None
        return Index.open(own or record.dir / INDEX_NAME).digest
    except (UserError, OSError):
        return None


def stretch_means(images: Floats, loss: Floats, ends: Floats) -> Floats:
    """Mean loss of the log lines in each stretch, ``[P]``; NaN where a run has none or has not come to the end of it.

    Args:
        images: of each line, ``[N]``.
        loss: likewise; what is not finite makes its stretch infinite.
        ends: of the stretches, ``[P]``.
    """
    found = np.full(len(ends), np.nan)
    start = 0.0
    for number, end in enumerate(ends.tolist()):
        inside = loss[(images > start) & (images <= end)]
        if len(inside) and images[-1] >= end:
            found[number] = inside.mean() if np.isfinite(inside).all() else np.inf
        start = end
    return found


def band(losses: Floats) -> tuple[Floats, Floats]:
    """Lower and upper edge, ``[P]`` each, from the stretch means of several seeds, ``[S, P]``: their mean, and deviations.

    Few seeds say little of the deviation of one stretch, so its variance is the mean of three, with those beside it.
    """
    mean, variance = losses.mean(0), losses.var(0, ddof=1)
    half = np.maximum(DEVIATIONS * np.sqrt(running_mean(variance, 1)), FLOOR * mean)
    return mean - half, mean + half


@dataclass(frozen=True)
class Verdict:
    """How a run lies to a band.

    Attributes:
        reference: its name; None: there is none for the run.
        judged: stretches that the run has been through.
        above: of those, how many are worse than the band.
        below: how many are better than it.
        differences: of the settings, where the reference was named by the user, or to the nearest where there is none.
        nearest: where there is none for the run, the one that differs in the fewest keys; None: that cannot be told.
    """

    reference: str | None
    judged: int = 0
    above: int = 0
    below: int = 0
    differences: Sequence[str] = ()
    nearest: str | None = None

    @property
    def outside(self) -> bool:
        """Whether more than a tenth of the stretches lie outside."""
        return self.above + self.below > TOLERATED * self.judged

    def __str__(self) -> str:
        listed = "; ".join(self.differences)
        if self.reference is None:
            what = f"{self.nearest} is the nearest, and its setting differs: {listed}" if self.nearest else listed
            return f"no reference curve for its setting; {what}"
        differs = f" (its setting differs: {listed})" if listed else ""
        if not self.judged:
            return f"{self.reference}: too early to tell{differs}"
        where = f"{self.above} above and {self.below} below, of {self.judged} stretches"
        return f"{'OUTSIDE' if self.outside else 'inside'} the band of {self.reference}: {where}{differs}"


def judge(record: Record, reference: Reference) -> Verdict:
    """Compare a run with a band."""
    loss = np.array([np.nan if line.get("loss") is None else line["loss"] for line in record.log.lines], np.float64)
    means = stretch_means(record.images(record.log.lines), loss, reference.images)
    known = ~np.isnan(means)
    above, below = means[known] > reference.high[known], means[known] < reference.low[known]
    differences = reference.differences(record)
    return Verdict(reference.name, int(known.sum()), int(above.sum()), int(below.sum()), differences)


def unjudged(record: Record, references: Sequence[Reference]) -> Verdict:
    """The verdict on a run that none of these fits."""
    differences, name = min(((one.differences(record), one.name) for one in references), key=lambda found: len(found[0]))
    return Verdict(None, differences=differences, nearest=name if record.config else None)


def read_reference(path: Path) -> Reference:
    """Read a file.

    Raises:
        ReferenceError: unreadable or not a reference curve.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ReferenceError(f"{path}: format {content['format']} of a reference curve is not known; {FORMAT} is")
        images, low, high = (np.array(content[key], np.float64) for key in ("images", "low", "high"))
        name, setting = content["name"], content["setting"]
    except OSError as error:
        raise ReferenceError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ReferenceError(
            f"{path}: not a reference curve ({type(error).__name__}: {error}); see docs/guides/reports.md"
        ) from None
    if not (isinstance(name, str) and name and isinstance(setting, dict)):
        raise ReferenceError(f"{path}: name must be a text, and setting an object of section.key and value")
    finite = all(np.isfinite(part).all() for part in (images, low, high))
    if not (images.ndim == 1 and len(images) and images.shape == low.shape == high.shape and finite):
        raise ReferenceError(f"{path}: images, low and high must be equally long lists of numbers")
    if (np.diff(images, prepend=0.0) <= 0).any() or (low > high).any():
        raise ReferenceError(f"{path}: images must rise, and low lie under high")
    data = setting.get("data", ["any"])
    if not (isinstance(data, list) and data and all(isinstance(name, str) for name in data)):
        raise ReferenceError(f"{path}: setting.data must be a list of names and digests of the same images")
    if strange := [key for key in setting if key != "data" and not _is_known(key)]:
        raise ReferenceError(f"{path}: setting.{strange[0]} is no section.key of a config (scale-mae schema lists them)")
    return Reference(name, setting, images, low, high)


def _is_known(key: str) -> bool:
    section, _, name = key.partition(".")
    kind = Config.model_fields[section].annotation if section in Config.model_fields else None
    return key == "model.patch_size" or name in getattr(kind, "model_fields", {})


def shipped() -> list[Reference]:
    """The reference curves that come with scale_mae."""
    folder = Path(str(files("scale_mae.reference_curves")))
    return [read_reference(path) for path in sorted(folder.glob("*.json"))]


def named(path: Path) -> list[Reference]:
    """Those of a file or a folder.

    Raises:
        ReferenceError: nothing there, or a file that is none.
    """
    if not path.is_dir():
        return [read_reference(path)]
    found = [read_reference(file) for file in sorted(path.glob("*.json"))]
    if not found:
        raise ReferenceError(f"{path}: holds no .json file with a reference curve")
    return found

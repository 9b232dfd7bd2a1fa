"""Result files (protocol, weights, data, scores and versions of a measurement), and tables of many results."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scale_mae.config import UserError
from scale_mae.evaluation.models import EvaluatedModel
from scale_mae.evaluation.tables import Table

FORMAT = "scale_mae.result.1"
PACKAGES = ("scale-mae", "torch", "timm", "pillow", "numpy")


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        protocol: ``name`` and ``set`` name the measurement and the data set; the rest are all settings that can change scores.
        model: Path, kind, architecture, SHA-256 and seed of the weights, and a digest of their training settings.
        data: The sources or the root, the number of images, and a digest of their bytes and labels.
        scores: Shares in [0, 1] or losses in nats, by name.
        parts: The scores of each part, if a data set has several.
        environment: Versions, processes, duration in seconds and time of the measurement.
    """

    protocol: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    scores: dict[str, float]
    parts: dict[str, dict[str, float]]
    environment: dict[str, Any]

    def write(self, path: str | Path) -> None:
        """Write the file atomically.

        Raises:
            UserError: The file cannot be written.
        """
        path = Path(path)
        staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staging.write_text(json.dumps({"format": FORMAT, **vars(self)}, indent=2) + "\n", "utf-8")
            staging.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """Read a file.

        Raises:
            UserError: The file is missing, or not a result file.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise UserError(
                    f"{path}: not a result file of scale-mae; scale-mae evaluate, knn and logistic write such files with --out"
                )
            return cls(**content)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged result file ({error})") from None


def model_metadata(evaluated: EvaluatedModel, seed: int | None) -> dict[str, Any]:
    """Return the description of the weights in a result file. ``seed`` replaces the seed that the weights record."""
    return {
        "path": evaluated.path,
        "kind": evaluated.kind,
        "architecture": evaluated.architecture,
        "classes": evaluated.classes,
        "sha256": evaluated.digest,
        "seed": seed if seed is not None else evaluated.seed,
        "training": evaluated.training,
    }


def measurement_metadata(processes: int, device: str, seconds: float) -> dict[str, Any]:
    """Return versions, processes, device and duration of a measurement."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"versions": versions, "processes": processes, "device": device, "seconds": round(seconds, 3), "time": when}


def content_digest(contents: Sequence[int]) -> str:
    """Return a hexadecimal digest of several parts from their :attr:`scale_mae.evaluation.accuracy.Score.content`."""
    return hashlib.sha256(",".join(map(str, contents)).encode()).hexdigest()[:32]


def find_results(places: Sequence[str]) -> list[Result]:
    """Read result files, and all ``*.json`` files of folders.

    Raises:
        UserError: A folder has no result files, or a file is not a result file.
    """
    files = []
    for place in places:
        found = sorted(glob.glob(os.path.join(glob.escape(place), "*.json"))) if os.path.isdir(place) else [place]
        if not found:
            raise UserError(
                f"{place}: contains no result files (*.json); scale-mae evaluate, knn and logistic write them with --out"
            )
        files += found
    return [Result.read(file) for file in files]


def tabulate(results: Sequence[Result]) -> Table:
    """Build a table with one row for each protocol, data, architecture, kind and training of the weights.

    Several seeds of one training become mean ± sample standard deviation (n - 1). Weights with unknown or equal seeds stay in
    separate rows. If the same weights were measured twice, the later result counts.
    """
    alike: dict[str, dict[str, Result]] = {}
    for result in sorted(results, key=lambda r: str(r.environment.get("time"))):
        model = result.model
        what = [result.protocol, result.data.get("digest"), *(model.get(key) for key in ("architecture", "kind", "training"))]
        weights = model.get("sha256") or model.get("path")
        alike.setdefault(json.dumps(what, sort_keys=True), {})[str(weights)] = result
    groups = [group for found in alike.values() for group in _of_seeds(list(found.values()))]
    names = list(dict.fromkeys(name for group in groups for result in group for name in result.scores))
    header = ["protocol", "set", "model", "images", "seeds", *names]
    rows = []
    for group in sorted(groups, key=lambda g: (g[0].protocol["name"], str(g[0].protocol.get("set")), _label(g))):
        first = group[0]
        scores = [_spread(name, [r.scores[name] for r in group if name in r.scores]) for name in names]
        seeds = ", ".join("?" if r.model.get("seed") is None else str(r.model["seed"]) for r in group)
        images = str(first.data.get("images", ""))
        rows.append([first.protocol["name"], str(first.protocol.get("set", "")), _label(group), images, seeds, *scores])
    return Table(header, rows, "mean ± standard deviation over seeds" if any(len(group) > 1 for group in groups) else "")


def _of_seeds(results: list[Result]) -> list[list[Result]]:
    """Return one group if all seeds are known and distinct, else one group per result."""
    seeds = {result.model.get("seed") for result in results}
    return [results] if len(seeds) == len(results) and None not in seeds else [[result] for result in results]


def score_text(name: str, value: float) -> str:
    """Format a share in percent without the sign, or a loss in nats."""
    return f"{value:.4f}" if "loss" in name else f"{100 * value:.2f}"


def _label(group: Sequence[Result]) -> str:
    model = group[0].model
    return str(model.get("architecture", "")) + ("" if len(group) > 1 else f" ({model.get('path', '')})")


def _spread(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = score_text(name, fmean(values))
    return f"{mean} ± {score_text(name, stdev(values))}" if len(values) > 1 else mean

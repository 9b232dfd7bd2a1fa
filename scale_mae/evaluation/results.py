"""Result files: what was measured, how, of which weights, on which images, with which versions; and tables of many of them."""

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
from scale_mae.evaluation.classifier import Subject
from scale_mae.evaluation.tables import Table

FORMAT = "scale_mae.result.1"
PACKAGES = ("scale-mae", "torch", "timm", "pillow", "numpy")


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        protocol: its name under ``name``, its set under ``set``, and every setting that may change the scores.
        model: path, kind, architecture, SHA-256 and seed of the weights, and what they were trained as, whatever the seed.
        data: sources or root, number of images, and a digest of their bytes and labels.
        scores: shares in [0, 1], or losses in nats, by name.
        parts: the same of each part, where a set has several.
        made: versions, processes, seconds and time; they are not part of what was measured.
    """

    protocol: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    scores: dict[str, float]
    parts: dict[str, dict[str, float]]
    made: dict[str, Any]

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            UserError: it cannot be written.
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
            UserError: missing, or not a result file.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise UserError(f"{path}: not a result file of scale-mae")
            return cls(**content)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged result file ({error})") from None


def model_facts(subject: Subject, seed: int | None) -> dict[str, Any]:
    """What a result file says of the weights; ``seed`` is that of their training, if they do not say it themselves."""
    return {
        "path": subject.path,
        "kind": subject.kind,
        "architecture": subject.architecture,
        "classes": subject.classes,
        "sha256": subject.digest,
        "seed": seed if seed is not None else subject.seed,
        "training": subject.training,
    }


def made_by(processes: int, device: str, seconds: float) -> dict[str, Any]:
    """Versions and circumstances of a measurement that took ``seconds``."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"versions": versions, "processes": processes, "device": device, "seconds": round(seconds, 3), "time": when}


def content_digest(contents: Sequence[int]) -> str:
    """Hexadecimal digest of the images of several parts, from :attr:`scale_mae.evaluation.accuracy.Score.content` of each."""
    return hashlib.sha256(",".join(map(str, contents)).encode()).hexdigest()[:32]


def find_results(places: Sequence[str]) -> list[Result]:
    """The results in files and folders; a folder's are its ``*.json``.

    Raises:
        UserError: none there, or a file that is none.
    """
    files = []
    for place in places:
        found = sorted(glob.glob(os.path.join(glob.escape(place), "*.json"))) if os.path.isdir(place) else [place]
        if not found:
            raise UserError(f"{place}: holds no result files (*.json); evaluate, knn and logistic write them with --out")
        files += found
    return [Result.read(file) for file in files]


def tabulate(results: Sequence[Result]) -> Table:
    """One row for each protocol, set of images, architecture, kind and training of the weights.

    Several seeds of one training give mean ± standard deviation (of a sample, n - 1); weights whose seeds are not known, or are
    the same, stay apart. Of the same weights measured twice the later counts.
    """
    alike: dict[str, dict[str, Result]] = {}
    for result in sorted(results, key=lambda r: str(r.made.get("time"))):
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
    """All together where each has a seed of its own, else each alone."""
    seeds = {result.model.get("seed") for result in results}
    return [results] if len(seeds) == len(results) and None not in seeds else [[result] for result in results]


def score_text(name: str, value: float) -> str:
    """A share in per cent, without its sign; a loss in nats."""
    return f"{value:.4f}" if "loss" in name else f"{100 * value:.2f}"


def _label(group: Sequence[Result]) -> str:
    model = group[0].model
    return str(model.get("architecture", "")) + ("" if len(group) > 1 else f" ({model.get('path', '')})")


def _spread(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = score_text(name, fmean(values))
    return f"{mean} ± {score_text(name, stdev(values))}" if len(values) > 1 else mean

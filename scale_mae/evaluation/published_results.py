"""Compares measured scores with published ones, if the two are comparable."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from scale_mae.evaluation.tables import Table


@functools.cache
def _published() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published_results.yaml").read_text())
    return content


def published_column(architecture: str) -> int | None:
    """Return the column of the published model with this architecture (``ViT-base/16, 224 px``), or ``None``."""
    models: list[str] = _published()["models"]
    name = architecture.replace(",", "")
    return models.index(name) if name in models else None


def differences(
    architecture: str, whole: bool, images: int, reference_crop_pct: bool, classes: tuple[int, int] | None
) -> list[str]:
    """Return the reasons why a result is not comparable with the published ones. An empty list means that it is comparable.

    Args:
        architecture: The architecture of the model, with its image size.
        whole: Whether the number of scored images is that of the published data set.
        images: The number of scored images.
        reference_crop_pct: Whether the images were cropped as the reference does.
        classes: The number of classes of (the model, the published models), or ``None`` if they are unknown.
    """
    found = []
    if published_column(architecture) is None:
        found.append(f"no published model is a {architecture}")
    if not whole:
        found.append(f"{images} images are not the published set")
    if not reference_crop_pct:
        found.append("the crop differs from the reference's")
    if classes and classes[0] != classes[1]:
        found.append(f"the model has {classes[0]} classes, not {classes[1]}")
    return found


def comparison_table(name: str, architecture: str, scores: dict[str, float], unlike: list[str]) -> Table | None:
    """Return a table of measured and published scores in percent, or ``None`` if nothing is published for the data set.

    Args:
        name: The name of the data set.
        architecture: The architecture of the model.
        scores: The measured scores, shares in [0, 1].
        issues: The reasons from :func:`differences`. If it is empty, the measured scores are in the column of their model.
    """
    rows = _published()["sets"].get(name)
    if rows is None:
        return None
    models: list[str] = _published()["models"]
    at = published_column(architecture) if not unlike else None
    header = ["", "score", *models, *([] if at is not None else ["this model"]), "source"]
    body = []
    for score in dict.fromkeys(row["score"] for row in rows):
        if score in scores:
            ours = [""] * len(models) + ([] if at is not None else [""])
            ours[at if at is not None else -1] = f"{scores[score]:.2%}".rstrip("%")
            body.append(["ours", score, *ours, "measured here"])
        for row in (row for row in rows if row["score"] == score):
            values = ["" if value is None else f"{value:g}" for value in row["values"]]
            body.append([row["row"], score, *values, *([] if at is not None else [""]), row["source"]])
    note = "" if not unlike else f"not comparable: {'; '.join(unlike)}"
    return Table(header, body, note)

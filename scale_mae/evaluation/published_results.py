"""Published figures beside ours, and whether the two may be compared."""

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


def column_of(architecture: str) -> int | None:
    """Which published model has this architecture (``ViT-base/16, 224 px``); None: none has."""
    models: list[str] = _published()["models"]
    name = architecture.replace(",", "")
    return models.index(name) if name in models else None


def differences(
    architecture: str, whole: bool, images: int, reference_crop_pct: bool, classes: tuple[int, int] | None
) -> list[str]:
    """Why a result may not be compared with the published ones, one phrase each; none if it may.

    Args:
        architecture: of the model, with the size of its images.
        whole: whether as many images were scored as the published set has.
        images: how many were scored.
        reference_crop: whether images were cropped as the reference does.
        classes: (of the model, of the published ones); None: not known.
    """
    found = []
    if column_of(architecture) is None:
        found.append(f"{architecture} is none of the published models")
    if not whole:
        found.append(f"{images} images are not the published set")
    if not reference_crop_pct:
        found.append("another crop than the reference's")
    if classes and classes[0] != classes[1]:
        found.append(f"the model tells {classes[0]} classes apart, not {classes[1]}")
    return found


def beside(name: str, architecture: str, scores: dict[str, float], unlike: list[str]) -> Table | None:
    """Ours and the published figures of a set, in percent; None where nothing is published.

    Args:
        name: of the set.
        architecture: of the model.
        scores: ours, shares in [0, 1].
        unlike: from :func:`differences`; if empty, ours stands in the column of its model.
    """
    rows = _published()["sets"].get(name)
    if rows is None:
        return None
    models: list[str] = _published()["models"]
    at = column_of(architecture) if not unlike else None
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

"""Compares a data set with its published version: missing, empty and extra classes, and parts that differ from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from scale_mae.evaluation.datasets import DatasetPart, EvaluationDataset


def find_deviations(parts: Sequence[DatasetPart], chosen: EvaluationDataset) -> list[str]:
    """Describe how a data set deviates: one phrase for its classes, one for the first part that differs from the others.

    Args:
        parts: All parts, from :func:`scale_mae.evaluation.datasets.list_parts`.
        chosen: The data set.
    """
    classes = {name for part in parts for name in part.index.classes}
    empty = {name for part in parts for name in part.empty}
    published = set(chosen.published(classes | empty)) or classes | empty
    found = []
    if phrases := _compared(classes, empty, published):
        found.append(f"{len(classes & published)} of {len(published)} classes: {', '.join(phrases)}")
    odd = [f"{part.name}: {text}" for part, text in zip(parts, _differences_between_parts(parts), strict=True) if text]
    if odd:
        found.append(odd[0] + (f" (the first of {len(odd)} such parts)" if len(odd) > 1 else ""))
    return found


def _differences_between_parts(parts: Sequence[DatasetPart]) -> list[str]:
    """Describe for each part how it differs from most others. An empty text means that it does not differ."""
    numbers = Counter(len(part.index) for part in parts)
    usual = max(numbers, key=lambda number: (numbers[number], number))
    having = Counter(name for part in parts for name in part.index.classes)
    classes = {name for name, count in having.items() if 2 * count >= len(parts)}
    texts = []
    for part in parts:
        images = len(part.index)
        phrases = [f"{images} images, others {usual}"] if images != usual else []
        texts.append("; ".join(phrases + _compared(set(part.index.classes), set(part.empty), classes)))
    return texts


def _compared(classes: set[str], empty: set[str], expected: set[str]) -> list[str]:
    """Describe which classes are missing, empty (a folder without images) or extra."""
    lacking = expected - classes
    kinds = {"missing": lacking - empty, "empty": lacking & empty, "extra": classes - expected}
    return [f"{min(names)}{f' and {len(names) - 1} more' * (len(names) > 1)} {kind}" for kind, names in kinds.items() if names]

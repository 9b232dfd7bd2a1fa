"""What a set lacks of the published one or has besides it, and which of its parts is unlike the others, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from scale_mae.evaluation.datasets import EvaluationSet, Part


def deviations(parts: Sequence[Part], chosen: EvaluationSet) -> list[str]:
    """One phrase for the classes of the set and one for the first part that is unlike the others, as far as they deviate.

    Args:
        parts: all of them, from :func:`scale_mae.evaluation.datasets.parts_of`.
        chosen: which set they are of.
    """
    classes = {name for part in parts for name in part.index.classes}
    empty = {name for part in parts for name in part.empty}
    published = set(chosen.published(classes | empty)) or classes | empty
    found = []
    if phrases := _compared(classes, empty, published):
        found.append(f"{len(classes & published)} of {len(published)} classes: {', '.join(phrases)}")
    odd = [f"{part.name}: {text}" for part, text in zip(parts, _unlike_others(parts), strict=True) if text]
    if odd:
        found.append(odd[0] + (f" (the first of {len(odd)} such parts)" if len(odd) > 1 else ""))
    return found


def _unlike_others(parts: Sequence[Part]) -> list[str]:
    """What is unlike most others, of each part; empty: nothing."""
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
    """Which classes are missing, have a folder without images, or are not expected."""
    lacking = expected - classes
    kinds = {"missing": lacking - empty, "empty": lacking & empty, "extra": classes - expected}
    return [f"{min(names)}{f' and {len(names) - 1} more' * (len(names) > 1)} {kind}" for kind, names in kinds.items() if names]

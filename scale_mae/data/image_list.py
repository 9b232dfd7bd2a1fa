"""The list of the images of a source, before any image is opened."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NO_LABEL = -1


class ImageList:
    """Images found in a source. The columns are arrays because there may be tens of millions of images.

    Attributes:
        root: Absolute folder to which the shard paths are relative.
        shards: Relative paths. An image file outside a tar shard is its own shard.
        shard: Number of the shard of each image.
        offset: First byte of each image in its shard.
        length: Number of bytes of each image; 0 means the whole file.
        label: Class number of each image, or :data:`NO_LABEL`.
        classes: Class names in the order of the class numbers; possibly empty.
        problems: One line for each problem that was found.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.abspath(root)
        self.shards: list[str] = []
        self.shard, self.offset, self.length, self.label = array("I"), array("Q"), array("I"), array("i")
        self.classes: list[str] = []
        self.problems: list[str] = []

    def __len__(self) -> int:
        return len(self.shard)

    def add_shard(self, path: str) -> int:
        """Add a shard and return its number. ``path`` is absolute or relative to the root."""
        self.shards.append(os.path.relpath(path, self.root) if os.path.isabs(path) else path)
        return len(self.shards) - 1

    def add_image(self, shard: int, offset: int, length: int, label: int) -> None:
        """Add one image."""
        self.shard.append(shard)
        self.offset.append(offset)
        self.length.append(length)
        self.label.append(label)


def provisional_label(name: str | None, numbers: dict[str, int]) -> int:
    """Return the number of a label by first appearance in ``numbers``, which grows.

    :func:`assign_class_numbers` replaces these numbers at the end, because the final order depends on all labels.
    """
    return NO_LABEL if name is None or name in {"", "-1"} else numbers.setdefault(name, len(numbers))


def assign_class_numbers(
    images: ImageList, names: Sequence[str], classes: Sequence[str], *, keep_integers: bool = True
) -> None:
    """Replace provisional labels by class numbers and set ``images.classes``.

    Args:
        images: The list to change. Its labels are provisional.
        names: The label of each provisional number.
        classes: The names of the classes in order, if known; otherwise the order is alphabetical.
        keep_integers: If all labels are integers, use them as class numbers.
    """
    words = [name for name in names if not re.fullmatch(r"\d{1,9}", name)]
    if keep_integers and 0 < len(words) < len(names):
        images.problems.append(
            f"{images.root}: labels that are not numbers: {len(words)} of {len(names)}, such as {words[0]}. All labels are "
            "used as class names."
        )
    if keep_integers and not words:
        known = {name: int(name) for name in names if not classes or int(name) < len(classes)}
    else:
        classes = classes or sorted(names)
        known = {name: number for number, name in enumerate(classes)}
    images.classes = list(classes)
    images.label = renumber(images.label, [known.get(name, NO_LABEL) for name in names])
    if unknown := [name for name in names if name not in known]:
        images.problems.append(
            f"{images.root}: labels without a class: {len(unknown)} of {len(names)}, such as {unknown[0]}. Their images "
            "have no label."
        )


def renumber(labels: array[int], numbers: Sequence[int]) -> array[int]:
    """Replace each label ``i`` by ``numbers[i]``. :data:`NO_LABEL` stays."""
    table = np.array([*numbers, NO_LABEL], np.int32)  # NO_LABEL is -1, which selects the last entry
    return array("i", table[np.asarray(labels)].tobytes())

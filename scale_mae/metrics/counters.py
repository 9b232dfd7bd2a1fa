"""Counts that go on over restarts and never fall, so that rates taken from them stay right.

They are in ``counters.json``, written at each log step before anybody is told of them, and in every checkpoint. A run that
starts again takes the larger of both, count by count. Work that is done twice counts twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "counters.json"
BUCKET_BOUNDS = tuple(
    float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 2, 5)
)  # seconds; bounds of a histogram


class Counters:
    """Counts by name; those of a kind are named ``kind/which``.

    Attributes:
        values: the counts.
    """

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self.values: dict[str, float] = dict(values or {})
        self._seen: dict[str, float] = {}

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0)

    def add(self, name: str, amount: float = 1) -> None:
        """Count."""
        self.values[name] = self[name] + amount

    def follow_total(self, name: str, total: float) -> None:
        """Count what somebody else's ``total`` has grown by. The first one is where it began; one that falls begins anew."""
        if name not in self._seen:
            self.values[name] = max(self[name], total)
        else:
            self.add(name, max(0.0, total - self._seen[name]))
        self._seen[name] = total

    def observe(self, name: str, seconds: float) -> None:
        """Count a value of a histogram; see :meth:`histogram`."""
        edge = next((edge for edge in BUCKET_BOUNDS if seconds <= edge), math.inf)
        self.add(f"{name}/{edge:g}")
        self.add(f"{name}/sum", seconds)

    def histogram(self, name: str) -> tuple[list[tuple[str, float]], float]:
        """How many values were at most each bound, as Prometheus wants them, and the sum of all values."""
        buckets, total = [], 0.0
        for edge in (*BUCKET_BOUNDS, math.inf):
            total += self[f"{name}/{edge:g}"]
            buckets.append(("+Inf" if edge == math.inf else str(edge), total))
        return buckets, self[f"{name}/sum"]

    def by_label(self, kind: str) -> dict[str, float]:
        """Counts of a kind, by which."""
        return {name[len(kind) + 1 :]: value for name, value in self.values.items() if name.startswith(f"{kind}/")}

    def save(self, run_dir: Path) -> None:
        """Write ``counters.json``; a reader sees all of it or what was there before.

        Raises:
            OSError: the disk.
        """
        staging = run_dir / f".{FILE}.tmp"
        staging.write_text(json.dumps(self.values))
        os.replace(staging, run_dir / FILE)  # not flushed: a power cut takes us back to the checkpoint's


def restore_counters(run_dir: Path, saved: Mapping[str, Any] | None) -> Counters:
    """Counters of a run: the larger of ``counters.json`` and what its checkpoint holds, count by count.

    Args:
        run_dir: the run directory; a file that is missing or damaged does not matter.
        saved: from the checkpoint, None without one.
    """
    try:
        found = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        found = None
    values: dict[str, float] = {}
    for source in (saved, found):
        if isinstance(source, Mapping):
            for name, value in source.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    values[name] = max(values.get(name, 0), value)
    return Counters(values)

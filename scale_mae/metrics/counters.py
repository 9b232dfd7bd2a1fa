"""Cumulative counters that continue across restarts and never decrease, so that Prometheus computes correct rates.

The run writes ``counters.json`` at each log step, before it publishes the new values. Every checkpoint contains the counters as
well. A resumed run takes the larger of the two values of each counter. Repeated work counts again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "counters.json"
BUCKET_BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 2, 5))  # upper bounds in seconds


class Counters:
    """Counters by name. A name of the form ``kind/label`` is one counter of a labeled kind.

    Attributes:
        values: The value of each counter.
    """

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self.values: dict[str, float] = dict(values or {})
        self._last_totals: dict[str, float] = {}

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0)

    def add(self, name: str, amount: float = 1) -> None:
        """Increase a counter by ``amount``."""
        self.values[name] = self[name] + amount

    def follow_total(self, name: str, total: float) -> None:
        """Increase a counter by the growth of an external ``total`` since the last call.

        The first total of a process raises the counter to that total at least. A total that decreases adds nothing.
        """
        if name not in self._last_totals:
            self.values[name] = max(self[name], total)
        else:
            self.add(name, max(0.0, total - self._last_totals[name]))
        self._last_totals[name] = total

    def observe(self, name: str, seconds: float) -> None:
        """Add a value to a histogram; see :meth:`histogram`."""
        bound = next((bound for bound in BUCKET_BOUNDS if seconds <= bound), math.inf)
        self.add(f"{name}/{bound:g}")
        self.add(f"{name}/sum", seconds)

    def histogram(self, name: str) -> tuple[list[tuple[str, float]], float]:
        """Return the cumulative buckets of a histogram in the format of prometheus-client, and the sum of all values."""
        buckets, total = [], 0.0
        for bound in (*BUCKET_BOUNDS, math.inf):
            total += self[f"{name}/{bound:g}"]
            buckets.append(("+Inf" if bound == math.inf else str(bound), total))
        return buckets, self[f"{name}/sum"]

    def by_label(self, kind: str) -> dict[str, float]:
        """Return the counters of a kind by label."""
        return {name[len(kind) + 1 :]: value for name, value in self.values.items() if name.startswith(f"{kind}/")}

    def save(self, run_dir: Path) -> None:
        """Write ``counters.json`` atomically.

        Raises:
            OSError: The file cannot be written.
        """
        staging = run_dir / f".{FILE}.tmp"
        staging.write_text(json.dumps(self.values))
        os.replace(staging, run_dir / FILE)  # no fsync: after a power failure the counters of the checkpoint remain


def restore_counters(run_dir: Path, saved: Mapping[str, Any] | None) -> Counters:
    """Return the counters of a run: for each counter the larger value of ``counters.json`` and of the checkpoint.

    Args:
        run_dir: Run directory. A missing or damaged ``counters.json`` is ignored.
        saved: Counters of the checkpoint; ``None`` without a checkpoint.
    """
    try:
        from_file = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        from_file = None
    values: dict[str, float] = {}
    for source in (saved, from_file):
        if isinstance(source, Mapping):
            for name, value in source.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    values[name] = max(values.get(name, 0), value)
    return Counters(values)

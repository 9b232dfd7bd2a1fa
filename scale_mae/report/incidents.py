"""What happened to a run besides steps: starts, rollbacks, skips; and the time it held its processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scale_mae.report.charts import Mark
from scale_mae.report.record import Record

MARKS = 200  # drawn at most; the table has as many


def when(seconds: object) -> str:
    """A point in time for people, UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(float(seconds)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"


def _int(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0


def marks(record: Record) -> list[Mark]:
    """Restarts, rollbacks, skipped steps and stops in the order of their steps."""
    found = [_of_event(record, event, number) for number, event in enumerate(record.history)]
    listed = [mark for mark in found if mark] + list(_skips(record))
    return sorted(listed, key=lambda mark: mark.steps)


def _of_event(record: Record, event: dict[str, Any], number: int) -> Mark | None:
    kind, step, at = event["event"], _int(event.get("step")), when(event.get("time"))
    if kind == "start":
        if not event.get("restarts") and not any(earlier["event"] == "start" for earlier in record.history[:number]):
            return None  # the first start is no incident
        words = f"restart {event.get('restarts', '')} on {event.get('world_size', '?')} processes, {at}"
        return Mark("restart", record.images_at(step), step, words)
    if kind == "rollback":
        step = _int(event.get("detected"))
        skipped = event.get("skipped_steps") or ["?", "?"]
        words = (
            f"rollback {event.get('number', '')}: {event.get('reason', '')}; back from step {step} to {event.get('to', '?')}, "
            f"samples of steps {skipped[0]} to {skipped[-1]} left out, {at}"
        )
        return Mark("rollback", record.images_at(step), step, words)
    if kind == "stop":
        return Mark("stop", record.images_at(step), step, f"stop: {event.get('reason', '')}, {at}")
    if kind == "checkpoint" and event.get("error"):
        return Mark("lost checkpoint", record.images_at(step), step, f"checkpoint lost: {event['error']}, {at}")
    return None


def _skips(record: Record) -> Iterator[Mark]:
    counts, steps = record.log.column("skipped_steps"), record.log.column("step")
    before = 0.0
    for count, step in zip(np.nan_to_num(counts).tolist(), steps.tolist(), strict=True):
        if count > before:
            words = f"{count - before:.0f} steps skipped (gradients not finite) up to step {step:.0f}"
            yield Mark("skip", record.images_at(step), step, words)
        before = count  # falls when a new process counts anew
    for line in record.log.lines:
        if "loss" in line and line["loss"] is None:
            yield Mark("loss not finite", record.images_at(line["step"]), line["step"], "loss not finite")


def shown(found: Sequence[Mark]) -> tuple[list[Mark], str]:
    """At most :data:`MARKS` of them, rare kinds first, and a sentence on those left out."""
    by_kind: dict[str, list[Mark]] = {}
    for mark in found:
        by_kind.setdefault(mark.kind, []).append(mark)
    kept: list[Mark] = []
    for group in sorted(by_kind.values(), key=len):
        kept += group[: max(0, MARKS - len(kept))]
    left = len(found) - len(kept)
    return sorted(kept, key=lambda mark: mark.steps), f"{left} more are not shown." if left else ""


@dataclass(frozen=True)
class Stretch:
    """One life of the process group.

    Attributes:
        processes: of it.
        seconds: from its start to its last sign of life.
    """

    processes: int
    seconds: float


def stretches(record: Record) -> list[Stretch]:
    """The lives of a run; empty where its history does not tell of starts."""
    starts = [event for event in record.events("start") if isinstance(event.get("time"), (int, float))]
    signs = [line["time"] for line in record.log.lines + record.log.taken_back if isinstance(line.get("time"), (int, float))]
    signs += [e["time"] for e in record.history if e["event"] in ("stop", "checkpoint", "rollback") and "time" in e]
    found = []
    for number, start in enumerate(starts):
        end = starts[number + 1]["time"] if number + 1 < len(starts) else float("inf")
        last = max((sign for sign in signs if start["time"] <= sign < end), default=start["time"])
        found.append(Stretch(max(1, _int(start.get("world_size"))), last - start["time"]))
    return found


def logged_seconds(record: Record) -> float:
    """Time that the steps of the schedule took so far, for a run without a history of starts."""
    total, before = 0.0, 0
    for line in record.log.lines:
        total += (line["step"] - before) * (line.get("step_time_s") or 0)
        before = line["step"]
    return total

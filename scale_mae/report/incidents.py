"""What happened to a run besides steps: starts, rollbacks, skips; and the time it held its processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    if kind in ("rollback", "rollback_failed"):
        step, bad = _int(event.get("detected")), event.get("skipped_steps") or ["?", "?"]
        words = (
            f"rollback {event.get('number', '')}: {event.get('reason', '')}; back from step {step} to {event.get('to', '?')}, "
            f"samples of steps {bad[0]} to {bad[-1]} left out, {at}"
        )
        if kind == "rollback_failed":
            words = f"gave up: {event.get('reason', '')}; samples of steps {bad[0]} to {bad[-1]} led there, {at}"
        return Mark(kind.replace("_", " "), record.images_at(step), step, words)
    if kind == "stop":
        return Mark("stop", record.images_at(step), step, f"stop: {event.get('reason', '')}, {at}")
    if kind == "checkpoint" and event.get("error"):
        return Mark("lost checkpoint", record.images_at(step), step, f"checkpoint lost: {event['error']}, {at}")
    return None


def _skips(record: Record) -> Iterator[Mark]:
    events = record.events("steps_skipped")
    for event in events:
        total, at = event.get("total"), when(event.get("time"))
        for first, last in _unbroken(event.get("steps", [])):
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            words = f"{steps} skipped (gradients not finite){'' if total is None else f', {total} in all'}, {at}"
            yield Mark("skip", record.images_at(first), first, words)
    if not events:
        yield from _counted_skips(record)
    for line in record.log.lines:
        if "loss" in line and line["loss"] is None:
            yield Mark("loss not finite", record.images_at(line["step"]), line["step"], "loss not finite")


def _unbroken(steps: Sequence[float]) -> list[tuple[int, int]]:
    """The first and the last of each stretch of steps that follow each other."""
    found: list[tuple[int, int]] = []
    for step in sorted({int(step) for step in steps}):
        follows = bool(found) and step == found[-1][1] + 1
        found.append((found.pop()[0] if follows else step, step))
    return found


def _counted_skips(record: Record) -> Iterator[Mark]:
    """From the counter of the log, for a run whose history does not tell of skips; lines that were taken back count too."""
    before = 0
    for line in record.log.written:
        if (count := line.get("skipped_steps")) is None:
            continue
        if count > before:
            words = f"{count - before:.0f} steps skipped (gradients not finite) up to step {line['step']}"
            yield Mark("skip", record.images_at(line["step"]), line["step"], words)
        before = count  # falls in logs of runs in which a new process counted anew


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
    starts = [event for event in record.events("start") if "time" in event]
    signs = [line["time"] for line in record.log.written if line.get("time") is not None]
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

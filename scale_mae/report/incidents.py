"""Incidents of a run (restarts, rollbacks, skipped steps, stops), and the attempts into which restarts divide it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scale_mae.report.chart import EventMarker
from scale_mae.report.run_record import RunRecord

MAX_MARKERS = 200  # in a chart and in the table of incidents


def format_time(seconds: object) -> str:
    """Return a time (seconds since 1970) as text in UTC; a hyphen if it is not a valid time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(float(seconds)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"


def _int(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0


def find_incidents(record: RunRecord) -> list[EventMarker]:
    """Return the restarts, rollbacks, skipped steps, failed checkpoints and stops of a run, sorted by step."""
    from_history = [_from_event(record, event, index) for index, event in enumerate(record.history)]
    markers = [marker for marker in from_history if marker] + list(_skipped_steps(record))
    return sorted(markers, key=lambda marker: marker.steps)


def _from_event(record: RunRecord, event: dict[str, Any], index: int) -> EventMarker | None:
    kind, step, at = event["event"], _int(event.get("step")), format_time(event.get("time"))
    if kind == "start":
        if not event.get("restarts") and not any(earlier["event"] == "start" for earlier in record.history[:index]):
            return None  # the first start is not an incident
        text = f"restart {event.get('restarts', '')} on {event.get('world_size', '?')} processes, {at}"
        return EventMarker("restart", record.images_at(step), step, text)
    if kind in ("rollback", "rollback_failed"):
        step, reason = _int(event.get("detected")), event.get("reason", "")
        steps = event.get("skipped_steps") or ["?", "?"]
        text = (
            f"rollback {event.get('number', '')} because of: {reason}. Back from step {step} to {event.get('to', '?')}; "
            f"the images of steps {steps[0]} to {steps[-1]} are skipped, {at}"
        )
        if kind == "rollback_failed":
            text = f"rollback failed after: {reason}. The images of steps {steps[0]} to {steps[-1]} led to it, {at}"
        return EventMarker(kind.replace("_", " "), record.images_at(step), step, text)
    if kind == "stop":
        return EventMarker("stop", record.images_at(step), step, f"stop: {event.get('reason', '')}, {at}")
    if kind == "checkpoint" and event.get("error"):
        return EventMarker("failed checkpoint", record.images_at(step), step, f"checkpoint failed: {event['error']}, {at}")
    return None


def _skipped_steps(record: RunRecord) -> Iterator[EventMarker]:
    events = record.events("steps_skipped")
    for event in events:
        total, at = event.get("total"), format_time(event.get("time"))
        for first, last in _consecutive_ranges(event.get("steps", [])):
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            text = f"{steps} skipped (gradients not finite){'' if total is None else f', {total} in total'}, {at}"
            yield EventMarker("skipped step", record.images_at(first), first, text)
    if not events:
        yield from _skipped_steps_from_counter(record)
    for line in record.log.lines:
        if "loss" in line and line["loss"] is None:
            yield EventMarker("loss not finite", record.images_at(line["step"]), line["step"], "loss not finite")


def _consecutive_ranges(steps: Sequence[float]) -> list[tuple[int, int]]:
    """Return the first and the last step of each range of consecutive steps."""
    ranges: list[tuple[int, int]] = []
    for step in sorted({int(step) for step in steps}):
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], step)
        else:
            ranges.append((step, step))
    return ranges


def _skipped_steps_from_counter(record: RunRecord) -> Iterator[EventMarker]:
    """Find skipped steps by the counter in the log, for a run whose history does not list them."""
    previous = 0
    for line in record.log.all_lines:
        if (total := line.get("skipped_steps")) is None:
            continue
        if total > previous:
            count = total - previous
            steps = "1 step" if count == 1 else f"{count:.0f} steps"
            text = f"{steps} skipped (gradients not finite) up to step {line['step']}"
            yield EventMarker("skipped step", record.images_at(line["step"]), line["step"], text)
        previous = total  # may decrease when a new process starts to count again


def select_markers(markers: Sequence[EventMarker]) -> tuple[list[EventMarker], int]:
    """Return at most :data:`MAX_MARKERS` markers, with rare kinds first, and the number of omitted ones."""
    by_kind: dict[str, list[EventMarker]] = {}
    for marker in markers:
        by_kind.setdefault(marker.kind, []).append(marker)
    kept: list[EventMarker] = []
    for group in sorted(by_kind.values(), key=len):
        kept += group[: max(0, MAX_MARKERS - len(kept))]
    return sorted(kept, key=lambda marker: marker.steps), len(markers) - len(kept)


@dataclass(frozen=True)
class Attempt:
    """The time from a start of a run to its next stop, crash or restart.

    Attributes:
        world_size: Number of processes.
        seconds: Time from the start to the last recorded activity.
    """

    world_size: int
    seconds: float


def find_attempts(record: RunRecord) -> list[Attempt]:
    """Return the attempts of a run; empty if its history does not contain a start."""
    starts = [event for event in record.events("start") if "time" in event]
    activity = [line["time"] for line in record.log.all_lines if line.get("time") is not None]
    activity += [e["time"] for e in record.history if e["event"] in ("stop", "checkpoint", "rollback") and "time" in e]
    attempts = []
    for index, start in enumerate(starts):
        end = starts[index + 1]["time"] if index + 1 < len(starts) else float("inf")
        last = max((moment for moment in activity if start["time"] <= moment < end), default=start["time"])
        attempts.append(Attempt(max(1, _int(start.get("world_size"))), last - start["time"]))
    return attempts


def total_step_seconds(record: RunRecord) -> float:
    """Return the time of all completed steps, for a run whose history does not contain a start."""
    total, previous = 0.0, 0
    for line in record.log.lines:
        total += (line["step"] - previous) * (line.get("step_time_s") or 0)
        previous = line["step"]
    return total

"""The history of a run: what happened to it besides steps, a JSON object a line in ``history.jsonl``.

    {"time": 1790000000.0, "event": "start", "step": 0, ...}

Events are ``start`` (of a process group; also a resume), ``rollback``, ``rollback_failed`` (in place of one),
``steps_skipped``, ``stop``, ``checkpoint``, ``evaluation``, ``evaluation_failed`` and ``export``; each has further keys.
A line is on the disk before its event takes effect, so that a run resumed from an older checkpoint does the same again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "history.jsonl"


def append(run_dir: Path, event: str, **facts: Any) -> None:
    """Write an event and bring it to the disk.

    Raises:
        OSError: the disk.
    """
    with open(run_dir / FILE, "a+b", buffering=0) as file:
        torn = file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        line = json.dumps({"time": time.time(), "event": event, **facts})
        file.write(b"\n" * bool(torn) + line.encode() + b"\n")
        os.fsync(file.fileno())


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All events in order; a line that a crash cut short is left out."""
    try:
        lines = (run_dir / FILE).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events

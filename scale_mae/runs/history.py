"""The history of a run: its events, one JSON object per line in ``history.jsonl``.

    {"time": 1790000000.0, "event": "start", "step": 0, ...}

:data:`EVENTS` lists the events and their fields. An event that changes what a run does, such as a rollback, is on the disk
before it takes effect. A run that resumes from an older checkpoint then does the same again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "history.jsonl"
# event -> (meaning, {field: meaning}); the reference page of the documentation is generated from this
EVENTS = {
    "start": (
        "The processes of a run start. The run is new or resumes.",
        {
            "step": "Steps done at this point; 0 for a new run.",
            "restarts": "Starts of the run after the first one.",
            "world_size": "Number of processes.",
            "zero_stage": "ZeRO stage.",
            "device": "Name of rank 0's GPU, or `cpu`.",
            "host": "Host of rank 0.",
            "job_id": "Slurm job, or `null`.",
            "versions": "Versions of Python and of the packages that matter.",
            "command": "Command line of rank 0.",
        },
    ),
    "checkpoint": (
        "A save ends. It has either `error` or the other fields.",
        {
            "step": "Step of the checkpoint.",
            "seconds": "Seconds from the start of the save to its commit.",
            "blocked_seconds": "Seconds for which training was blocked.",
            "bytes": "Size in bytes.",
            "error": "Why the checkpoint could not be written. Training continues.",
        },
    ),
    "steps_skipped": ("Steps changed no weight because their gradients were not finite.", {"steps": "The steps."}),
    "rollback": (
        "The run returns to a checkpoint and skips the images that led to the anomaly.",
        {
            "number": "Number of this rollback, from 1.",
            "to": "Step of the checkpoint.",
            "reason": "The anomaly.",
            "detected": "Step at which the anomaly was detected.",
            "skipped_steps": "First and last step whose images are skipped.",
            "positions": "First skipped position of the sample plan, and one past the last.",
            "samples": "Files of the first 20 skipped images.",
        },
    ),
    "rollback_failed": (
        "The run must return to a checkpoint but cannot. It ends with an error.",
        {
            "reason": "The anomaly.",
            "detected": "Step at which the anomaly was detected.",
            "skipped_steps": "First and last step that lead to the anomaly.",
            "positions": "First position of these steps, and one past the last.",
            "samples": "Files of the first 20 images of these steps.",
        },
    ),
    "evaluation": (
        "A classifier is evaluated on `classify.val_source`.",
        {
            "step": "Step of the evaluation.",
            "val_images": "Number of images.",
            "val_top1": "Top-1 accuracy in [0, 1].",
            "val_top5": "Top-5 accuracy in [0, 1].",
            "val_loss": "Cross entropy in nats.",
            "val_ema_top1": "Top-1 accuracy of the EMA weights, with `optim.ema_decay` only.",
            "val_ema_top5": "Top-5 accuracy of the EMA weights.",
            "val_ema_loss": "Cross entropy of the EMA weights in nats.",
        },
    ),
    "evaluation_failed": (
        "An evaluation fails. Training continues.",
        {"step": "Step of the evaluation.", "error": "Why it failed."},
    ),
    "export": (
        "`scale-mae convert` writes a checkpoint of this run.",
        {"format": "The format (`--to`).", "path": "The file or folder.", "step": "Step of the checkpoint."},
    ),
    "stop": ("The processes of a run end in order.", {"step": "Steps done.", "reason": "Why they end."}),
}


def append(run_dir: Path, event: str, **fields: Any) -> None:
    """Write an event, and flush it to the disk.

    Raises:
        OSError: The file cannot be written.
    """
    with open(run_dir / FILE, "a+b", buffering=0) as file:
        is_truncated = file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        line = json.dumps({"time": time.time(), "event": event, **fields})
        file.write(b"\n" * bool(is_truncated) + line.encode() + b"\n")
        os.fsync(file.fileno())


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return all events in order. Lines that a crash truncated are skipped."""
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

"""The ID of a run, which names it in Prometheus and in experiment trackers."""

from __future__ import annotations

import json
import re
import secrets
from contextlib import suppress
from pathlib import Path

FILE = "run.id"


def get_run_id(run_dir: Path) -> str:
    """Return the ID of a run. The first call creates it; it stays the same as long as the run directory exists.

    The file ``run.id`` stores the ID with the path and the inode of the run directory. A directory for which neither matches is
    a copy, and a copy is a new run. Device numbers are not compared, because those of network file systems differ between
    machines.
    """
    path, location = run_dir / FILE, _location(run_dir)
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_text())
        matches = [stored[key] == value for key, value in location.items()]
        if any(matches):
            if not all(matches):  # renamed, or restored from a backup: store the new location, so that a later copy is detected
                _write(path, str(stored["id"]), location)
            return str(stored["id"])
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_dir.resolve().name).strip("-.")[:40] or "run"
    run_id = f"{name}-{secrets.token_hex(4)}"
    _write(path, run_id, location)
    return run_id


def _location(run_dir: Path) -> dict[str, str | int]:
    return {"path": str(run_dir.resolve()), "inode": run_dir.stat().st_ino}


def _write(path: Path, run_id: str, location: dict[str, str | int]) -> None:
    staging = path.with_name(f".{FILE}.tmp")
    with suppress(OSError):  # for example a full disk; without a file the next start creates a new ID
        staging.write_text(json.dumps({"id": run_id, **location}) + "\n")
        staging.replace(path)

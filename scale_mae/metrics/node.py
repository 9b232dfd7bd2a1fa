"""Which processes share a machine, what hardware they have, and by what name a run goes in the systems that watch it."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from scale_mae.distributed.launcher import get_node_rank
from scale_mae.distributed.process_group import World
from scale_mae.metrics.calculator import Metrics
from scale_mae.metrics.hardware import Nvml

IDENTITY = "run.id"


@dataclass
class Node:
    """The machine that this process runs on, among those of the run.

    Attributes:
        number: 0 to ``count - 1``.
        count: machines.
        places: of each process, in rank order: its node, and NVML's number of its GPU; None without one.
        memory: the most that a process of this node has, as of the last log step.
    """

    number: int
    count: int
    placements: list[tuple[int, int | None]]
    memory: Metrics = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        """Processes of this node."""
        return [rank for rank, (node, _) in enumerate(self.placements) if node == self.number]

    @property
    def gpus(self) -> list[int]:
        """NVML's numbers of the GPUs that these use."""
        return sorted({gpu for node, gpu in self.placements if node == self.number and gpu is not None})


def detect_node(world: World, nvml: Nvml) -> Node:
    """This process's machine. All processes call it."""
    found = world.all_gather((get_node_rank(), nvml.gpu_index(world.device)))
    numbers = sorted({number for number, _ in found})
    placements = [(numbers.index(number), gpu) for number, gpu in found]
    return Node(placements[world.rank][0], len(numbers), placements)


def node_address() -> str:
    """A name or number by which other machines reach this one."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    with suppress(OSError):
        socket.getaddrinfo(name, None)
        return name
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "192.0.2.1"), 9))  # sends nothing; chooses the interface
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def run_id(run_dir: Path) -> str:
    """The name of a run, the same for as long as its directory lives; made at the first call.

    A copy of the directory has another path and another inode than the ones that were written down at the last start, and is
    another run. Numbers of devices tell nothing: those of network file systems differ between machines.
    """
    path, place = run_dir / IDENTITY, _place(run_dir)
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(path.read_text())
        same = [known[key] == value for key, value in place.items()]
        if any(same):
            if not all(same):  # renamed, or restored from a backup: what is at the old place from now on is a copy
                _write_identity(path, str(known["id"]), place)
            return str(known["id"])
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_dir.resolve().name).strip("-.")[:40] or "run"
    found = f"{name}-{secrets.token_hex(4)}"
    _write_identity(path, found, place)
    return found


def _place(run_dir: Path) -> dict[str, str | int]:
    return {"path": str(run_dir.resolve()), "inode": run_dir.stat().st_ino}


def _write_identity(path: Path, name: str, place: dict[str, str | int]) -> None:
    staging = path.with_name(f".{IDENTITY}.tmp")
    with suppress(OSError):  # a full disk; the next start tries again, with another name if there was none
        staging.write_text(json.dumps({"id": name, **place}) + "\n")
        staging.replace(path)

"""The nodes of a run: which ranks and GPUs each node has, and the address of this node."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass

from scale_mae.distributed.launcher import get_node_rank
from scale_mae.distributed.process_group import World
from scale_mae.metrics.memory import MemoryUsage
from scale_mae.metrics.nvml import Nvml


@dataclass
class Node:
    """The node of this process.

    Attributes:
        number: Number of this node, from 0 to ``count - 1``.
        count: Number of nodes of the run.
        placements: For each rank the number of its node, and NVML's index of its GPU (``None`` without a GPU).
        memory: Largest memory of a process of this node at the last log step; ``None`` before the first log step.
    """

    number: int
    count: int
    placements: list[tuple[int, int | None]]
    memory: MemoryUsage | None = None

    @property
    def ranks(self) -> list[int]:
        """The ranks on this node."""
        return [rank for rank, (node, _) in enumerate(self.placements) if node == self.number]

    @property
    def gpus(self) -> list[int]:
        """NVML's indices of the GPUs that the ranks on this node use."""
        return sorted({gpu for node, gpu in self.placements if node == self.number and gpu is not None})


def detect_node(world: World, nvml: Nvml) -> Node:
    """Return the node of this process. All processes must call this function."""
    gather_features = world.all_gather((get_node_rank(), nvml.gpu_index(world.device)))
    node_ranks = sorted({node_rank for node_rank, _ in gather_features})
    placements = [(node_ranks.index(node_rank), gpu) for node_rank, gpu in gather_features]
    return Node(placements[world.rank][0], len(node_ranks), placements)


def node_address() -> str:
    """Return a host name or IP address at which other machines reach this node."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    with suppress(OSError):
        socket.getaddrinfo(name, None)
        return name
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "192.0.2.1"), 9))  # selects the interface; sends nothing
        return str(probe.getsockname()[0])
    return "127.0.0.1"

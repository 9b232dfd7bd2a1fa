"""Votes: the processes agree on whether to continue, without waiting for the accelerator."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from scale_mae.distributed.process_group import World


class Vote(IntEnum):
    """What a process has to say before a forward pass; the largest vote counts."""

    CONTINUE = 0
    STOP = 1
    FAILED = 2


class StopVote:
    """Agreement without waiting: a vote is cast while the accelerator computes and counted before the next forward pass.

    Votes travel between hosts, so counting them never waits for the accelerator.
    """

    def __init__(self, world: World) -> None:
        self._world, self._flag = world, torch.zeros(1, dtype=torch.uint8)
        self._work: Any = None

    def cast(self, vote: Vote) -> None:
        """Start sending this process's vote."""
        self._flag.fill_(int(vote))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._world.control_group, async_op=True)

    def count(self) -> Vote:
        """The largest vote of all processes."""
        self._work.wait()
        return Vote(int(self._flag.item()))

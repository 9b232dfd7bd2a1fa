"""The vote on whether to continue: all processes stop, or fail, at the same step."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from scale_mae.distributed.process_group import World


class Vote(IntEnum):
    """The vote of one process before a forward pass. The largest vote of all processes decides."""

    CONTINUE = 0
    STOP = 1
    FAILED = 2


class StopVote:
    """An asynchronous vote: cast while the accelerator computes, counted before the next forward pass.

    Votes travel between hosts, so counting them does not wait for the accelerator.
    """

    def __init__(self, world: World) -> None:
        self._world, self._flag = world, torch.zeros(1, dtype=torch.uint8)
        self._work: Any = None

    def cast(self, vote: Vote) -> None:
        """Start to send the vote of this process."""
        self._flag.fill_(int(vote))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._world.control_group, async_op=True)

    def count(self) -> Vote:
        """Wait for the votes of all processes and return the largest."""
        self._work.wait()
        return Vote(int(self._flag.item()))

"""Processes: who am I, and how do we all agree. Ranks come from torchrun, from Slurm (``srun`` alone), or there is one."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scale_mae.config import UserError
from scale_mae.distributed.launcher import get_ranks

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
HEARTBEAT = 60.0  # seconds


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: 0 to ``size - 1``.
        size: number of processes.
        local_rank: rank on this machine; also the number of its GPU.
        device: where tensors live.
        control: a group for flags and objects in host memory, apart from the training traffic.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control_group: Any

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        dist.barrier(group=self.control_group)

    def with_new_control_group(self) -> World:
        """The same processes, for a thread of its own: what it says does not mix with the main thread's. All call it."""
        return replace(self, control_group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def all_gather(self, value: T) -> list[T]:
        """Every process's value, in rank order, on every process."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0, however long it takes, and give its result, or its :class:`UserError`, to every process."""
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(action) if self.is_main else None
            while True:
                outcome: list[Any] = [False, None, None]  # whether it has ended, its result, its error
                if running and wait([running], HEARTBEAT).done:
                    error = running.exception()
                    if error is not None and not isinstance(error, UserError):
                        raise error
                    outcome = [True, None if error else running.result(), error]
                dist.broadcast_object_list(outcome, src=0, group=self.control_group)  # in time, or the others give up waiting
                ended, result, error = outcome
                if error is not None:
                    raise error
                if ended:
                    return result  # type: ignore[no-any-return]

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every process; if it raises a :class:`UserError` on any, every process raises the first one."""
        result, problem = None, None
        try:
            result = action()
        except UserError as error:
            problem = error
        for found in self.all_gather(problem):
            if found is not None:
                raise found
        return result  # type: ignore[return-value]  # no error, so it is action's result

    def all_reduce_sum(self, values: Tensor) -> list[float]:
        """Sum of a small tensor over all processes, brought to the host (this waits for the accelerator)."""
        dist.all_reduce(values)
        reduced: list[float] = values.tolist()
        return reduced


@contextmanager
def process_group(timeout: timedelta = TIMEOUT, store: Any = None) -> Iterator[World]:
    """Join the other processes; leave them at the end.

    Args:
        timeout: how long to wait for the others, here and in every collective.
        store: where to meet, when the processes have met already.

    Raises:
        UserError: rank variables that make no sense.
    """
    rank, size, local_rank = get_ranks()
    device = get_local_device()
    left = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} - os.environ.keys()
    # DeepSpeed reads these, and takes LOCAL_RANK for the number of the GPU
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank if device.index is None else device.index),
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if store is None:  # HashStore and the like are public, but not in torch's list of exports
        store = _meeting(timeout) if size > 1 or "MASTER_ADDR" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, local_rank, device, dist.new_group(backend="gloo", timeout=timeout))
    finally:
        comm = sys.modules.get("deepspeed.comm")  # where training has imported it
        # torch's own function would leave DeepSpeed with groups that are gone
        (comm if comm and comm.is_initialized() else dist).destroy_process_group()
        for name in left:
            os.environ.pop(name, None)


_meetings = itertools.count()


@functools.cache
def _place(address: str | None, port: str | None) -> Any:
    """The store where the launcher's processes meet, which the environment names."""
    return next(dist.rendezvous("env://", timeout=TIMEOUT))[0]  # type: ignore[attr-defined]


def _meeting(timeout: timedelta) -> Any:
    """Where to meet this time: under a name of its own, since what the processes left there last time would mislead them."""
    place = _place(*(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")))
    place.set_timeout(timeout)
    return dist.PrefixStore(f"scale_mae/{next(_meetings)}", place)  # type: ignore[attr-defined]


def get_local_device() -> torch.device:
    """Where this process's tensors live; nothing is allocated there yet."""
    _, _, local_rank = get_ranks()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Slurm can be told to show each process its own GPU only (--gpus-per-task); that one is then number 0
    return torch.device("cuda", local_rank if local_rank < torch.cuda.device_count() else 0)

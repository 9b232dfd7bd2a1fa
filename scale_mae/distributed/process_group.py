"""The process group: :func:`process_group` joins it, and :class:`World` describes it and holds its collectives."""

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
HEARTBEAT = 60.0  # seconds between two broadcasts of run_on_main


@dataclass(frozen=True)
class World:
    """This process and the process group that it belongs to. All processes call the collectives in the same order.

    Attributes:
        rank: From 0 to ``size - 1``.
        size: Number of processes (the world size).
        local_rank: Rank on this node.
        device: Device of this process's tensors.
        control_group: A gloo group for flags and objects in host memory. It is separate from the training traffic.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control_group: Any

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier(group=self.control_group)

    def with_new_control_group(self) -> World:
        """Return the same world with a new control group, for a thread that communicates while the main thread does."""
        return replace(self, control_group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 and return its result on all processes. ``action`` may take longer than the timeout.

        Raises:
            UserError: ``action`` raised it. All processes raise the same error.
        """
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(action) if self.is_main else None
            while True:
                status: list[Any] = [False, None, None]  # done, result, error
                if running and wait([running], HEARTBEAT).done:
                    error = running.exception()
                    if error is not None and not isinstance(error, UserError):
                        raise error
                    status = [True, None if error else running.result(), error]
                # broadcast even when the action is not done, because the others would run into the timeout
                dist.broadcast_object_list(status, src=0, group=self.control_group)
                done, result, error = status
                if error is not None:
                    raise error
                if done:
                    return result  # type: ignore[no-any-return]

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run ``action`` on all processes and return this process's result.

        Raises:
            UserError: ``action`` raised it on at least one process. All processes raise the error of the lowest such rank.
        """
        result, own_error = None, None
        try:
            result = action()
        except UserError as error:
            own_error = error
        for first_error in filter(None, self.all_gather(own_error)):
            raise first_error
        return result  # type: ignore[return-value]  # no error, so it is the result of action

    def all_reduce_sum(self, values: Tensor) -> list[float]:
        """Sum a tensor over all processes in place and return it as a list. This waits for the accelerator."""
        dist.all_reduce(values)
        sums: list[float] = values.tolist()
        return sums


@contextmanager
def process_group(timeout: timedelta = TIMEOUT, store: Any = None) -> Iterator[World]:
    """Join the process group of the job, and leave it at the end.

    Args:
        timeout: How long to wait for the other processes, here and in every collective.
        store: The rendezvous store, if the processes have one already.

    Raises:
        UserError: A rank variable is missing or is not a number.
    """
    rank, size, local_rank = get_ranks()
    device = get_local_device()
    unset = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} - os.environ.keys()
    # DeepSpeed reads these variables, and takes LOCAL_RANK as the number of the GPU.
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
    if store is None:  # HashStore and PrefixStore are public, but torch does not list them in its exports
        store = _new_store(timeout) if size > 1 or "MASTER_ADDR" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, local_rank, device, dist.new_group(backend="gloo", timeout=timeout))
    finally:
        comm = sys.modules.get("deepspeed.comm")  # present if training has imported it
        # torch's own function would leave DeepSpeed with groups that no longer exist
        (comm if comm and comm.is_initialized() else dist).destroy_process_group()
        for name in unset:
            os.environ.pop(name, None)


_store_numbers = itertools.count()


def _new_store(timeout: timedelta) -> Any:
    """Return a store with a prefix of its own. The keys of an earlier group in the same processes would mislead this one."""
    store = _launcher_store(*(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")))
    store.set_timeout(timeout)
    return dist.PrefixStore(f"scale_mae/{next(_store_numbers)}", store)  # type: ignore[attr-defined]


@functools.cache
def _launcher_store(address: str | None, port: str | None) -> Any:
    """Return the store at the address in the environment. There is one connection per address."""
    return next(dist.rendezvous("env://", timeout=TIMEOUT))[0]  # type: ignore[attr-defined]


def get_local_device() -> torch.device:
    """Return the device of this process's tensors. This allocates nothing on it."""
    _, _, local_rank = get_ranks()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # With --gpus-per-task, Slurm shows each process only its own GPU, as number 0.
    return torch.device("cuda", local_rank if local_rank < torch.cuda.device_count() else 0)

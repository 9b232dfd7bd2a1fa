"""Ranks for tests: ``run_ranks(2, function, ...)`` runs a function in two processes and returns their results."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
# The server imports the large packages once; every rank is a fork of it, which starts fast. DeepSpeed imports the last
# module, and with it torch's compiler, when it builds its first ZeRO optimizer.
_context.set_forkserver_preload(
    ["scale_mae.training.trainer", "scale_mae.evaluation.evaluate", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


class RankError(AssertionError):
    """At least one rank raised an error. ``kinds`` contains the type of each rank's error, or None."""

    def __init__(self, text: str, kinds: list[str | None]) -> None:
        super().__init__(text)
        self.kinds = kinds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_ranks(size: int, function: Callable[..., Any], *args: Any) -> tuple[list[Any], list[Any]]:
    """Start ``function(*args)`` on ``size`` ranks. Return the processes, and the pipes for their results."""
    port = free_port()
    processes, pipes = [], []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(rank, size, port, sender, function, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    return processes, pipes


def collect(processes: list[Any], pipes: list[Any], timeout: float = 300) -> list[Any]:
    """Wait for the ranks of :func:`start_ranks`, and return their results in rank order."""
    outcomes: list[tuple[Any, str | None, str | None]] = []
    deadline = time.monotonic() + timeout
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(max(0, deadline - time.monotonic())):
                raise TimeoutError(f"rank {rank} returned no result within {timeout} s")
            try:
                outcomes.append(pipe.recv())
            except EOFError:
                outcomes.append((None, f"rank {rank} died", "Died"))
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    if any(text for _, text, _ in outcomes):
        raise RankError("\n".join(text for _, text, _ in outcomes if text), [kind for _, _, kind in outcomes])
    return [result for result, _, _ in outcomes]


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Run ``function(*args)`` on ``size`` ranks, and return the results in rank order."""
    return collect(*start_ranks(size, function, *args), timeout=timeout)


def _rank(rank: int, size: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((function(*args), None, None))
    except BaseException as error:
        pipe.send((None, f"rank {rank}: {traceback.format_exc()}", type(error).__name__))

"""The bandwidth between pairs of nodes, and the bandwidth of an all-reduce over all processes."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_mae.preflight.device_timer import measure_seconds

MB = 10**6
REPEATS = 5


def get_transfer_bytes(device: torch.device) -> int:
    """Return the size of a transfer: large enough to measure the network, and small enough to take seconds at most."""
    return (256 if device.type == "cuda" else 16) * MB


def get_pair_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Return pairs of neighbors on a ring of nodes, in rounds. No node is twice in the same round.

    >>> get_pair_rounds(4)
    [[(0, 1), (2, 3)], [(1, 2), (3, 0)]]
    """
    if nodes < 3:
        return [[(0, 1)]] if nodes == 2 else []
    ring = [(node, (node + 1) % nodes) for node in range(nodes)]
    even, odd = ring[: nodes - 1 : 2], ring[1 : nodes - nodes % 2 : 2]
    return [even, odd, ring[-1:]] if nodes % 2 else [even, odd]


def measure_pair_bandwidth(pairs: list[tuple[int, int]], rank: int, device: torch.device, timeout: float) -> float | None:
    """Send to the other rank of this rank's pair and receive from it at the same time. All ranks call this.

    Args:
        pairs: Pairs of ranks. No rank is in two pairs.
        rank: Rank of this process.
        device: Device of this process.
        timeout: Seconds after which a transfer fails.

    Returns:
        The best of several speeds, in GB/s in each direction. ``None`` if this rank is in no pair.

    Raises:
        RuntimeError: The connection fails, or the received data differ from the sent data.
    """
    group, peer = _join_pair_group(pairs, rank, timeout)
    if peer is None:
        return None
    with _separate_stream(device):
        sent = torch.full((get_transfer_bytes(device) // 4,), float(rank), device=device)
        received = torch.empty_like(sent)
        send_and_receive(sent, received, peer, group)
        if not bool((received == peer).all()):
            raise RuntimeError("the received data differ from the sent data")
        seconds = min(measure_seconds(device, lambda: send_and_receive(sent, received, peer, group)) for _ in range(REPEATS))
    return sent.nbytes / seconds / 1e9


def _join_pair_group(pairs: list[tuple[int, int]], rank: int, timeout: float) -> tuple[Any, int | None]:
    """Return a process group of this rank's pair only, and the rank of the other process.

    If one group breaks, the others still work.
    """
    own_group, peer, failure = None, None, None
    for pair in pairs:
        try:
            group = dist.new_group(list(pair), timeout=timedelta(seconds=timeout))
            own_group, peer = (group, sum(pair) - rank) if rank in pair else (own_group, peer)
        except RuntimeError as error:
            failure = error  # continue, because every rank must create the same number of groups
    if failure:
        raise failure
    return own_group, peer


def send_and_receive(sent: Tensor, received: Tensor, peer: int, group: Any) -> None:
    """Transfer one tensor in each direction."""
    operations = [dist.P2POp(dist.isend, sent, peer, group), dist.P2POp(dist.irecv, received, peer, group)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def measure_all_reduce_bandwidth(world_size: int, device: torch.device) -> float:
    """Sum a tensor over all processes.

    Returns:
        The median of several bus bandwidths in GB/s. The bus bandwidth is bytes x 2 (n - 1) / n / seconds, as in nccl-tests.

    Raises:
        RuntimeError: The connection fails, or the sum is wrong.
    """
    with _separate_stream(device):
        values = torch.ones(get_transfer_bytes(device) // 4, device=device)
        dist.all_reduce(values)
        if not bool((values == world_size).all()):
            raise RuntimeError("the sum is wrong")
        values.zero_()
        seconds = sorted(measure_seconds(device, lambda: dist.all_reduce(values)) for _ in range(REPEATS))[REPEATS // 2]
    return values.nbytes * 2 * (world_size - 1) / world_size / seconds / 1e9


def _separate_stream(device: torch.device) -> Any:
    """Return a context with a new CUDA stream on this process's device.

    It does not wait for an earlier transfer that hangs. A new thread would otherwise use device 0.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()  # type: ignore[no-untyped-call]

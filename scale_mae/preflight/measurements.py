"""What a process finds out about its node and the way to others. Nothing here judges.

Shape suffixes: N = side of a square matrix.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MB = 10**6
FILE_BYTES = 64 * MB
HEAD_BYTES = 32
REPEATS = 5


@dataclass(frozen=True)
class Gpu:
    """One accelerator; ``memory`` in bytes."""

    uuid: str
    name: str
    memory: int


@dataclass(frozen=True)
class NodeState:
    """All accelerators that a process sees, and what is wrong with its own."""

    gpus: tuple[Gpu, ...]
    troubles: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """Precisions in which a matrix product came out wrong, and how fast one is (TFLOP/s)."""

    wrong: tuple[str, ...]
    teraflops: float


@dataclass(frozen=True)
class Written:
    """A file on the shared directory: how it begins, and how fast (MB/s) it was written to disk and read."""

    name: str
    head: bytes
    write_mbps: float
    read_mbps: float


def look(device: torch.device) -> NodeState:
    """The accelerators. To be called before this process uses its own: what is on it then belongs to others."""
    if device.type != "cuda":
        return NodeState((), ())
    all_facts = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    gpus = tuple(Gpu(str(facts.uuid), facts.name, facts.total_memory) for facts in all_facts)
    return NodeState(gpus, tuple(nvml_troubles(gpus[device.index or 0].uuid)))


def nvml_troubles(uuid: str) -> Iterator[str]:
    """What the driver knows against a GPU; nothing where it cannot be asked (no NVML, a slice of a GPU)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception:  # NVML raises errors of its own for every way in which there is no driver
        return

    def ask(question: Callable[..., Any], *words: Any) -> Any:
        try:
            return question(gpu, *words)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
            return None

    errors = ask(pynvml.nvmlDeviceGetTotalEccErrors, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
    if errors:
        yield f"{errors} uncorrected ECC errors since its last reset"
    _, _, pending, failed = ask(pynvml.nvmlDeviceGetRemappedRows) or (0, 0, 0, 0)
    if failed:
        yield "a row of memory could not be replaced"
    if pending:
        yield "a row of memory waits for a reset to be replaced"
    others = [p.pid for p in ask(pynvml.nvmlDeviceGetComputeRunningProcesses) or [] if p.pid != os.getpid()]
    if others:
        yield f"used by process {', '.join(map(str, others))}"
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    if memory and memory.free < 0.9 * memory.total:
        yield f"only {memory.free / memory.total:.0%} of memory free"


def multiply(device: torch.device) -> Product:
    """Multiply matrices whose exact product every precision can hold, check it on the host, and time it."""
    cuda = device.type == "cuda"
    half = torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported() else torch.float16
    N = 4096 if cuda else 512
    generator = torch.Generator().manual_seed(0)
    # -1, 0, 0 or 1: sums of 4,096 products stay below 256 (8 deviations), up to which bf16 is exact
    a_NN, b_NN = torch.randint(0, 2, (2, 2, N, N), generator=generator).diff(dim=1).squeeze(1).double()
    wrong = []
    with torch.cuda.device(device) if cuda else nullcontext():
        for dtype in (torch.float32, half):
            if not _is_product((a_NN.to(device, dtype) @ b_NN.to(device, dtype)).double().cpu(), a_NN, b_NN, generator):
                wrong.append(str(dtype).removeprefix("torch."))
        left_NN, right_NN = (m.to(device, half if cuda else torch.float32) for m in (a_NN, b_NN))
        times, out_NN = 200 if cuda else 5, torch.empty_like(left_NN)
        seconds = (
            min(_timed(device, lambda: [torch.mm(left_NN, right_NN, out=out_NN) for _ in range(times)]) for _ in range(3))
            / times
        )
    return Product(tuple(wrong), 2 * N**3 / seconds / 1e12)


def _is_product(c_NN: Tensor, a_NN: Tensor, b_NN: Tensor, generator: torch.Generator) -> bool:
    """Whether C = A B, in three products with a random vector, exact in fp64 (Freivalds 1977); errs once in 65,536."""
    x_N = torch.randint(0, 2**16, (len(c_NN),), generator=generator).double()
    return torch.equal(c_NN @ x_N, a_NN @ (b_NN @ x_N))


def room(folders: dict[str, Path]) -> dict[str, int]:
    """Free bytes of each folder, or of the nearest one above that exists."""
    free = {}
    for label, folder in folders.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free[label] = shutil.disk_usage(existing).free
    return free


def write_and_read(file: Path, seconds: float) -> Written:
    """Write a file, wait until it is stored, and read it back, past this node's cache where the kernel allows.

    Args:
        file: is made.
        seconds: for each of both. What takes longer ends before all is written: with many nodes at once each gets little of
            a file system that is sound.

    Raises:
        OSError: it cannot be written, or what is read is not what was written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    content = os.urandom(FILE_BYTES)
    with open(file, "wb") as out:

        def write(begin: int, end: int) -> None:
            out.write(content[begin:end])
            out.flush()
            os.fsync(out.fileno())

        written, write_mbps = _in_pieces(write, FILE_BYTES, seconds)
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(file, "rb") as back:

        def read(begin: int, end: int) -> None:
            if back.read(end - begin) != content[begin:end]:
                raise OSError(0, "what is read is not what was written")

        _, read_mbps = _in_pieces(read, written, seconds)
    return Written(file.name, content[:HEAD_BYTES], write_mbps, read_mbps)


def _in_pieces(move: Callable[[int, int], None], size: int, seconds: float) -> tuple[int, float]:
    """Move bytes, each piece as many as all before it, until all are moved or the next piece would take too long.

    Returns:
        How many were moved, and the MB/s of the last piece, which is half of them.
    """
    done, piece, began = 0, FILE_BYTES // 64, time.perf_counter()
    while True:
        start = time.perf_counter()
        move(done, done + piece)
        end = time.perf_counter()
        done, speed = done + piece, piece / MB / (end - start)
        if done >= size or 2 * (end - began) > seconds:
            return done, speed
        piece = done


def unseen(folder: Path, files: dict[str, Written], seconds: float = 3.0) -> list[str]:
    """Nodes whose files are not there; a network file system may show them a little later."""
    left, deadline = dict(files), time.monotonic() + seconds
    while True:
        left = {node: written for node, written in left.items() if not _is_there(folder, written)}
        if not left or time.monotonic() > deadline:
            return list(left)
        time.sleep(0.1)


def _is_there(folder: Path, written: Written) -> bool:
    try:
        with open(folder / written.name, "rb") as file:
            return file.read(HEAD_BYTES) == written.head
    except OSError:
        return False


def transfer_bytes(device: torch.device) -> int:
    """Size of a transfer: enough to measure the network, little enough for seconds."""
    return (256 if device.type == "cuda" else 16) * MB


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours on a ring, in rounds in which nobody is twice.

    >>> rounds(4)
    [[(0, 1), (2, 3)], [(1, 2), (3, 0)]]
    """
    if nodes < 3:
        return [[(0, 1)]] if nodes == 2 else []
    ring = [(node, (node + 1) % nodes) for node in range(nodes)]
    even, odd = ring[: nodes - 1 : 2], ring[1 : nodes - nodes % 2 : 2]
    return [even, odd, ring[-1:]] if nodes % 2 else [even, odd]


def exchange(pairs: list[tuple[int, int]], rank: int, device: torch.device, timeout: float) -> float | None:
    """Send to the other of this rank's pair and receive from it at once; GB/s each way, the best of some. All ranks call it.

    Raises:
        RuntimeError: no connection, or what arrived is not what was sent.
    """
    group, peer = _pair_group(pairs, rank, timeout)
    if peer is None:
        return None
    with _own_stream(device):
        mine = torch.full((transfer_bytes(device) // 4,), float(rank), device=device)
        theirs = torch.empty_like(mine)
        send_and_receive(mine, theirs, peer, group)
        if not bool((theirs == peer).all()):
            raise RuntimeError("what arrived is not what was sent")
        seconds = min(_timed(device, lambda: send_and_receive(mine, theirs, peer, group)) for _ in range(REPEATS))
    return mine.nbytes / seconds / 1e9


def _pair_group(pairs: list[tuple[int, int]], rank: int, timeout: float) -> tuple[Any, int | None]:
    """A group of this rank's pair alone (when it breaks, it breaks for no one else), and the other's rank."""
    own, peer, failure = None, None, None
    for pair in pairs:
        try:
            group = dist.new_group(list(pair), timeout=timedelta(seconds=timeout))
            own, peer = (group, sum(pair) - rank) if rank in pair else (own, peer)
        except RuntimeError as error:
            failure = error  # torch counts groups, so that every rank goes through all of them, come what may
    if failure:
        raise failure
    return own, peer


def send_and_receive(mine: Tensor, theirs: Tensor, peer: int, group: Any) -> None:
    """One transfer each way."""
    both = [dist.P2POp(dist.isend, mine, peer, group), dist.P2POp(dist.irecv, theirs, peer, group)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def all_reduce(size: int, device: torch.device) -> float:
    """Sum over all processes; GB/s of bus bandwidth (bytes times 2 (n - 1) / n a second), the median of some.

    Raises:
        RuntimeError: no connection, or a wrong sum.
    """
    with _own_stream(device):
        values = torch.ones(transfer_bytes(device) // 4, device=device)
        dist.all_reduce(values)
        if not bool((values == size).all()):
            raise RuntimeError("wrong sum")
        values.zero_()
        seconds = sorted(_timed(device, lambda: dist.all_reduce(values)) for _ in range(REPEATS))[REPEATS // 2]
    return values.nbytes * 2 * (size - 1) / size / seconds / 1e9


def _own_stream(device: torch.device) -> Any:
    """A stream that does not wait for a transfer that hangs, on this process's device (a new thread's is number 0)."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()  # type: ignore[no-untyped-call]


def _timed(device: torch.device, action: Callable[[], object]) -> float:
    """Seconds until the action and what it started on the device have ended."""
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter() - began

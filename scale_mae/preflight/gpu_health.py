"""The GPUs that a process sees, problems that the driver reports, and the correctness and speed of matrix multiplication.

Shape suffixes: N = side of a square matrix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_mae.preflight.device_timer import measure_seconds


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        uuid: Unique identifier.
        name: Name of the model.
        memory: Size of the memory in bytes.
    """

    uuid: str
    name: str
    memory: int


@dataclass(frozen=True)
class GpuState:
    """The GPUs of a process.

    Attributes:
        visible: All GPUs that the process sees.
        problems: Problems of the GPU that the process uses.
    """

    visible: tuple[Gpu, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class MatmulResult:
    """The result of matrix multiplications.

    Attributes:
        wrong_dtypes: Names of the dtypes in which a product was wrong.
        tflops: Speed in TFLOP/s.
    """

    wrong_dtypes: tuple[str, ...]
    tflops: float


def get_gpu_state(device: torch.device) -> GpuState:
    """Return the GPUs of this process. Call this before the process uses its GPU: then all usage belongs to others."""
    if device.type != "cuda":
        return GpuState((), ())
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    gpus = tuple(Gpu(str(p.uuid), p.name, p.total_memory) for p in properties)
    return GpuState(gpus, tuple(get_driver_problems(gpus[device.index or 0].uuid)))


def get_driver_problems(uuid: str) -> Iterator[str]:
    """Yield the problems that the driver reports for a GPU.

    There are none if the driver cannot be asked: without NVML, or if the GPU is a partition of a GPU (MIG).
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception:  # NVML has many error classes for a missing driver
        return

    def ask(query: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return query(gpu, *arguments)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
            return None

    errors = ask(pynvml.nvmlDeviceGetTotalEccErrors, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
    if errors:
        yield f"{errors} uncorrected ECC {'error' if errors == 1 else 'errors'} since the last reset"
    _, _, pending, failed = ask(pynvml.nvmlDeviceGetRemappedRows) or (0, 0, 0, 0)
    if failed:
        yield "a defective memory row could not be remapped"
    if pending:
        yield "a defective memory row is remapped only after a reset"
    others = [p.pid for p in ask(pynvml.nvmlDeviceGetComputeRunningProcesses) or [] if p.pid != os.getpid()]
    if others:
        yield f"used by another process (PID {', '.join(map(str, others))})"
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    if memory and memory.free < 0.9 * memory.total:
        yield f"only {memory.free / memory.total:.0%} of its memory is free"


def measure_matmul(device: torch.device) -> MatmulResult:
    """Multiply matrices whose exact product every dtype can represent, check the product on the host, and time it."""
    cuda = device.type == "cuda"
    half = torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported() else torch.float16
    N = 4096 if cuda else 512
    generator = torch.Generator().manual_seed(0)
    # Elements are -1, 0, 0 or 1. Sums of 4,096 products stay below 256 (8 standard deviations), up to which bf16 is exact.
    a_NN, b_NN = torch.randint(0, 2, (2, 2, N, N), generator=generator).diff(dim=1).squeeze(1).double()
    wrong = []
    with torch.cuda.device(device) if cuda else nullcontext():
        for dtype in (torch.float32, half):
            if not _is_product((a_NN.to(device, dtype) @ b_NN.to(device, dtype)).double().cpu(), a_NN, b_NN, generator):
                wrong.append(str(dtype).removeprefix("torch."))
        left_NN, right_NN = (matrix_NN.to(device, half if cuda else torch.float32) for matrix_NN in (a_NN, b_NN))
        repeats, out_NN = 200 if cuda else 5, torch.empty_like(left_NN)

        def multiply_repeatedly() -> None:
            for _ in range(repeats):
                torch.mm(left_NN, right_NN, out=out_NN)

        seconds = min(measure_seconds(device, multiply_repeatedly) for _ in range(3)) / repeats
    return MatmulResult(tuple(wrong), 2 * N**3 / seconds / 1e12)


def _is_product(c_NN: Tensor, a_NN: Tensor, b_NN: Tensor, generator: torch.Generator) -> bool:
    """Return whether C = A B, from products with a random vector in exact fp64 arithmetic (Freivalds 1977).

    The test misses a wrong product with a probability of 1 in 65,536.
    """
    x_N = torch.randint(0, 2**16, (len(c_NN),), generator=generator).double()
    return torch.equal(c_NN @ x_N, a_NN @ (b_NN @ x_N))

"""What the hardware could do and what it says of itself: peak speed, memory, and GPUs by NVML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch

# Dense TFLOP/s, without sparsity, from NVIDIA's data sheet of each product (of GeForce cards: from the white paper of the
# architecture, with fp32 accumulation). fp32 is torch's default, without TF32. None: the device has no bf16.
# The first match counts, so longer names come first.
PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    # name, fp32, bf16, fp16
    ("GB200", 80.0, 2500.0, 2500.0),
    ("B200", 75.0, 2250.0, 2250.0),
    ("B100", 60.0, 1750.0, 1750.0),
    ("GH200", 67.0, 989.4, 989.4),
    ("H200 NVL", 60.0, 835.5, 835.5),
    ("H200", 67.0, 989.4, 989.4),
    ("H100 PCIe", 51.0, 756.0, 756.0),
    ("H100 NVL", 60.0, 835.5, 835.5),
    ("H100", 67.0, 989.4, 989.4),  # torch calls the SXM card "NVIDIA H100 80GB HBM3"
    ("H800 PCIe", 51.0, 756.0, 756.0),
    ("H800", 67.0, 989.4, 989.4),
    ("H20", 44.0, 148.0, 148.0),
    ("A100", 19.5, 312.0, 312.0),
    ("A800", 19.5, 312.0, 312.0),
    ("A40", 37.4, 149.7, 149.7),
    ("A30", 10.3, 165.0, 165.0),
    ("A10G", 31.5, 70.0, 70.0),
    ("A10", 31.2, 125.0, 125.0),
    ("RTX A6000", 38.7, 154.8, 154.8),
    ("V100-SXM2", 15.7, None, 125.0),
    ("V100-SXM3", 16.4, None, 130.0),
    ("V100", 14.0, None, 112.0),
    ("L40S", 91.6, 362.05, 362.05),
    ("L40", 90.5, 181.05, 181.05),
    ("L4", 30.3, 121.0, 121.0),
    ("Tesla T4", 8.1, None, 65.0),
    ("RTX 6000 Ada", 91.1, 364.2, 364.2),
    ("RTX 5090", 104.8, 209.5, 209.5),
    ("RTX 4090", 82.6, 165.2, 165.2),
    ("RTX 4080", 48.7, 97.5, 97.5),
    ("RTX 3090 Ti", 40.0, 80.0, 80.0),
    ("RTX 3090", 35.6, 71.2, 71.2),
)
REASONS = {  # bits of NVML's clocks-event reasons that mean that a GPU is held back, and how they are called
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",
}


def peak_flops(name: str, precision: str) -> float | None:
    """Dense operations a second that a GPU could do at most; None where they are not known.

    Args:
        name: of the device, as torch gives it.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    if "MIG" in name.split():  # a part of a GPU
        return None
    words = f" {name.replace('-', ' ')} "
    for part, *peaks in PEAKS:
        # as words, so that an L4 is no L40S, nor a laptop's card the desktop's
        if f" {part.replace('-', ' ')} " in words and "Laptop" not in name:
            peak = peaks[("fp32", "bf16", "fp16").index(precision)]
            return None if peak is None else peak * 1e12
    return None


class Memory(NamedTuple):
    """Bytes of a process: allocated on its GPU at most so far, reserved there by torch, resident on the host. No GPU: None."""

    allocated: int | None
    reserved: int | None
    host_rss: int


def memory(device: torch.device) -> Memory:
    """Memory of this process."""
    rss = psutil.Process().memory_info().rss
    if device.type != "cuda":
        return Memory(None, None, rss)
    return Memory(torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device), rss)


@dataclass(frozen=True)
class Gpu:
    """What NVML says of a GPU. None: it does not say.

    Attributes:
        number: NVML's, which no ``CUDA_VISIBLE_DEVICES`` changes.
        power: watts.
        temperature: degrees Celsius.
        throttled: which of :data:`REASONS` hold it back.
    """

    number: int
    power: float | None
    temperature: float | None
    throttled: frozenset[str] | None


class Nvml:
    """GPUs by NVML, which asks the driver: no CUDA context, no stream, no waiting for work on the device.

    Nothing here raises; where NVML or a value is missing, so is what depends on it.
    """

    def __init__(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no library, no driver, no permission
            self._nvml: Any = None
        else:
            self._nvml = pynvml

    def number(self, device: torch.device) -> int | None:
        """NVML's number of a device of torch."""
        if self._nvml is None or device.type != "cuda":
            return None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        index = self._ask(lambda nvml: nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")))
        return None if index is None else int(index)

    def energy(self, number: int | None) -> float | None:
        """Joules since the driver was loaded."""
        millijoules = self._of(number, "nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def read(self, number: int) -> Gpu:
        """What a GPU says now."""
        power, reasons = (
            self._of(number, "nvmlDeviceGetPowerUsage"),
            self._of(number, "nvmlDeviceGetCurrentClocksThrottleReasons"),
        )
        held = None if reasons is None else frozenset(name for bit, name in REASONS.items() if int(reasons) & bit)
        return Gpu(number, None if power is None else power / 1000, self._of(number, "nvmlDeviceGetTemperature", 0), held)

    def _of(self, number: int | None, function: str, *arguments: Any) -> float | None:
        if number is None:
            return None
        value = self._ask(lambda nvml: getattr(nvml, function)(nvml.nvmlDeviceGetHandleByIndex(number), *arguments))
        return None if value is None else float(value)

    def _ask(self, question: Any) -> Any:
        if self._nvml is None:
            return None
        try:
            return question(self._nvml)
        except Exception:  # a value that this GPU does not have, or a driver that went away
            return None

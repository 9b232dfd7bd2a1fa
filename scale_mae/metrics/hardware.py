"""What the hardware could do and what it says of itself: peak speed, memory, and GPUs by NVML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch

# Dense TFLOP/s: half of what data sheets print for tensor cores "with sparsity". fp32 is without TF32, as torch multiplies
# unless it is told otherwise; fp16 and bf16 accumulate in fp32, which matters for GeForce. None: the device has no bf16.
# Each group names its sources, NVIDIA's where nothing else is said. "Not confirmed": neither the source nor anybody who quotes
# it could be read; the figure follows from the chip, or others reckon with it. The first match counts: longer names first.
PEAK_TFLOPS: tuple[tuple[str, float, float | None, float], ...] = (
    # name, fp32, bf16, fp16
    # specifications of "HGX B300" and "HGX B200", a board's figures over its 8 GPUs, and of "GB200 NVL72", a rack's over 72. In
    # fp32 the "Blackwell Architecture Technical Brief" has 80 for B200, 90 for GB200 at 1,200 W; B100 is its, not confirmed
    ("GB200", 80.0, 2500.0, 2500.0),  # fp32 not confirmed
    ("B300", 75.0, 2250.0, 2250.0),
    ("B200", 75.0, 2250.0, 2250.0),
    ("B100", 60.0, 1750.0, 1750.0),
    # "H100 Tensor Core GPU Datasheet", 989.4 being that of the white paper "H100 Tensor Core GPU Architecture"; "H200 Tensor
    # Core GPU Datasheet". HBM2e is the PCIe card's; torch calls the SXM one "NVIDIA H100 80GB HBM3"
    ("GH200", 67.0, 989.4, 989.4),  # "GH200 Grace Hopper Superchip Datasheet": not confirmed
    ("H200 NVL", 60.0, 835.5, 835.5),  # not confirmed
    ("H200", 67.0, 989.4, 989.4),
    ("H100 80GB HBM2e", 51.0, 756.5, 756.5),
    ("H100 PCIe", 51.0, 756.5, 756.5),
    ("H100 NVL", 60.0, 835.5, 835.5),  # fp32 not confirmed
    ("H100", 67.0, 989.4, 989.4),
    # not confirmed: no public data sheet. H800 is H100 with slower links and fp64; H20 is what the press has
    ("H800 PCIe", 51.0, 756.5, 756.5),
    ("H800", 67.0, 989.4, 989.4),
    ("H20", 44.0, 148.0, 148.0),
    # data sheets "A100", "A40", "A30" and "A10 Tensor Core GPU"; A800 has the chip of A100; A6000: white paper "Ampere GA102
    # GPU Architecture", appendix C
    ("A100", 19.5, 312.0, 312.0),
    ("A800", 19.5, 312.0, 312.0),
    ("A40", 37.4, 149.7, 149.7),
    ("A30", 10.3, 165.0, 165.0),  # fp32 not confirmed
    ("A10G", 35.0, 70.0, 70.0),  # "A10G Tensor Core GPU", Amazon's data sheet; fp32 not confirmed, and 80 SMs at 1.71 GHz
    ("A10", 31.2, 125.0, 125.0),
    ("RTX A6000", 38.7, 154.8, 154.8),  # bf16 and fp16 not confirmed: four times fp32, as on A40
    # "V100 Tensor Core GPU Datasheet"; SXM3 is not in it, and not confirmed: from its boost clock, 1,597 MHz
    ("V100-SXM2", 15.7, None, 125.0),
    ("V100-SXM3", 16.4, None, 130.0),
    ("V100S-PCIE", 16.4, None, 130.0),
    ("V100-PCIE", 14.0, None, 112.0),
    # data sheets "L40S", "L40", "L4" and "T4 Tensor Core GPU"; RTX 6000 Ada: white paper "Ada GPU Architecture"
    ("L40S", 91.6, 362.05, 362.05),
    ("L40", 90.5, 181.05, 181.05),
    ("L4", 30.3, 121.0, 121.0),
    ("T4", 8.1, None, 65.0),
    ("RTX 6000 Ada", 91.1, 364.2, 364.2),  # bf16 and fp16 not confirmed: four times fp32
    # white papers "RTX Blackwell", "Ada" and "Ampere GA102 GPU Architecture"; fp32 is twice the cores times the boost clock,
    # bf16 and fp16 (confirmed of RTX 4090) are twice that
    ("RTX 5090", 104.8, 209.5, 209.5),
    ("RTX 4090", 82.6, 165.2, 165.2),
    ("RTX 4080", 48.7, 97.5, 97.5),
    ("RTX 3090 Ti", 40.0, 80.0, 80.0),  # not in them: from its boost clock, 1,860 MHz
    ("RTX 3090", 35.6, 71.2, 71.2),
)
OTHERS = frozenset({"MIG", "Laptop", "SUPER", "D", "64GB"})  # a part of a GPU, or another one of a name that goes on
THROTTLE_REASONS = {  # bits of NVML's clocks-event reasons that mean that a GPU is held back, and how they are called
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
    words = name.replace("-", " ").split()
    if OTHERS & set(words):
        return None
    for part, *peaks in PEAK_TFLOPS:
        if f" {part.replace('-', ' ')} " in f" {' '.join(words)} ":  # as words, so that an L4 is no L40S
            peak = peaks[("fp32", "bf16", "fp16").index(precision)]
            return None if peak is None else peak * 1e12
    return None


class MemoryUsage(NamedTuple):
    """Bytes of a process: allocated on its GPU at most so far, reserved there by torch, resident on the host. No GPU: None."""

    allocated: int | None
    reserved: int | None
    host_rss: int


def memory_usage(device: torch.device) -> MemoryUsage:
    """Memory of this process."""
    rss = psutil.Process().memory_info().rss
    if device.type != "cuda":
        return MemoryUsage(None, None, rss)
    return MemoryUsage(torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device), rss)


@dataclass(frozen=True)
class GpuReading:
    """What NVML says of a GPU. None: it does not say.

    Attributes:
        number: NVML's, which no ``CUDA_VISIBLE_DEVICES`` changes.
        power: watts.
        temperature: degrees Celsius.
        throttled: which of :data:`THROTTLE_REASONS` hold it back.
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

    def gpu_index(self, device: torch.device) -> int | None:
        """NVML's number of a device of torch."""
        if self._nvml is None or device.type != "cuda":
            return None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        index = self._ask(lambda nvml: nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")))
        return None if index is None else int(index)

    def energy_joules(self, number: int | None) -> float | None:
        """Joules since the driver was loaded."""
        millijoules = self._of(number, "nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def read(self, number: int) -> GpuReading:
        """What a GPU says now."""
        power, reasons = (
            self._of(number, "nvmlDeviceGetPowerUsage"),
            self._of(number, "nvmlDeviceGetCurrentClocksThrottleReasons"),
        )
        held = None if reasons is None else frozenset(name for bit, name in THROTTLE_REASONS.items() if int(reasons) & bit)
        return GpuReading(
            number, None if power is None else power / 1000, self._of(number, "nvmlDeviceGetTemperature", 0), held
        )

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

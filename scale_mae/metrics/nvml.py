"""GPU power, temperature, throttling and energy, read through NVML (the NVIDIA Management Library)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

THROTTLE_REASONS = {  # NVML's clocks-event reasons (bit masks) that mean that a GPU is throttled, and their label values
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",
}


@dataclass(frozen=True)
class GpuReading:
    """The sensors of a GPU at one moment. ``None`` marks a value that NVML does not provide.

    Attributes:
        index: NVML's index of the GPU. ``CUDA_VISIBLE_DEVICES`` does not change it.
        power: Watts.
        temperature: Degrees Celsius.
        throttle_reasons: The active :data:`THROTTLE_REASONS`.
    """

    index: int
    power: float | None
    temperature: float | None
    throttle_reasons: frozenset[str] | None


class Nvml:
    """Reads GPUs through NVML.

    NVML queries the driver. It needs no CUDA context and does not wait for work on the device. No method raises; each returns
    ``None`` if NVML or the value is not available.
    """

    def __init__(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no library, no driver, or no permission
            self._nvml: Any = None
        else:
            self._nvml = pynvml

    def gpu_index(self, device: torch.device) -> int | None:
        """Return NVML's index of a PyTorch device."""
        if self._nvml is None or device.type != "cuda":
            return None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        index = self._query(lambda nvml: nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")))
        return None if index is None else int(index)

    def energy_joules(self, index: int | None) -> float | None:
        """Return the energy that a GPU has used since its driver was loaded."""
        millijoules = self._value(index, "nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def read(self, index: int) -> GpuReading:
        """Return the current sensor values of a GPU."""
        milliwatts = self._value(index, "nvmlDeviceGetPowerUsage")
        mask = self._value(index, "nvmlDeviceGetCurrentClocksThrottleReasons")
        return GpuReading(
            index,
            power=None if milliwatts is None else milliwatts / 1000,
            temperature=self._value(index, "nvmlDeviceGetTemperature", 0),
            throttle_reasons=None
            if mask is None
            else frozenset(reason for bit, reason in THROTTLE_REASONS.items() if int(mask) & bit),
        )

    def _value(self, index: int | None, function: str, *arguments: Any) -> float | None:
        """Return the result of an NVML function for a GPU."""
        if index is None:
            return None
        value = self._query(lambda nvml: getattr(nvml, function)(nvml.nvmlDeviceGetHandleByIndex(index), *arguments))
        return None if value is None else float(value)

    def _query(self, function: Callable[[Any], Any]) -> Any:
        if self._nvml is None:
            return None
        try:
            return function(self._nvml)
        except Exception:  # this GPU does not provide the value, or the driver was unloaded
            return None

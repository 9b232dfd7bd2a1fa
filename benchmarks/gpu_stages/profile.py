"""The ten longest kernels of a compiled training step, by torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch.autograd import DeviceType
from training import TINY_DECODER, Trial, engine_world

from gpu_stages.stage import Stage
from gpu_stages.tracing import MARK, on_device, recorded

STEPS, LONGEST, WIDTH = 3, 10, 60


def run(stage: Stage) -> None:
    from scale_mae.model.mae import build_mae

    size, side, batch, decoder = ("nano", 64, 2, TINY_DECODER) if stage.rehearse else ("large", 224, 256, {})
    compiled = not stage.rehearse  # the stage ``step`` rehearses compilation, which takes long on a CPU
    with (
        engine_world(stage.device, rehearse=stage.rehearse) as world,
        stage.case(f"{size}, batch {batch}, {'compiled' if compiled else 'eager'}") as case,
    ):
        with stage.device:
            model = build_mae(size, image_size=(side, side), seed=0, **decoder)
        trial = Trial(model, world, size, "none", compiled)
        try:
            step, images, noise = trial.run(batch, 3)
            events = recorded(lambda: [step(images, noise) for _ in range(STEPS)], stage.device)
        finally:
            trial.close()
        kernels = longest(on_device(events) if stage.device.type == "cuda" else operators(events))
        case.update(compiled=compiled, steps=STEPS, kernels=kernels, kernel_s=sum(each["seconds"] for each in kernels))


def operators(events: list[Any]) -> list[Any]:
    """What a rehearsal has in place of kernels: operators of the host. One that calls another counts for both."""
    return [e for e in events if e.device_type() == DeviceType.CPU and e.name() != MARK and e.name().startswith("aten::")]


def longest(events: list[Any]) -> list[dict[str, Any]]:
    """Seconds and calls of a step by name, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        found[event.name()].append(event.duration_ns() / 1e9)
    table = [{"name": name, "seconds": sum(each) / STEPS, "calls": len(each) / STEPS} for name, each in found.items()]
    return sorted(table, key=lambda row: -row["seconds"])


def shortened(name: str) -> str:
    """Without ``void``, return type and namespaces of templates; at most :data:`WIDTH` characters."""
    plain = re.sub(r"\b(void|const|at::native::|at::|c10::|std::|\(anonymous namespace\)::|cutlass::)\s*", "", name)
    return plain if len(plain) <= WIDTH else f"{plain[: WIDTH - 3]}..."


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "kernel": shortened(kernel["name"]),
            "ms a step": f"{1e3 * kernel['seconds']:.2f}",
            "share": f"{kernel['seconds'] / case['kernel_s']:.1%}",
            "calls": f"{kernel['calls']:.0f}",
        }
        for case in result["cases"]
        for kernel in case.get("kernels", [])[:LONGEST]
    ]

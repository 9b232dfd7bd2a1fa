"""A run from end to end: versions, NVML, training from JPEG files, a checkpoint, resuming, conversion."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import report
import torch

from gpu_stages.photographs import make_jpegs
from gpu_stages.stage import Stage

STEPS, SAVE = 8, 4
LOSS_TOLERANCE = 0.02  # relative; atomic additions on a GPU are not deterministic


def run(stage: Stage) -> None:
    with stage.case("versions") as case:
        case.update(software())
    with stage.case("nvml") as case:
        case.update(nvml(stage.device))
    jpegs = stage.folder / "jpegs"
    with stage.case("jpegs") as case:
        make_jpegs(jpegs, 32 if stage.rehearse else 256)
        case["bytes"] = sum(path.stat().st_size for path in jpegs.rglob("*.jpg"))
    trained = next((folder for decoder in decoders(stage) if (folder := train(stage, jpegs, decoder))), None)
    if trained is None:
        return
    with stage.case("resume") as case:
        case.update(resume(trained, jpegs, stage))
    with stage.case("convert") as case:
        case.update(to_timm(trained, stage))


def software() -> dict[str, Any]:
    """Versions of what is not a Python package; those of packages are in the result file of every stage."""
    return report.versions() | {
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none",
        "driver": _driver(),
    }


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception as error:  # NVML has an error of its own for every way in which there is no driver
        return f"not known ({error})"


def nvml(device: torch.device) -> dict[str, Any]:
    """What the system's own NVML code reads while the device multiplies matrices."""
    from scale_mae.metrics.nvml import Nvml

    reader = Nvml()
    number = reader.gpu_index(device)
    if device.type != "cuda":
        assert number is None, "NVML numbers a CPU"
        return {"number": None}
    assert number is not None, "NVML does not know the device"
    before, began = reader.energy_joules(number), time.monotonic()
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    while time.monotonic() < began + 1:
        matrix @ matrix
        torch.cuda.synchronize()
    gpu, joules = reader.read(number), reader.energy_joules(number)
    return {
        "number": number,
        "power_w": gpu.power,
        "mean_power_w": None if before is None or joules is None else (joules - before) / (time.monotonic() - began),
        "temperature_c": gpu.temperature,
        "throttled": None if gpu.throttle_reasons is None else sorted(gpu.throttle_reasons),
    }


def decoders(stage: Stage) -> list[str]:
    """The decoder to train with, and Pillow to train with if that fails. Says why if it is not DALI on the GPU."""
    from scale_mae.data.decoders import choose_decoder

    name, why = ("pillow", "a rehearsal") if stage.rehearse else choose_decoder("auto", stage.device)
    stage.result["decoder"] = f"{name}: {why}"
    return list(dict.fromkeys([name, "pillow"]))


def train(stage: Stage, jpegs: Path, decoder: str) -> Path | None:
    """Train a few steps; the run directory, or None where that failed."""
    from scale_mae import pretrain

    folder = stage.folder / f"run_{decoder}"
    with stage.case(f"train, {decoder}") as case:
        began = time.monotonic()
        result = pretrain(_recipe(stage), **_overrides(stage, folder, jpegs, decoder))
        case["pretrain_s"] = round(time.monotonic() - began, 2)
        case.update(decoder=decoder, finished=result.finished, log=_steps(folder))
        losses = [line["loss"] for line in case["log"]]
        assert result.finished, result.stopped
        fallbacks = case["log"][-1].get("decoder_fallbacks") or 0
        assert not fallbacks, f"Pillow decoded {fallbacks} images in place of {decoder}"
        assert len(losses) == STEPS, f"{len(losses)} steps are logged, not {STEPS}"
        assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
        return folder
    return None


def _recipe(stage: Stage) -> str:
    return "debug" if stage.rehearse else "vit_base"


def _overrides(stage: Stage, folder: Path, jpegs: Path, decoder: str) -> dict[str, Any]:
    """ViT-B under ZeRO-1 in bf16, not compiled, which would take the time of the stage."""
    batch = 4 if stage.rehearse else 64
    return {
        "run": {"dir": str(folder)},
        "data": {"source": str(jpegs), "decoder": decoder},
        "train": {"duration": f"{STEPS} steps", "global_batch": batch, "micro_batch": batch, "precision": "bf16"},
        "optim": {"warmup": "2 steps", "base_lr": 5e-4 * 256 / batch},
        "engine": {"deepspeed": "zero1", "compile": False},
        "checkpoint": {"interval": f"{SAVE} steps"},
        "log": {"interval": 1},
    }


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def resume(folder: Path, jpegs: Path, stage: Stage) -> dict[str, Any]:
    """Remove the last checkpoint and continue: the steps after the one before must come again, with the same losses."""
    from scale_mae import pretrain
    from scale_mae.checkpoint.paths import list_checkpoints

    first = _steps(folder)
    saved = list_checkpoints(folder)
    assert len(saved) == STEPS // SAVE, f"{len(saved)} checkpoints are there, not {STEPS // SAVE}"
    shutil.rmtree(saved[-1])
    decoder = folder.name.removeprefix("run_")
    assert pretrain(_recipe(stage), **_overrides(stage, folder, jpegs, decoder)).finished
    again = _steps(folder)[len(first) :]
    steps = [line["step"] for line in again]
    assert steps == list(range(SAVE + 1, STEPS + 1)), f"the run continues with the steps {steps}"
    pairs = list(zip((line["loss"] for line in first[SAVE:]), (line["loss"] for line in again), strict=True))
    difference = max(abs(new / old - 1) for old, new in pairs)
    assert difference <= LOSS_TOLERANCE, f"other losses after resuming: {pairs}"
    return {"steps": steps, "losses": pairs, "largest_difference": difference}


def to_timm(folder: Path, stage: Stage) -> dict[str, Any]:
    """Convert to a timm encoder, which compares its outputs to those of the checkpoint, and use it on the device."""
    from scale_mae import load_encoder
    from scale_mae.weights.convert import convert

    out = convert(folder, "timm", folder / "encoder.safetensors")
    encoder = load_encoder(out).to(stage.device).eval()
    channels, height, width = (int(n) for n in encoder.pretrained_cfg["input_size"])
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)).to(stage.device)
    with torch.inference_mode():
        features = encoder(images)
    assert torch.isfinite(features).all(), "features are not finite"
    return {"bytes": out.stat().st_size, "features": list(features.shape)}


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "case": case["case"],
            "seconds": f"{case['seconds']:.1f}" if "seconds" in case else "running",
            "finding": _finding(case, result) if "error" not in case else "failed",
        }
        for case in result["cases"]
    ]


def _finding(case: dict[str, Any], result: dict[str, Any]) -> str:
    match case["case"].split(",")[0]:
        case "versions":
            names = ("torch", "cuda", "driver", "deepspeed", "nvidia-dali-cuda130", "timm", "transformers")
            return ", ".join(f"{name} {case[name]}" for name in names if name in case)
        case "nvml" if case.get("number") is not None:
            return f"{case['power_w']} W, {case['temperature_c']} C, throttled: {case['throttled']}"
        case "jpegs" if "bytes" in case:
            return f"{case['bytes'] / 1e6:.1f} MB"
        case "train" if "log" in case:
            losses = [line["loss"] for line in case["log"]]
            chosen = result["decoder"]  # with the reason; Pillow takes over where it fails
            decoder = chosen if chosen.startswith(f"{case['decoder']}:") else f"{case['decoder']}, in place of {chosen}"
            return f"decoder {decoder}; loss {losses[0]:.3f} to {losses[-1]:.3f}"
        case "resume" if "steps" in case:
            return f"steps {case['steps'][0]} to {case['steps'][-1]}, losses differ by {case['largest_difference']:.1e} at most"
        case "convert" if "bytes" in case:
            return f"{case['bytes'] / 1e6:.1f} MB, outputs equal the checkpoint's"
    return "-"

"""What the host does in a training step that is not logged: time in Python, kernel launches, waits for the GPU (must be 0).

The step is the trainer's own, with the queue of batches, the copy to the device and the normalisation; only the batch comes
from memory instead of the loader.
"""

from __future__ import annotations

import itertools
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from training import TINY_DECODER, engine_world, timed, wait

from gpu_stages.photographs import make_jpegs
from gpu_stages.stage import Stage
from gpu_stages.tracing import recorded, summary

WARM_UP, STEPS = 3, 5
FRAMES = 8  # of a stack


def run(stage: Stage) -> None:
    jpegs = stage.folder / "jpegs"
    make_jpegs(jpegs, 8)
    with engine_world(stage.device, rehearse=stage.rehearse) as world:
        for size, batch in [("nano", 2)] if stage.rehearse else [("base", 256), ("large", 256)]:
            with stage.case(f"{size}, batch {batch}") as case, training_step(stage, world, jpegs, size, batch) as step:
                case["batch"] = batch
                examine(step, stage.device, case)


@contextmanager
def training_step(stage: Stage, world: Any, jpegs: Path, size: str, batch: int) -> Iterator[Callable[[], object]]:
    """One step of a real run (:meth:`scale_mae.training.trainer.Trainer.train_step`), which is never logged."""
    from scale_mae.config import load_config
    from scale_mae.data.loader import Batch
    from scale_mae.distributed.signals import StopRequest
    from scale_mae.training.batch_iterator import BatchIterator
    from scale_mae.training.trainer import Trainer
    from scale_mae.training.watchdog import Watchdog

    side, decoder = (64, TINY_DECODER) if stage.rehearse else (224, {})
    overrides = {
        "run": {"dir": str(stage.folder / f"run_{size}")},
        "data": {"source": str(jpegs), "decoder": "pillow"},
        "model": {"size": size, "image_size": [side, side], **decoder},
        "train": {"duration": "1000 steps", "global_batch": batch, "micro_batch": batch, "precision": "bf16"},
        "optim": {"warmup": "10 steps"},
        "engine": {"deepspeed": "zero1", "compile": False},
        "checkpoint": {"interval": "1000 steps"},
        "log": {"interval": 1000},
    }
    with ExitStack() as held:
        stop = held.enter_context(StopRequest())
        run = Trainer(load_config("vit_base", overrides), world, stop, Watchdog(0, 0))
        held.callback(run.engine._engine.destroy)
        held.enter_context(run.log)
        images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
        noise = torch.rand(batch, run.task.num_patches)
        if stage.device.type == "cuda":  # as the loader does
            images, noise = images.pin_memory(), noise.pin_memory()
        batches = (each for each in itertools.repeat(Batch(images, noise, None, [0] * batch, [], 0)))
        iterator = held.enter_context(BatchIterator(held.enter_context(closing(batches)), world, stop, run.step_timer))
        yield lambda: run.train_step(iterator)


def examine(step: Callable[[], object], device: torch.device, case: dict[str, Any]) -> None:
    """Time, waits with their places, and the profiler's view, each in steps of its own."""
    for _ in range(WARM_UP):
        step()
    wait(device)
    case["waits_found_by_torch"] = waits(step, device)
    case |= host_time(step, device)
    case |= summary(recorded(lambda: [step() for _ in range(STEPS)], device), STEPS)
    case["waits_per_step"] = sum(case["waits"].values())


def host_time(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of a step: on the clock, until the host is through with it, and of the CPU, in the main thread and in all."""
    passed, thread = time.perf_counter(), time.thread_time()
    for _ in range(STEPS):
        step()
    host_s, thread_s = (time.perf_counter() - passed) / STEPS, (time.thread_time() - thread) / STEPS
    wait(device)
    whole = timed(lambda: [step() for _ in range(STEPS)], device)
    return {
        "wall_s": whole["wall_s"] / STEPS,
        "host_s": host_s,
        "main_thread_cpu_s": thread_s,
        "all_threads_cpu_s": whole["cpu_s"] / STEPS,
    }


def waits(step: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Each place where one step waits for the GPU, and how often, as torch's debug mode for synchronisation finds them."""
    if device.type != "cuda":
        return []
    found: Counter[str] = Counter()

    def note(message: object, *_: object) -> None:
        if "called a synchronizing" in str(message):  # not the warning that the debug mode is a prototype
            found["".join(traceback.format_list(traceback.extract_stack()[:-1][-FRAMES:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]  # put back by catch_warnings
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [{"count": count, "stack": stack} for stack, count in found.most_common()]


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    return [_row(case) for case in result["cases"]]


def _row(case: dict[str, Any]) -> dict[str, str]:
    if "waits_per_step" not in case:
        return {"case": case["case"], "ms a step": "failed" if "error" in case else "running"}
    return {
        "case": case["case"],
        "ms a step": f"{1e3 * case['wall_s']:.1f}",
        "of the host": f"{1e3 * case['host_s']:.1f}",
        "CPU of the main thread": f"{1e3 * case['main_thread_cpu_s']:.1f}",
        "kernels": f"{1e3 * case['kernel_s']:.1f}",
        "GPU idle": f"{1e3 * case['idle_s']:.1f}",
        "launches": f"{case['launches']:.0f}",
        "operators": f"{case['operators']:.0f}",
        "waits": f"{case['waits_per_step']:g}",
        "waits found by torch": str(sum(each["count"] for each in case["waits_found_by_torch"])),
        "copies to host": f"{case['copies_to_host']:g}",
    }

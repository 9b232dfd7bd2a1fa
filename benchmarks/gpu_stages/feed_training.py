"""Training from JPEG files against training from one batch in memory, with the steps that a run of the system takes."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from statistics import median
from typing import Any

import torch
from batches import check_fallbacks, cpu_seconds

from gpu_stages.stage import Stage
from scale_mae.config import Config, load_config
from scale_mae.data.loader import Batch, Loader
from scale_mae.distributed.process_group import World, process_group
from scale_mae.distributed.signals import StopRequest
from scale_mae.metrics.step_timer import group_phases
from scale_mae.training.batch_iterator import BatchIterator, build_loader
from scale_mae.training.trainer import Trainer
from scale_mae.training.watchdog import Watchdog

MODELS = {"vit_base": 256, "vit_large": 128}  # recipe -> micro-batch
SECONDS = 2.5  # of a stretch of timed steps
SKIPPED = 5  # steps before that: batches that were decoded while nothing trained
ORDER = ("memory", "jpegs", "jpegs", "memory")


def run(stage: Stage, decoder: str) -> None:
    """A case for each model."""
    models = {"debug": 4} if stage.rehearse else MODELS
    with process_group() as world:
        if stage.rehearse:
            torch.set_num_threads(1)  # threads that wait for each other are slow on cores that others use
        for recipe, batch in models.items():
            with stage.case(f"train {recipe}", needs=2 if stage.rehearse else 30) as case:
                case.update(recipe=recipe, decoder=decoder, micro_batch=batch)
                alternate(stage, case, _config(stage, recipe, batch, decoder), world)


def _config(stage: Stage, recipe: str, batch: int, decoder: str) -> Config:
    """A recipe as it is, apart from the batch: nothing is logged and nothing is saved meanwhile."""
    return load_config(
        recipe,
        {
            "run": {"dir": str(stage.folder / recipe)},
            "data": {"source": str(stage.folder / "photos.index"), "decoder": decoder},
            "train": {"duration": "1000000 steps", "global_batch": batch, "micro_batch": batch, "precision": "bf16"},
            "engine": {"deepspeed": "zero1", "compile": not stage.rehearse},
            "log": {"interval": 1_000_000, "metrics_port": None},
        },
    )


def alternate(stage: Stage, case: dict[str, Any], config: Config, world: World) -> None:
    """Train from one batch in memory and from JPEG files in turns. Saves after each turn."""
    torch.compiler.reset()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    run = Trainer(config, world, StopRequest(), Watchdog(0, 0))
    try:
        with run.log, run.saver:
            run.loader.decoder.close()  # each stretch has its own
            batch = first_batch(run)
            stretch(run, repeated(batch), 3)  # compiles, and finds the largest buffers
            step_s = stretch(run, repeated(batch), 4)["step_s"]
            steps = max(4, round((0.2 if stage.rehearse else SECONDS) / step_s))
            case.update(steps=steps, memory=[], jpegs=[])
            for source in ORDER:
                found = stretch(run, repeated(batch), steps) if source == "memory" else from_jpegs(run, steps)
                case[source].append(found)
                stage.save()
    finally:
        run.engine._engine.destroy()
    speed = {source: median(each["images_per_s"] for each in case[source]) for source in ("memory", "jpegs")}
    case["images_per_s"] = speed
    case["loss_to_data"] = 1 - speed["jpegs"] / speed["memory"]
    case["data_loading"] = median(each["data_loading"] for each in case["jpegs"])
    if world.device.type == "cuda":
        case["peak_bytes"] = torch.cuda.max_memory_allocated(world.device)


def new_loader(run: Trainer) -> Loader:
    """Build a loader like that of the run. A loader closes its decoder, so it serves only once."""
    loader, _ = build_loader(run.config, run.world, run.index, run.rollback.plan, run.task.num_patches)
    return loader


def first_batch(run: Trainer) -> Batch:
    """A batch of the data, on the device."""
    with closing(new_loader(run).batches(0, 1)) as batches:
        batch = next(batches)
    assert batch.mask_noise is not None
    return batch._replace(images=batch.images.to(run.world.device), mask_noise=batch.mask_noise.to(run.world.device))


def repeated(batch: Batch) -> Generator[Batch, None, None]:
    while True:
        yield batch


def from_jpegs(run: Trainer, steps: int) -> dict[str, float]:
    """Steps from a loader that begins anew, because batches decoded during the steps from memory would cost nothing.

    Raises:
        RuntimeError: Pillow decoded images in place of the decoder.
    """
    loader = new_loader(run)
    found = stretch(run, loader.batches(run.step, run.step + SKIPPED + steps + 1), steps)
    check_fallbacks(loader.decoder)
    return found


def stretch(run: Trainer, batches: Generator[Batch, None, None], steps: int) -> dict[str, float]:
    """Time steps of a run. ``data_loading`` is the share of the step that the run's own metrics give to waiting for data."""
    with BatchIterator(batches, run.world, run.stop, run.step_timer) as iterator:
        for _ in range(SKIPPED):
            run.train_step(iterator)
        run.step_timer.read_steps()  # waits for the device
        began, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(steps):
            run.train_step(iterator)
        parts = [group_phases(laps) for laps in run.step_timer.read_steps()]
        wall = time.perf_counter() - began
        cores = (cpu_seconds() - cpu) / wall
    return {
        "step_s": wall / steps,
        "images_per_s": steps * run.config.train.global_batch / wall,
        "data_loading": sum(part["data_loading"] for part in parts) / sum(part["step"] for part in parts),
        "busy_cores": cores,
    }


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each model."""
    table = []
    for case in result["cases"]:
        if not case["case"].startswith("train "):
            continue
        row = {"case": case["case"], "images/s": "-", "busy cores": "-", "finding": case.get("error", "not finished")}
        if "loss_to_data" in case:
            cores = median(each["busy_cores"] for each in case["jpegs"])
            row |= {"images/s": f"{case['images_per_s']['jpegs']:.0f}", "busy cores": f"{cores:.1f}"}
            row["finding"] = (
                f"{case['decoder']}; {case['images_per_s']['memory']:.0f} images/s from memory, so {case['loss_to_data']:.1%} "
                f"is lost to data; the run's own metrics say {case['data_loading']:.1%}"
            )
        table.append(row)
    return table

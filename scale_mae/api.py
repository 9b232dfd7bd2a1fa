"""Training from Python: what the commands ``pretrain``, ``finetune`` and ``linprobe`` call."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scale_mae.config import Config, UserError, load_config
from scale_mae.distributed.launcher import get_rank_and_world_size
from scale_mae.distributed.process_group import process_group
from scale_mae.distributed.signals import StopRequest
from scale_mae.metrics.trackers import check_packages
from scale_mae.runs.exit_status import ExitStatus
from scale_mae.system.lock import exclusive_lock
from scale_mae.training.result import TrainingResult
from scale_mae.training.trainer import Trainer
from scale_mae.training.watchdog import Watchdog


def pretrain(recipe: str | Path | Config, **overrides: Any) -> TrainingResult:
    """Pre-train a masked autoencoder, or continue where the run directory's newest checkpoint stands.

    Every process of a job calls this; rank and number of processes come from torchrun or Slurm.

    Args:
        recipe: a shipped name (``demo``, ``debug``, ``vit_base``, ``vit_large``, ``vit_huge``), a YAML file, or a Config.
        overrides: sections with the keys to change, e.g. ``train={"global_batch": 256}``.

    Raises:
        UserError: anything that the caller can put right; one line.
    """
    return _train("pretrain", recipe, overrides)


def finetune(recipe: str | Path | Config, **overrides: Any) -> TrainingResult:
    """Train a classifier from an encoder's weights, or from scratch; see :func:`pretrain`.

    Args:
        recipe: such as ``finetune_base``; ``model.init_from`` names the weights.
        overrides: sections with the keys to change, e.g. ``model={"init_from": "runs/vit_base"}``.

    Raises:
        UserError: anything that the caller can put right; one line.
    """
    return _train("finetune", recipe, overrides)


def linprobe(recipe: str | Path | Config, **overrides: Any) -> TrainingResult:
    """Train a linear classifier on a frozen encoder; see :func:`pretrain`.

    Args:
        recipe: such as ``linprobe_base``; ``model.init_from`` names the weights.
        overrides: sections with the keys to change, e.g. ``classify={"lr_multipliers": [0.5, 1, 2]}``.

    Raises:
        UserError: anything that the caller can put right; one line.
    """
    return _train("linprobe", recipe, overrides)


def _train(task: str, recipe: str | Path | Config, overrides: dict[str, Any]) -> TrainingResult:
    if isinstance(recipe, Config) and overrides:
        raise UserError("overrides go with a recipe's name or file, not with a Config; use load_config(recipe, overrides)")
    config = recipe if isinstance(recipe, Config) else load_config(recipe, overrides)
    if config.run.task != task:
        raise UserError(f"run.task={config.run.task}: this recipe is for {config.run.task}, not for {task}")
    config.accumulation(get_rank_and_world_size()[1])  # what can be told before the processes meet is told before
    config.deepspeed_json()
    check_packages(config.log.trackers)
    run_dir = Path(config.run.dir)
    with StopRequest() as stop, process_group() as world, ExitStack() as held:
        notes: list[str] = []
        lock = exclusive_lock(run_dir / "run.lock", f"run.dir={run_dir} is in use", notes.append)
        world.run_on_main(lambda: held.enter_context(lock))
        exit_status = ExitStatus(run_dir)
        if world.is_main:
            held.enter_context(exit_status.recording_errors())
        watchdog = held.enter_context(Watchdog(config.run.watchdog_minutes, world.rank))
        result = Trainer(config, world, stop, watchdog, notes).train()
        if world.is_main:
            exit_status.write("finished" if result.finished else result.stopped)
        return result

"""Training from Python. The commands ``pretrain``, ``finetune`` and ``linprobe`` call these functions."""

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
    """Pre-train a masked autoencoder. If the run directory has a checkpoint, training resumes from the newest intact one.

    Call it in every process of a job. The rank and the number of processes come from torchrun or Slurm.

    Args:
        recipe: Name of a shipped recipe (``scale-mae recipes`` lists them), path of a YAML file, or a Config.
        overrides: Sections with the keys to change, such as ``train={"global_batch": 256}``.

    Raises:
        UserError: An error that the caller can correct. Its text is one line.
    """
    return _train("pretrain", recipe, overrides)


def finetune(recipe: str | Path | Config, **overrides: Any) -> TrainingResult:
    """Train a classifier, from the weights of an encoder or from scratch. It resumes as :func:`pretrain` does.

    Args:
        recipe: A recipe with ``run.task=finetune``, such as ``finetune_base``. ``model.init_from`` names the weights.
        overrides: Sections with the keys to change, such as ``model={"init_from": "runs/vit_base"}``.

    Raises:
        UserError: An error that the caller can correct. Its text is one line.
    """
    return _train("finetune", recipe, overrides)


def linprobe(recipe: str | Path | Config, **overrides: Any) -> TrainingResult:
    """Train a linear classifier on a frozen encoder. It resumes as :func:`pretrain` does.

    Args:
        recipe: A recipe with ``run.task=linprobe``, such as ``linprobe_base``. ``model.init_from`` names the weights.
        overrides: Sections with the keys to change, such as ``classify={"lr_multipliers": [0.5, 1, 2]}``.

    Raises:
        UserError: An error that the caller can correct. Its text is one line.
    """
    return _train("linprobe", recipe, overrides)


def _train(task: str, recipe: str | Path | Config, overrides: dict[str, Any]) -> TrainingResult:
    if isinstance(recipe, Config) and overrides:
        raise UserError("overrides do not work with a Config. Use load_config(recipe, overrides), or give a recipe.")
    config = recipe if isinstance(recipe, Config) else load_config(recipe, overrides)
    if config.run.task != task:
        raise UserError(
            f"run.task={config.run.task}: not a configuration for {task}. Call {config.run.task} instead of {task}."
        )
    # report errors of the configuration before the processes wait for each other
    config.accumulation(get_rank_and_world_size()[1])
    config.deepspeed_json()
    check_packages(config.log.trackers)
    run_dir = Path(config.run.dir)
    with StopRequest() as stop, process_group() as world, ExitStack() as stack:
        messages: list[str] = []
        lock = exclusive_lock(run_dir / "run.lock", f"run.dir={run_dir} is in use", messages.append)
        world.run_on_main(lambda: stack.enter_context(lock))
        exit_status = ExitStatus(run_dir)
        if world.is_main:
            stack.enter_context(exit_status.recording_errors())
        watchdog = stack.enter_context(Watchdog(config.run.watchdog_minutes, world.rank))
        result = Trainer(config, world, stop, watchdog, messages).train()
        if world.is_main:
            exit_status.write("finished" if result.finished else result.stopped)
        return result

"""Loads a checkpoint into an engine on any number of processes, with any ZeRO stage and precision.

DeepSpeed's own loader supports only the layout that wrote the checkpoint, and it unpickles arbitrary objects. Here two parts
work together. :class:`ZeroReader` returns any slice of a parameter's master weight or moments by name.
:func:`iterate_local_partitions` lists the slices that this process holds. Each process reads only its own slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.partitions import iterate_local_partitions
from scale_mae.checkpoint.zero_reader import ZeroReader

# Attributes of DeepSpeed's loss scalers. A scaler may lack some of them.
_SCALER_ATTRIBUTES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_ADVICE = "Resume with the model configuration that the checkpoint was written with."


def open_matching_checkpoint(engine: Any, folder: Path, state_keys: Sequence[str]) -> ZeroReader:
    """Open a checkpoint and check that it matches the engine's model and optimizer.

    Args:
        engine: DeepSpeed's engine.
        folder: The folder of DeepSpeed's files.
        state_keys: The optimizer's names of its states, such as ``exp_avg``.

    Raises:
        CheckpointError: The checkpoint cannot be read, or its names, shapes, step counts or optimizer states do not match.
    """
    reader = ZeroReader(folder)
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    for name, shape in shapes.items():
        if name not in reader.parameters:
            raise CheckpointError(f"{folder}: {name} is missing, but the model has it. {_ADVICE}")
        _check_shape(reader, name, shape)
    for name in reader.parameters:
        if name not in shapes:
            raise CheckpointError(f"{folder}: contains {name}, but the model does not have it. {_ADVICE}")
    for name, buffer in _iterate_stored_buffers(engine, reader):
        _check_shape(reader, name, tuple(buffer.shape))
    if "engine" not in reader.state:
        raise CheckpointError(
            f"{folder}: contains no counters, so scale_mae did not write it. A run cannot resume from it. "
            "Start a new run from its weights with model.init_from."
        )
    steps = {reader.optimizer_step(name): name for name in shapes}
    if len(steps) > 1:
        (step, name), (other_step, other_name) = list(steps.items())[:2]
        raise CheckpointError(
            f"{folder}: {name} has had {step} updates, but {other_name} has had {other_step}. Use another checkpoint."
        )
    if None not in steps:
        for key in state_keys:
            reader.flat(reader.parameters[0], key, stop=1)
    return reader


def _check_shape(reader: ZeroReader, name: str, shape: tuple[int, ...]) -> None:
    if reader.shape(name) != shape:
        raise CheckpointError(
            f"{reader.folder}: {name} has shape {list(reader.shape(name))}, but {list(shape)} in the model. {_ADVICE}"
        )


def _iterate_stored_buffers(engine: Any, reader: ZeroReader) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of the model that a checkpoint contains."""
    return ((name, buffer) for name, buffer in engine.module.named_buffers() if name in reader)


@torch.no_grad()
def load_local_partitions(engine: Any, reader: ZeroReader, rank: int, state_keys: Sequence[str]) -> None:
    """Load this process's master weights, optimizer states, buffers and counters from a checkpoint.

    Only the slices that this process holds are read, one tensor at a time. This function waits for no other process. When it
    has succeeded on all processes, call :func:`scale_mae.checkpoint.partitions.copy_masters_to_model`.

    Args:
        engine: DeepSpeed's engine. Its padding must be zero, and stays zero.
        reader: The result of :func:`open_matching_checkpoint`.
        rank: Rank of this process.
        state_keys: The optimizer's names of its states.
    """
    step = reader.optimizer_step(reader.parameters[0])
    states = engine.basic_optimizer.state
    states.clear()
    for partition, slices in iterate_local_partitions(engine, rank):
        targets = {"fp32": partition.detach()}
        if step is not None:  # there are no states before the first update
            targets |= {key: torch.zeros_like(targets["fp32"]) for key in state_keys}
            # fused AdamW and LARS keep the step count on the device of the parameter
            count = torch.tensor(step, dtype=torch.float32, device=partition.device)
            states[partition] = {"step": count} | {key: targets[key] for key in state_keys}
        for part in slices:
            for key, target in targets.items():
                part.view(target).copy_(reader.flat(part.name, key, part.start, part.stop))
            reader.release()
    for name, buffer in _iterate_stored_buffers(engine, reader):
        buffer.copy_(reader[name])
    _restore_counters(engine, reader.state["engine"])


def read_counters(engine: Any) -> dict[str, Any]:
    """Return DeepSpeed's counters and the state of its loss scaler as plain numbers. All ZeRO stages use the same keys."""
    scaler = _get_loss_scaler(engine)
    return {
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "loss_scaler": {name: getattr(scaler, name) for name in _SCALER_ATTRIBUTES if hasattr(scaler, name)},
    }


def _restore_counters(engine: Any, counters: dict[str, Any]) -> None:
    engine.global_steps, engine.skipped_steps = counters["global_steps"], counters["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    scaler = _get_loss_scaler(engine)
    for name, value in counters["loss_scaler"].items():
        if hasattr(scaler, name):  # another ZeRO stage may have a scaler without hysteresis
            setattr(scaler, name, value)


def _get_loss_scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", getattr(engine.optimizer, "loss_scale_config", None))

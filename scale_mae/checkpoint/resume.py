"""Resuming: each process fills its own part of the states, whatever processes and ZeRO stage wrote the checkpoint.

DeepSpeed's own loader knows the layout it wrote and no other, and runs what the pickles tell it to. Here two lists meet: the
reader gives any slice of a parameter's master or moments by name, and :func:`holdings` says which slices this process holds and
where. What DeepSpeed keeps to itself is known here alone:

    stage 0     a tensor a parameter; for bf16 and fp16 a master beside it
    stage 1, 2  parameters of a group laid end to end, padded, cut in equal parts, a part a process
    stage 3     every parameter padded, cut in equal parts, a part a process; the parts laid end to end in sub-groups
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_mae.checkpoint.store import CheckpointError
from scale_mae.checkpoint.zero_reader import ZeroReader

_EXCHANGED_AT_ONCE = 2**24  # values
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's loss scalers, where they have them


@dataclass(frozen=True)
class Slice:
    """Values of a parameter that a process holds.

    Attributes:
        name: of the parameter.
        start: first value, of the flattened parameter.
        stop: one past the last value.
        offset: where they begin in the flattened tensor that holds them.
    """

    name: str
    start: int
    stop: int
    offset: int

    def of(self, holder: Tensor) -> Tensor:
        """Their place in a tensor laid out like the one that holds them: a view."""
        return holder.detach().view(-1).narrow(0, self.offset, self.stop - self.start)


def holdings(engine: Any, rank: int) -> Iterator[tuple[Tensor, list[Slice]]]:
    """The fp32 tensors that a process's optimizer updates, and what they hold; values in no slice are padding.

    Args:
        engine: DeepSpeed's.
        rank: of the process.
    """
    optimizer, names, stage = engine.optimizer, engine.param_names, engine.zero_optimization_stage()
    if stage == 3:
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            sizes = [p.partition_numel() for p in group]
            cuts = [(names[p], size * rank, min(size * (rank + 1), p.ds_numel)) for p, size in zip(group, sizes, strict=True)]
            offsets = [0, *accumulate(sizes)][:-1]
            yield flat, [Slice(*cut, offset) for cut, offset in zip(cuts, offsets, strict=True) if cut[1] < cut[2]]
    elif stage:
        for group, offsets, flat in _partitions(optimizer):
            first, last = rank * flat.numel(), (rank + 1) * flat.numel()
            held = []
            for p, offset in zip(group, offsets, strict=True):
                begin, end = max(offset, first), min(offset + p.numel(), last)
                if begin < end:
                    held.append(Slice(names[p], begin - offset, end - offset, begin - first))
            yield flat, held
    else:
        groups = [group["params"] for group in engine.basic_optimizer.param_groups]
        for group, masters in zip(getattr(optimizer, "fp16_groups", groups), groups, strict=True):
            for p, master in zip(group, masters, strict=True):
                yield master, [Slice(names[p], 0, p.numel(), 0)]


def _partitions(optimizer: Any) -> Iterator[tuple[list[Any], list[int], Tensor]]:
    """Of ZeRO-1 and 2, by group: parameters in the order they lie in, where each begins, this process's part of the masters."""
    if hasattr(optimizer, "bf16_groups"):  # ZeRO-1 that adds bf16 gradients up in fp32
        for group, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True):
            yield group, [0, *accumulate(p.numel() for p in group)][:-1], flat
    else:
        yield from zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.single_partition_of_fp32_groups,
            strict=True,
        )


@torch.no_grad()
def clear_padding(engine: Any, rank: int) -> None:
    """Set to zero what belongs to no parameter. Under ZeRO-3 DeepSpeed leaves there whatever the memory held, NaN for instance.

    Args:
        engine: DeepSpeed's.
        rank: of the process.
    """
    for holder, held in holdings(engine, rank):
        values, begin = holder.detach().view(-1), 0
        for part in held:
            values[begin : part.offset].zero_()
            begin = part.offset + part.stop - part.start
        values[begin:].zero_()
    if engine.zero_optimization_stage() == 3:
        _round(engine.optimizer)


def _round(optimizer: Any) -> None:
    """ZeRO-3's 16-bit parts from its masters."""
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)


def open_for(engine: Any, folder: Path, keys: Sequence[str]) -> ZeroReader:
    """A checkpoint that fits the model and its optimizer.

    Args:
        engine: DeepSpeed's.
        folder: of DeepSpeed's files.
        keys: the optimizer's names of what it keeps beside each master.

    Raises:
        CheckpointError: it cannot be read, or names, shapes, step counts or the optimizer's states do not fit.
    """
    reader = ZeroReader(folder)
    shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()}
    for name, shape in shapes.items():
        if name not in reader.parameters:
            raise CheckpointError(f"{folder}: holds no {name}, which the model has")
        _same_shape(reader, name, shape)
    for name in reader.parameters:
        if name not in shapes:
            raise CheckpointError(f"{folder}: holds {name}, which the model lacks")
    for name, buffer in _buffers(engine, reader):
        _same_shape(reader, name, tuple(buffer.shape))
    if "engine" not in reader.state:
        raise CheckpointError(f"{folder}: holds no counters, so it was not written by a run and cannot be resumed")
    steps = {reader.optimizer_step(name): name for name in shapes}
    if len(steps) > 1:
        (one, name), (other, another) = list(steps.items())[:2]
        raise CheckpointError(f"{folder}: {name} has had {one} updates, {another} {other}; it is not of one run")
    if None not in steps:
        for key in keys:
            reader.flat(reader.parameters[0], key, stop=1)
    return reader


def _same_shape(reader: ZeroReader, name: str, shape: tuple[int, ...]) -> None:
    if reader.shape(name) != shape:
        raise CheckpointError(f"{reader.folder}: {name} is {list(reader.shape(name))}, the model's is {list(shape)}")


def _buffers(engine: Any, reader: ZeroReader) -> Iterator[tuple[str, Tensor]]:
    """Those that are stored at all."""
    return ((name, buffer) for name, buffer in engine.module.named_buffers() if name in reader)


@torch.no_grad()
def fill(engine: Any, reader: ZeroReader, rank: int, keys: Sequence[str]) -> None:
    """Give this process's masters, moments, step counts, buffers and counters the values of a checkpoint.

    Only the slices that it holds are read, one tensor's at a time. No process waits for another; :func:`publish` does, and must
    follow when all have come through.

    Args:
        engine: DeepSpeed's; padding is zero, and stays so.
        reader: from :func:`open_for`.
        rank: of the process.
        keys: as there.
    """
    step = reader.optimizer_step(reader.parameters[0])
    states = engine.basic_optimizer.state
    states.clear()
    for holder, held in holdings(engine, rank):
        targets = {"fp32": holder.detach()}
        if step is not None:  # moments begin to exist with the first update
            targets |= {key: torch.zeros_like(targets["fp32"]) for key in keys}
            # fused AdamW and LARS count on the device of the parameter
            count = torch.tensor(step, dtype=torch.float32, device=holder.device)
            states[holder] = {"step": count} | {key: targets[key] for key in keys}
        for part in held:
            for key, target in targets.items():
                part.of(target).copy_(reader.flat(part.name, key, part.start, part.stop))
            reader.release()
    for name, buffer in _buffers(engine, reader):
        buffer.copy_(reader[name])
    _set_counters(engine, reader.state["engine"])


@torch.no_grad()
def publish(engine: Any, rank: int) -> None:
    """Make the model's weights those of the masters. All processes call it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # gives up what was gathered
        _round(optimizer)
        optimizer.checkpoint_event_epilogue()  # gathers what is small enough to stay whole
    elif stage:
        optimizer._hp_optimizer_states_linked = False  # to moments that are no more
        weights = getattr(optimizer, "bf16_partitioned_groups", None) or optimizer.parallel_partitioned_bit16_groups
        for parts, (_, _, masters) in zip(weights, _partitions(optimizer), strict=True):
            parts[rank].copy_(masters)
            for source, part in enumerate(parts):
                # in place; gloo's all-gather, which DeepSpeed uses, takes the memory of the whole group besides
                dist.broadcast(part, source)
    elif hasattr(optimizer, "fp32_groups"):
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for p, master in zip(group, masters, strict=True):
                p.copy_(master)


@torch.no_grad()
def exchange(engine: Any, rank: int, key: str) -> None:
    """Let masters and one of the optimizer's states change places, and publish; twice changes nothing. All processes call it.

    Args:
        engine: DeepSpeed's.
        rank: of the process.
        key: the optimizer's name of the state; before the first update there is none, and nothing changes.
    """
    states = engine.basic_optimizer.state
    for holder, _ in holdings(engine, rank):
        if holder in states:
            flat = [t.detach().view(-1).split(_EXCHANGED_AT_ONCE) for t in (holder, states[holder][key])]
            for one, other in zip(*flat, strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
    publish(engine, rank)


def counters(engine: Any) -> dict[str, Any]:
    """What DeepSpeed counts, and its loss scaler, in plain numbers, the same at every stage."""
    scaler = _scaler(engine)
    return {
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "loss_scaler": {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)},
    }


def _set_counters(engine: Any, saved: dict[str, Any]) -> None:
    engine.global_steps, engine.skipped_steps = saved["global_steps"], saved["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    for name, value in saved["loss_scaler"].items():
        if hasattr(_scaler(engine), name):  # hysteresis is ZeRO's alone
            setattr(_scaler(engine), name, value)


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", getattr(engine.optimizer, "loss_scale_config", None))

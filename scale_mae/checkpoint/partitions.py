"""DeepSpeed's partitions in memory: which values of which parameters this process's optimizer holds, and where.

DeepSpeed has no public interface for this, and every ZeRO stage has a layout of its own. Only this file knows them:

    stage 0     One tensor for each parameter. With bf16 and fp16 there is an fp32 master copy as well.
    stage 1, 2  The parameters of a group are concatenated and padded. Each process holds an equal part of the result.
    stage 3     Each parameter is padded and split into equal parts, one for each process. A process concatenates its parts in
                sub-groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SWAP_BLOCK = 2**24  # values that are swapped at once


@dataclass(frozen=True)
class Slice:
    """A range of a parameter's values that this process holds in a partition.

    Attributes:
        name: Name of the parameter.
        start: First value, as an index into the flattened parameter.
        stop: One past the last value.
        offset: Position of the first value in the flattened partition.
    """

    name: str
    start: int
    stop: int
    offset: int

    def view(self, partition: Tensor) -> Tensor:
        """Return a view of these values in a partition, or in a tensor with the same layout."""
        return partition.detach().view(-1).narrow(0, self.offset, self.stop - self.start)


def iterate_local_partitions(engine: Any, rank: int) -> Iterator[tuple[Tensor, list[Slice]]]:
    """Yield each fp32 tensor that this process's optimizer updates, with its contents. Values in no slice are padding.

    Args:
        engine: DeepSpeed's engine.
        rank: Rank of this process.
    """
    optimizer, names, stage = engine.optimizer, engine.param_names, engine.zero_optimization_stage()
    if stage == 3:
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            sizes = [p.partition_numel() for p in group]
            offsets = [0, *accumulate(sizes)][:-1]
            slices = [
                Slice(names[p], size * rank, min(size * (rank + 1), p.ds_numel), offset)
                for p, size, offset in zip(group, sizes, offsets, strict=True)
            ]
            yield flat, [part for part in slices if part.start < part.stop]
    elif stage:
        for group, offsets, flat in _iterate_groups_of_stage_1_and_2(optimizer):
            first, last = rank * flat.numel(), (rank + 1) * flat.numel()
            slices = []
            for p, offset in zip(group, offsets, strict=True):
                begin, end = max(offset, first), min(offset + p.numel(), last)
                if begin < end:
                    slices.append(Slice(names[p], begin - offset, end - offset, begin - first))
            yield flat, slices
    else:
        groups = [group["params"] for group in engine.basic_optimizer.param_groups]
        for group, masters in zip(getattr(optimizer, "fp16_groups", groups), groups, strict=True):
            for p, master in zip(group, masters, strict=True):
                yield master, [Slice(names[p], 0, p.numel(), 0)]


def _iterate_groups_of_stage_1_and_2(optimizer: Any) -> Iterator[tuple[list[Any], list[int], Tensor]]:
    """Yield each group's parameters in their order, their offsets in the group, and this process's part of the masters."""
    if hasattr(optimizer, "bf16_groups"):  # stage 1 with bf16 and fp32 gradient accumulation
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
    """Set the padding of all partitions to zero. With ZeRO-3, DeepSpeed leaves it uninitialized, so it can be NaN.

    Args:
        engine: DeepSpeed's engine.
        rank: Rank of this process.
    """
    for partition, slices in iterate_local_partitions(engine, rank):
        values, begin = partition.detach().view(-1), 0
        for part in slices:
            values[begin : part.offset].zero_()
            begin = part.offset + part.stop - part.start
        values[begin:].zero_()
    if engine.zero_optimization_stage() == 3:
        _copy_masters_of_stage_3(engine.optimizer)


@torch.no_grad()
def copy_masters_to_model(engine: Any, rank: int) -> None:
    """Set the model's weights to the fp32 master weights, rounded to the model's dtype. All processes call this.

    Args:
        engine: DeepSpeed's engine.
        rank: Rank of this process.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # partitions the parameters that are gathered
        _copy_masters_of_stage_3(optimizer)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that DeepSpeed keeps whole
    elif stage:
        optimizer._hp_optimizer_states_linked = False  # the links point to moments that no longer exist
        weights = getattr(optimizer, "bf16_partitioned_groups", None) or optimizer.parallel_partitioned_bit16_groups
        for parts, (_, _, masters) in zip(weights, _iterate_groups_of_stage_1_and_2(optimizer), strict=True):
            parts[rank].copy_(masters)
            for source, part in enumerate(parts):
                # broadcast works in place; DeepSpeed's all-gather would need another copy of the group under gloo
                dist.broadcast(part, source)
    elif hasattr(optimizer, "fp32_groups"):
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for p, master in zip(group, masters, strict=True):
                p.copy_(master)


def _copy_masters_of_stage_3(optimizer: Any) -> None:
    """Set this process's part of the model's weights to its master weights under ZeRO-3."""
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)


@torch.no_grad()
def swap_masters_with_state(engine: Any, rank: int, key: str) -> None:
    """Swap the master weights with an optimizer state in place, and update the model. A second call undoes the first.

    All processes call this. Before the first update there is no state, and the weights stay as they are.

    Args:
        engine: DeepSpeed's engine.
        rank: Rank of this process.
        key: The optimizer's name of the state, for instance that of the EMA.
    """
    states = engine.basic_optimizer.state
    for partition, _ in iterate_local_partitions(engine, rank):
        if partition in states:
            weights, values = partition.detach().view(-1), states[partition][key].detach().view(-1)
            for weight_block, value_block in zip(
                torch.split(weights, _SWAP_BLOCK), torch.split(values, _SWAP_BLOCK), strict=True
            ):
                copy = weight_block.clone()
                weight_block.copy_(value_block)
                value_block.copy_(copy)
    copy_masters_to_model(engine, rank)

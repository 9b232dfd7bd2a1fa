"""Where a parameter's values lie in the files of a ZeRO checkpoint.

    stage 0     model_states: the module; for bf16 and fp16 the masters are in its ``optimizer``, a tensor a parameter
    stage 1, 2  optim_states: a vector a parameter group, cut in equal parts, a part a process; ``param_shapes`` gives the order
    stage 3     optim_states: a vector a sub-group, in every process's file: each parameter is cut in equal parts, padded

Stages 1 and 2 also write ``param_slice_mappings``. They are not used: with ``round_robin_gradients`` DeepSpeed 0.19.8 computes
them for another order than that in which the values lie.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_mae.checkpoint.store import CheckpointError
from scale_mae.checkpoint.zero_files import ZeroFiles


class Piece(NamedTuple):
    """A stretch of a parameter's values: ``vector[start : start + size]`` of a group, in the file of a rank."""

    rank: int
    group: int
    start: int
    size: int


class Layout:
    """Parameters with fp32 masters, and the vectors in which their masters and moments lie.

    Attributes:
        shapes: of these parameters, each by one of its names.
        groups: vectors in each file.
    """

    def __init__(self, files: ZeroFiles, folder: Path, groups: int) -> None:
        self.files, self.folder, self.groups = files, folder, groups
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._starts: dict[str, tuple[int, int]] = {}  # group, and where in it

    def pieces(self, name: str) -> Iterator[Piece]:
        """The stretches of a parameter, in the order of its values."""
        raise NotImplementedError

    def master(self, rank: int, group: int) -> Tensor:
        """A vector of masters; a tensor of any shape under stage 0."""
        raise NotImplementedError

    def _base(self, rank: int) -> Any:
        """The state of the optimizer that DeepSpeed wraps."""
        raise NotImplementedError

    def settings(self) -> list[dict[str, Any]]:
        """The optimizer's groups; none where DeepSpeed wrote with "elastic_checkpoint"."""
        base = self._base(0)
        return [] if isinstance(base, list) else list(base.get("param_groups", []))

    def state(self, rank: int, group: int) -> dict[str, Any]:
        """The optimizer's state of a vector: ``step``, ``exp_avg``, ...; empty before its first update."""
        base = self._base(rank)
        if isinstance(base, list):  # written with "elastic_checkpoint"
            return dict(base[group])
        state = dict(base.get("state", {}).get(group, {}))
        if state and "step" not in state:  # some optimizers count by group
            state["step"] = next((g.get("step") for g in base["param_groups"] if group in g["params"]), None)
        return state


class Partitioned(Layout):
    """Stages 1 and 2."""

    def __init__(self, files: ZeroFiles, folder: Path) -> None:
        groups = files.models[0]["param_shapes"]
        super().__init__(files, folder, len(groups))
        gaps = files.optims[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        self._parts = []  # values in each process's part, by group
        for group, shapes in enumerate(groups):
            start = end = 0
            for (name, shape), gap in zip(shapes.items(), gaps[group], strict=True):
                self.shapes[name], self._starts[name] = tuple(shape), (group, start)
                end = start + math.prod(shape)
                start = end + gap
            self._parts.append(self._part(group, end))

    def _part(self, group: int, end: int) -> int:
        """Values in each process's part of a group of ``end`` values; the last ends with padding."""
        held = [self.master(rank, group).numel() for rank in range(self.files.world_size)]
        trimmed = "zero_stage" in self.files.optims[0]  # DeepSpeed's BF16_Optimizer saves the padding as well
        paddings = [optim["group_paddings"][group] if trimmed else 0 for optim in self.files.optims]
        parts = {size + padding for size, padding in zip(held, paddings, strict=True)}
        if len(parts) != 1 or sum(held) < end or (trimmed and sum(held) != end):
            raise CheckpointError(f"{self.folder}: group {group} has {end} values, its parts hold {held}: different saves")
        return parts.pop()

    def pieces(self, name: str) -> Iterator[Piece]:
        """See :meth:`Layout.pieces`."""
        group, start = self._starts[name]
        end, part = start + math.prod(self.shapes[name]), self._parts[group]
        while start < end:
            rank, offset = divmod(start, part)
            size = min(part - offset, end - start)
            yield Piece(rank, group, offset, size)
            start += size

    def master(self, rank: int, group: int) -> Tensor:
        """See :meth:`Layout.master`."""
        vector: Tensor = self.files.optims[rank]["single_partition_of_fp32_groups"][group]
        return vector

    def _base(self, rank: int) -> Any:
        return self.files.optims[rank]["base_optimizer_state"]


class Cut(Layout):
    """Stage 3."""

    def __init__(self, files: ZeroFiles, folder: Path) -> None:
        groups = files.models[0]["param_shapes"]
        super().__init__(files, folder, len(groups))
        for group, shapes in enumerate(groups):
            start = 0
            for name, shape in shapes.items():
                self.shapes[name], self._starts[name] = tuple(shape), (group, start)
                start += -(-math.prod(shape) // files.world_size)
            for rank in range(files.world_size):
                held = self.master(rank, group).numel()
                if held != start:
                    why = "different saves, or states left on another disk (NVMe)"
                    raise CheckpointError(f"{folder}: rank {rank} holds {held} of {start} values of sub-group {group}: {why}")

    def pieces(self, name: str) -> Iterator[Piece]:
        """See :meth:`Layout.pieces`."""
        group, start = self._starts[name]
        size = math.prod(self.shapes[name])
        part = -(-size // self.files.world_size)
        for rank in range(-(-size // part)):
            yield Piece(rank, group, start, min(part, size - rank * part))

    def master(self, rank: int, group: int) -> Tensor:
        """See :meth:`Layout.master`."""
        vector: Tensor = self.files.optims[rank]["fp32_flat_groups"][group]
        return vector

    def _base(self, rank: int) -> Any:
        return self.files.optims[rank]["optimizer_state_dict"]


class Unsharded(Layout):
    """Stage 0, where DeepSpeed writes no names: ours are told by our own state, a stranger's are found.

    bf16 and fp16 masters are recognised by the module's weights, which are the same values, rounded. In fp32 the module's
    weights are the masters; whose the optimizer's states are is known if it has one group, which holds all parameters.

    Args:
        module: the module's parameters, each by one name.
    """

    def __init__(self, files: ZeroFiles, folder: Path, module: dict[str, Tensor]) -> None:
        optimizer = files.models[0]["optimizer"] or {}
        if "fp32_groups_flat" in optimizer:
            raise CheckpointError(f"{folder}: stage 0 with a fused 16-bit optimizer, a layout that is not supported")
        groups = optimizer.get("fp32_groups")
        self._optimizer = optimizer["optimizer_state_dict"] if groups else optimizer
        ours = (files.models[0].get("scale_mae") or {}).get("parameter_groups")
        names: list[str] = [name for group in ours or [] for name in group]
        if groups:
            self._masters: list[Tensor] = [master for group in groups for master in group]
            names = names or _recognised(groups, module, folder)
        else:
            names = names or self._in_order(module)
            self._masters = [module[name] for name in names]
        super().__init__(files, folder, len(names))
        # in fp32 frozen ones are among them, which never have a state
        with_state = (not groups and self._optimizer.get("state")) or range(len(names))
        for group, (name, master) in enumerate(zip(names, self._masters, strict=True)):
            if group in with_state:
                self.shapes[name], self._starts[name] = tuple(master.shape), (group, 0)

    def _in_order(self, module: dict[str, Tensor]) -> list[str]:
        groups, state = self._optimizer.get("param_groups", []), self._optimizer.get("state", {})
        moments = [state.get(group, {}).get("exp_avg", weight) for group, weight in enumerate(module.values())]
        alike = all(moment.shape == weight.shape for moment, weight in zip(moments, module.values(), strict=True))
        return list(module) if alike and len(groups) == 1 and len(groups[0]["params"]) == len(module) else []

    def pieces(self, name: str) -> Iterator[Piece]:
        """See :meth:`Layout.pieces`."""
        yield Piece(0, *self._starts[name], math.prod(self.shapes[name]))

    def master(self, rank: int, group: int) -> Tensor:
        """See :meth:`Layout.master`."""
        return self._masters[group]

    def _base(self, rank: int) -> Any:
        return self._optimizer


def _recognised(groups: list[list[Tensor]], module: dict[str, Tensor], folder: Path) -> list[str]:
    """Names of masters. Where weights are alike, those of one group are taken to be in the module's order."""

    def key(tensor: Tensor) -> tuple[Any, ...]:
        return *tensor.shape, *tensor.detach().reshape(-1)[:1024].tolist()

    names_of = defaultdict(list)
    for name, weight in module.items():
        names_of[key(weight)].append(name)
    dtype = next((weight.dtype for weight in module.values() if weight.dtype != torch.float32), torch.float32)
    keys = [[key(master.to(dtype)) for master in group] for group in groups]
    owners = defaultdict(set)  # groups that hold masters of a key
    for group, of_group in enumerate(keys):
        for one in of_group:
            owners[one].add(group)
    names = []
    for of_group in keys:
        for one in of_group:
            left = names_of[one]
            if not left or (len(owners[one]) > 1 and len(left) > 1):
                raise CheckpointError(f"{folder}: stage 0 does not tell names, and its masters cannot be told by their values")
            names.append(left.pop(0))
    return names

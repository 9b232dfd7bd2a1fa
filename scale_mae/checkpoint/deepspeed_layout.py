"""DeepSpeed's checkpoint layout: where the values of a parameter are in the files of a ZeRO checkpoint.

    stage 0     model_states: the module. With bf16 and fp16, its ``optimizer`` contains one fp32 master for each parameter.
    stage 1, 2  optim_states: one flat tensor for each parameter group, split into equal parts, one in each process's file.
                ``param_shapes`` states the order of the parameters.
    stage 3     optim_states: one flat tensor for each sub-group in every process's file. Each parameter is padded and split
                into equal parts, one for each process.

Stages 1 and 2 also write ``param_slice_mappings``. They are not used: with ``round_robin_gradients``, DeepSpeed 0.19.8 computes
them for another order than that of the values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_mae.checkpoint.deepspeed_files import MIXED_SAVES, DeepSpeedFiles
from scale_mae.checkpoint.errors import CheckpointError

_COMPARED_VALUES = 1024  # values of a tensor that identify it under stage 0


class Fragment(NamedTuple):
    """A range of a parameter's values: ``flat[start : start + size]``, where ``flat`` is the tensor of a group and rank."""

    rank: int
    group: int
    start: int
    size: int


class Layout:
    """The parameters with fp32 master weights, and the flat tensors that contain their masters and optimizer states.

    Attributes:
        shapes: Shape of each of these parameters. A tied parameter has one of its names.
        group_count: Number of flat tensors in each file.
    """

    def __init__(self, files: DeepSpeedFiles, folder: Path, group_count: int) -> None:
        self.files, self.folder, self.group_count = files, folder, group_count
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._starts: dict[str, tuple[int, int]] = {}  # (group, first value in the group) of each parameter

    def fragments(self, name: str) -> Iterator[Fragment]:
        """Yield the fragments of a parameter in the order of its values."""
        raise NotImplementedError

    def masters(self, rank: int, group: int) -> Tensor:
        """Return a rank's tensor of the master weights of a group. Under stage 0 it has the shape of its parameter."""
        raise NotImplementedError

    def _base_state(self, rank: int) -> Any:
        """Return the state dict of the optimizer that DeepSpeed wraps."""
        raise NotImplementedError

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups. DeepSpeed does not store them with ``elastic_checkpoint``."""
        base_state = self._base_state(0)
        return [] if isinstance(base_state, list) else list(base_state.get("param_groups", []))

    def optimizer_state(self, rank: int, group: int) -> dict[str, Any]:
        """Return the optimizer's state of a group: ``step``, ``exp_avg``, ... It is empty before the first update."""
        base_state = self._base_state(rank)
        if isinstance(base_state, list):  # written with elastic_checkpoint
            return dict(base_state[group])
        state = dict(base_state.get("state", {}).get(group, {}))
        if state and "step" not in state:  # some optimizers store the step in the parameter group
            state["step"] = next((g.get("step") for g in base_state["param_groups"] if group in g["params"]), None)
        return state


class Stage12Layout(Layout):
    """The layout of ZeRO stages 1 and 2."""

    def __init__(self, files: DeepSpeedFiles, folder: Path) -> None:
        groups = files.models[0]["param_shapes"]
        super().__init__(files, folder, len(groups))
        paddings = files.optimizers[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        self._part_sizes = []  # size of each process's part, by group
        for group, shapes in enumerate(groups):
            start = end = 0
            for (name, shape), padding in zip(shapes.items(), paddings[group], strict=True):
                self.shapes[name], self._starts[name] = tuple(shape), (group, start)
                end = start + math.prod(shape)
                start = end + padding
            self._part_sizes.append(self._compute_part_size(group, end))

    def _compute_part_size(self, group: int, end: int) -> int:
        """Return the size of each process's part of a group with ``end`` values, including the padding after the last value."""
        stored = [self.masters(rank, group).numel() for rank in range(self.files.world_size)]
        is_trimmed = "zero_stage" in self.files.optimizers[0]  # BF16_Optimizer of DeepSpeed stores the padding as well
        paddings = [optimizer["group_paddings"][group] if is_trimmed else 0 for optimizer in self.files.optimizers]
        sizes = {size + padding for size, padding in zip(stored, paddings, strict=True)}
        if len(sizes) != 1 or sum(stored) < end or (is_trimmed and sum(stored) != end):
            raise CheckpointError(f"{self.folder}: group {group} has {end} values, but the ranks store {stored}. {MIXED_SAVES}")
        return sizes.pop()

    def fragments(self, name: str) -> Iterator[Fragment]:
        """See :meth:`Layout.fragments`."""
        group, start = self._starts[name]
        end, part_size = start + math.prod(self.shapes[name]), self._part_sizes[group]
        while start < end:
            rank, offset = divmod(start, part_size)
            size = min(part_size - offset, end - start)
            yield Fragment(rank, group, offset, size)
            start += size

    def masters(self, rank: int, group: int) -> Tensor:
        """See :meth:`Layout.masters`."""
        flat: Tensor = self.files.optimizers[rank]["single_partition_of_fp32_groups"][group]
        return flat

    def _base_state(self, rank: int) -> Any:
        return self.files.optimizers[rank]["base_optimizer_state"]


class Stage3Layout(Layout):
    """The layout of ZeRO stage 3."""

    def __init__(self, files: DeepSpeedFiles, folder: Path) -> None:
        groups = files.models[0]["param_shapes"]
        super().__init__(files, folder, len(groups))
        for group, shapes in enumerate(groups):
            start = 0
            for name, shape in shapes.items():
                self.shapes[name], self._starts[name] = tuple(shape), (group, start)
                start += -(-math.prod(shape) // files.world_size)
            for rank in range(files.world_size):
                stored = self.masters(rank, group).numel()
                if stored != start:
                    raise CheckpointError(
                        f"{folder}: rank {rank} stores {stored} of {start} values of sub-group {group}. "
                        f"The files are from different saves, or DeepSpeed stored states on another disk (NVMe offload)."
                    )

    def fragments(self, name: str) -> Iterator[Fragment]:
        """See :meth:`Layout.fragments`."""
        group, start = self._starts[name]
        size = math.prod(self.shapes[name])
        part_size = -(-size // self.files.world_size)
        for rank in range(-(-size // part_size)):
            yield Fragment(rank, group, start, min(part_size, size - rank * part_size))

    def masters(self, rank: int, group: int) -> Tensor:
        """See :meth:`Layout.masters`."""
        flat: Tensor = self.files.optimizers[rank]["fp32_flat_groups"][group]
        return flat

    def _base_state(self, rank: int) -> Any:
        return self.files.optimizers[rank]["optimizer_state_dict"]


class Stage0Layout(Layout):
    """The layout without ZeRO. DeepSpeed stores no parameter names here; each parameter is a group of its own.

    The engine of scale_mae stores the names itself. For other checkpoints they are inferred:

    - With bf16 and fp16, a master belongs to the parameter whose weights equal the rounded master.
    - With fp32, the module's weights are the masters. The owners of the optimizer states are known only if the optimizer has a
      single group with all parameters.

    Args:
        files: The files of the checkpoint.
        folder: The folder of the files.
        module: The parameters of the module. A tied parameter appears under one name.
    """

    def __init__(self, files: DeepSpeedFiles, folder: Path, module: dict[str, Tensor]) -> None:
        optimizer = files.models[0]["optimizer"] or {}
        if "fp32_groups_flat" in optimizer:
            raise CheckpointError(f"{folder}: written by a fused 16-bit optimizer without ZeRO, which is not supported.")
        groups = optimizer.get("fp32_groups")
        self._optimizer = optimizer["optimizer_state_dict"] if groups else optimizer
        stored_names = (files.models[0].get("scale_mae") or {}).get("parameter_groups")
        names: list[str] = [name for group in stored_names or [] for name in group]
        if groups:
            self._masters: list[Tensor] = [master for group in groups for master in group]
            names = names or _match_names_by_value(groups, module, folder)
        else:
            names = names or self._take_names_in_order(module)
            self._masters = [module[name] for name in names]
        super().__init__(files, folder, len(names))
        # with fp32, frozen parameters are in the list as well; they never have a state
        trained_groups = (not groups and self._optimizer.get("state")) or range(len(names))
        for group, (name, master) in enumerate(zip(names, self._masters, strict=True)):
            if group in trained_groups:
                self.shapes[name], self._starts[name] = tuple(master.shape), (group, 0)

    def _take_names_in_order(self, module: dict[str, Tensor]) -> list[str]:
        """Return the module's names if the optimizer has a single group with all parameters, else nothing."""
        groups, state = self._optimizer.get("param_groups", []), self._optimizer.get("state", {})
        moments = [state.get(group, {}).get("exp_avg", weight) for group, weight in enumerate(module.values())]
        shapes_match = all(moment.shape == weight.shape for moment, weight in zip(moments, module.values(), strict=True))
        return list(module) if shapes_match and len(groups) == 1 and len(groups[0]["params"]) == len(module) else []

    def fragments(self, name: str) -> Iterator[Fragment]:
        """See :meth:`Layout.fragments`."""
        yield Fragment(0, *self._starts[name], math.prod(self.shapes[name]))

    def masters(self, rank: int, group: int) -> Tensor:
        """See :meth:`Layout.masters`."""
        return self._masters[group]

    def _base_state(self, rank: int) -> Any:
        return self._optimizer


def _match_names_by_value(groups: list[list[Tensor]], module: dict[str, Tensor], folder: Path) -> list[str]:
    """Return the names of master weights, found by their values.

    If several parameters have equal weights, their masters must be in one group. They are then in the order of the module.
    """

    def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
        return *tensor.shape, *tensor.detach().reshape(-1)[:_COMPARED_VALUES].tolist()

    candidates = defaultdict(list)  # names of the parameters with a fingerprint
    for name, weight in module.items():
        candidates[fingerprint(weight)].append(name)
    dtype = next((weight.dtype for weight in module.values() if weight.dtype != torch.float32), torch.float32)
    fingerprints = [[fingerprint(master.to(dtype)) for master in group] for group in groups]
    owners = defaultdict(set)  # groups that contain a master with a fingerprint
    for group, group_fingerprints in enumerate(fingerprints):
        for key in group_fingerprints:
            owners[key].add(group)
    names = []
    for group_fingerprints in fingerprints:
        for key in group_fingerprints:
            unassigned = candidates[key]
            if not unassigned or (len(owners[key]) > 1 and len(unassigned) > 1):
                raise CheckpointError(
                    f"{folder}: without ZeRO, DeepSpeed stores no parameter names, and the values do not identify the "
                    "parameters. Save the checkpoint with ZeRO stage 1, 2 or 3."
                )
            names.append(unassigned.pop(0))
    return names

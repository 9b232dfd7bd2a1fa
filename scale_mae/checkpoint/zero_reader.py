"""A lazy view of the weights in any ZeRO checkpoint: full-precision tensors by name, one at a time.

DeepSpeed keeps fp32 master weights in flat partitions, one file a process. They are memory-mapped here and only the slices of
the tensor asked for are read. Pickles are opened with torch's restricted loader and the few DeepSpeed classes they name.

    stage 0     model_states: the module; for bf16 and fp16 the masters are in its ``optimizer``, by parameter group
    stage 1, 2  optim_states: a flat partition a group; ``param_slice_mappings`` says where each parameter lies in it
    stage 3     optim_states: every parameter is cut in equal parts, padded, a part a process
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from scale_mae.checkpoint.store import CheckpointError

_SAFE = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class ZeroReader(Mapping[str, Tensor]):
    """Names to tensors: parameters in fp32 as the optimizer holds them, buffers as the module holds them.

    Args:
        folder: holds ``*_model_states.pt`` and, for stages 1 to 3, ``*_optim_states.pt``.

    Raises:
        CheckpointError: files missing, damaged, of different runs, or of an unknown layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        models = _by_rank(folder, "_model_states.pt")
        if not models:
            raise CheckpointError(f"{folder}: holds no *_model_states.pt, so it is not a DeepSpeed checkpoint")
        self._model = _load(models[0])
        self._module: dict[str, Tensor] = self._model["module"]
        self._optim = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "_optim_states.pt")]
        self.stage = int(self._optim[0]["zero_stage"]) if self._optim else 0
        if self._optim and len(self._optim) != self._model["dp_world_size"]:
            raise CheckpointError(
                f"{folder}: {len(self._optim)} of {self._model['dp_world_size']} *_optim_states.pt files are there"
            )
        if self._model.get("frozen_param_shapes"):
            raise CheckpointError(f"{folder}: holds frozen parameters, which this reader does not support")

    @property
    def state(self) -> dict[str, Any]:
        """What the training code stored beside the states."""
        state: dict[str, Any] = self._model.get("scale_mae", {})
        return state

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self.stage == 0:
            return {n: tuple(t.shape) for n, t in self._module.items() if n not in self._model["buffer_names"]}
        return {n: tuple(shape) for group in self._model["param_shapes"] for n, shape in group.items()}

    def __iter__(self) -> Iterator[str]:
        yield from self._module

    def __len__(self) -> int:
        return len(self._module)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._model["buffer_names"]:
            return self._module[name]
        shape = self._shapes[name]
        flat = {0: self._unsharded, 1: self._fragments, 2: self._fragments, 3: self._parts}[self.stage](name)
        if flat.numel() != math.prod(shape):
            raise CheckpointError(f"{self.folder}: {name} has {flat.numel()} values, {list(shape)} needs {math.prod(shape)}")
        return flat.float().reshape(shape)

    def _unsharded(self, name: str) -> Tensor:
        masters = (self._model["optimizer"] or {}).get("fp32_groups")
        if masters is None:
            return self._module[name].reshape(-1)
        for names, tensors in zip(self.state["parameter_groups"], masters, strict=True):
            if name in names:
                master: Tensor = tensors[names.index(name)]
                return master.detach().reshape(-1)
        raise KeyError(name)

    def _fragments(self, name: str) -> Tensor:
        found = []
        for states in self._optim:
            for group, places in enumerate(states["param_slice_mappings"]):
                if name in places:
                    partition = states["single_partition_of_fp32_groups"][group]
                    found.append(partition.narrow(0, places[name].start, places[name].numel))
        return torch.cat(found) if len(found) != 1 else found[0]

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Where each parameter's part begins in the concatenation of a process's stage-3 groups."""
        starts, start = {}, 0
        for name, shape in self._shapes.items():
            starts[name] = start
            start += self._part_size(shape)
        return starts

    def _part_size(self, shape: tuple[int, ...]) -> int:
        return -(-math.prod(shape) // len(self._optim))

    def _parts(self, name: str) -> Tensor:
        shape = self._shapes[name]
        size = self._part_size(shape)
        parts = []
        for states in self._optim:
            start = self._starts[name]
            for group in states["fp32_flat_groups"]:
                if start < group.numel():
                    parts.append(group.narrow(0, start, size))
                    break
                start -= group.numel()
        return torch.cat(parts)[: math.prod(shape)]


def _by_rank(folder: Path, suffix: str) -> list[Path]:
    def rank(path: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)", path.name)
        return int(found.group(1)) if found else 0

    return sorted(folder.glob(f"*{suffix}"), key=rank)


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None

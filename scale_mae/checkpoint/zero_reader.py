"""A lazy view of any ZeRO checkpoint, ours or a stranger's: fp32 masters and moments by name, only what is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import LazyTensor
from scale_mae.checkpoint.store import CheckpointError
from scale_mae.checkpoint.zero_files import open_files, release
from scale_mae.checkpoint.zero_layout import Cut, Layout, Partitioned, Unsharded

# Compared to see that files belong together: so many pieces of each vector, so many values of each.
PIECES, FEW = 8, 4096


class ZeroReader(Mapping[str, Tensor]):
    """Names to tensors, in the order of the module's ``state_dict``.

    A trainable parameter is given in fp32, as the optimizer holds it; a frozen parameter or a buffer as the module holds it.

    Args:
        folder: holds ``*_model_states.pt`` and, for stages 1 to 3, ``*_optim_states.pt``; see :func:`find_folder`.

    Attributes:
        stage: ZeRO stage.
        world_size: processes that wrote it.
        step: optimizer steps, those skipped for fp16 overflow included (DeepSpeed's ``global_steps``).
        state: what our training code stored beside the states; empty for others' checkpoints.
        without_frozen: it was saved with ``exclude_frozen_parameters``. Stages 2 and 3 alone tell, and not which are missing.
        parameters: names of those with an fp32 master, in the order of iteration; tied ones by all their names.

    Raises:
        CheckpointError: files missing, damaged, of different saves, or of an unknown layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._open()
        except CheckpointError:
            raise
        except Exception as error:  # files that are not what DeepSpeed writes can fail anywhere
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(f"{folder}: not what DeepSpeed is known to write ({reason[:200]})") from None

    def _open(self) -> None:
        self._files = open_files(self.folder)
        model = self._files.models[0]
        self.stage, self.world_size, self.step = self._files.stage, self._files.world_size, int(model["global_steps"])
        self.state: dict[str, Any] = model.get("scale_mae", {})
        self._module: dict[str, Tensor] = {n: t for n, t in model["module"].items() if isinstance(t, Tensor)}
        self._frozen: dict[str, Any] = (model.get("frozen_param_shapes") or {}) if self.stage == 3 else {}
        self.without_frozen = self.stage >= 2 and "frozen_param_shapes" in model and model["frozen_param_shapes"] is None
        buffers = set(model["buffer_names"])
        self._layout = self._find_layout(buffers)
        self._own_names = self._untie(buffers)
        self.parameters = [n for n in self._module if self._own_names.get(n, n) in self._layout.shapes]
        self._trained = set(self.parameters)
        self._check_counts()
        if self.stage in (1, 2):
            self._check_rounding()

    def _find_layout(self, buffers: set[str]) -> Layout:
        if self.stage == 0:
            first: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
            for name in (n for n in self._module if n not in buffers):
                first.setdefault(_place(self._module[name]), (name, self._module[name]))
            return Unsharded(self._files, self.folder, dict(first.values()))
        return Cut(self._files, self.folder) if self.stage == 3 else Partitioned(self._files, self.folder)

    def _untie(self, buffers: set[str]) -> dict[str, str]:
        """Further names of tied parameters -> the name by which the parameter is known.

        They are found by their place in the file; DeepSpeed's own list misses a module that has two names.
        """
        known = {_place(self._module[n]): n for n in (*self._frozen, *self._layout.shapes) if n in self._module}
        ties = {}
        for name, tensor in self._module.items():
            if name in buffers or name in self._layout.shapes or name in self._frozen:
                continue
            if _place(tensor) in known:
                ties[name] = known[_place(tensor)]
            elif self.stage == 3:
                raise CheckpointError(f"{self.folder}: DeepSpeed saved nothing of {name}, as the optimizer was not given it")
        return ties

    def __iter__(self) -> Iterator[str]:
        yield from self._module

    def __len__(self) -> int:
        return len(self._module)

    def __getitem__(self, name: str) -> Tensor:
        own = self._own_names.get(name, name)
        if name in self._trained:
            return self.flat(name).reshape(self._layout.shapes[own])
        if own not in self._frozen:
            return self._module[name].detach()
        shape = self.shape(name)
        parts = [model["frozen_param_fragments"][own].detach().reshape(-1) for model in self._files.models]
        if {part.dtype for part in parts} != {self.dtype(name)}:
            raise CheckpointError(f"{self.folder}: {name} is stored quantized, a layout that is not supported")
        return torch.cat(parts)[: math.prod(shape)].reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads nothing."""
        own = self._own_names.get(name, name)
        shapes = next((shapes for shapes in (self._layout.shapes, self._frozen) if own in shapes), None)
        return tuple(shapes[own] if shapes else self._module[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of what ``reader[name]`` gives; reads nothing."""
        return torch.float32 if name in self._trained else self._module[name].dtype

    def flat(self, name: str, key: str = "fp32", start: int = 0, stop: int | None = None) -> Tensor:
        """Values ``[start:stop)`` of a trainable parameter, flattened; only these are read.

        Args:
            name: one of ``parameters``.
            key: ``fp32`` for the master weight, or the optimizer's name of a moment (AdamW: ``exp_avg``, ``exp_avg_sq``).
            start: first value.
            stop: end; None is the parameter's own.

        Returns:
            One-dimensional, fp32. Where it lies in one piece, a view of the file.

        Raises:
            CheckpointError: the optimizer has no such state.
            KeyError: no such parameter.
        """
        found = list(self._stretches(name, key, start, stop))
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def stretches(self, name: str, key: str = "fp32") -> Iterator[Tensor]:
        """All values of any tensor, flattened, in order, in the stretches in which they lie in the files: nothing is copied.

        Of a trainable parameter ``key`` chooses, see :meth:`flat`; all else has but its own values.
        """
        yield from self._stretches(name, key) if name in self._trained else [self[name].reshape(-1)]

    def lazy(self, name: str) -> LazyTensor:
        """A tensor that is read when asked for."""
        return LazyTensor(self.shape(name), self.dtype(name), partial(self.stretches, name))

    def _stretches(self, name: str, key: str = "fp32", start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        own = self._own_names.get(name, name)
        start, stop, _ = slice(start, stop).indices(math.prod(self._layout.shapes[own]))
        begin = 0
        for rank, group, place, size in self._layout.pieces(own):
            low, high = max(start, begin), min(stop, begin + size)
            if low < high:
                vector = self._layout.master(rank, group) if key == "fp32" else self._layout.state(rank, group).get(key)
                if vector is None:
                    raise CheckpointError(f"{self.folder}: its optimizer holds no {key} of {name}")
                yield vector.detach().reshape(-1).narrow(0, place + low - begin, high - low).float()
            begin += size

    def optimizer_step(self, name: str) -> float | None:
        """The optimizer's own count of a parameter's updates; None before the first.

        Raises:
            KeyError: no such parameter.
        """
        rank, group, *_ = next(self._layout.pieces(self._own_names.get(name, name)))
        step = self._layout.state(rank, group).get("step")
        return None if step is None else float(step)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters: their settings, ``weight_decay`` for instance, not their parameters."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self._layout.settings()]

    def release(self) -> None:
        """Give the memory of what was read back to the system.

        Tensors that are views of the files stay valid and are read anew; what was written into them is lost.
        """
        release(self._files.maps)

    def _check_counts(self) -> None:
        """All processes' optimizers have made as many updates."""
        for group in range(self._layout.groups if self.stage else 0):
            steps = [self._layout.state(rank, group).get("step") for rank in range(self.world_size)]
            counts = [None if step is None else float(step) for step in steps]
            for rank, count in enumerate(counts):
                if count != counts[0]:
                    made = f"rank 0's optimizer has made {counts[0]} updates, rank {rank}'s {count}"
                    raise CheckpointError(f"{self.folder}: {made}: different saves")

    def _check_rounding(self) -> None:
        """The module's weights are the rounded masters, in some small pieces of every process's every vector."""
        left = {(rank, group): PIECES for rank in range(self.world_size) for group in range(self._layout.groups)}
        for name in sorted(self._layout.shapes, key=lambda n: math.prod(self._layout.shapes[n])):
            begin = 0
            for rank, group, _, size in self._layout.pieces(name):
                left[rank, group] -= 1
                if left[rank, group] >= 0:
                    weight = self._module[name].detach().reshape(-1)[begin : begin + min(size, FEW)]
                    master = self.flat(name, start=begin, stop=begin + weight.numel()).to(weight.dtype)
                    if not torch.equal(weight.nan_to_num(), master.nan_to_num()):
                        differ = f"{name} in *_model_states.pt is not the rounded master of rank {rank}"
                        raise CheckpointError(f"{self.folder}: {differ}: different saves")
                begin += size


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that were one when saved; ZeRO-3 leaves of a parameter an empty tensor, still one for all its names."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)

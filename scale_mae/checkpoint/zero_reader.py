"""Reads any ZeRO checkpoint lazily: any slice of the fp32 master weight or of an optimizer state, by parameter name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.deepspeed_files import MIXED_SAVES, open_deepspeed_files
from scale_mae.checkpoint.deepspeed_layout import Layout, Stage0Layout, Stage3Layout, Stage12Layout
from scale_mae.checkpoint.deepspeed_unpickle import release_memory_maps
from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.lazy_tensor import LazyTensor

# To detect files from different saves, this many fragments of each flat tensor are compared, and this many values of each.
CHECKED_FRAGMENTS, CHECKED_VALUES = 8, 4096


class ZeroReader(Mapping[str, Tensor]):
    """Maps names to tensors, in the order of the module's ``state_dict``. Tensors are read when they are requested.

    The tensor of a trainable parameter is the optimizer's fp32 master weight. Frozen parameters and buffers have the dtype of
    the module.
    The checkpoint may be from scale_mae or from any other code that uses DeepSpeed.

    Args:
        folder: The folder with ``*_model_states.pt`` and, for stages 1 to 3, ``*_optim_states.pt``. See
            :func:`scale_mae.checkpoint.deepspeed_files.find_deepspeed_folder`.

    Attributes:
        stage: ZeRO stage.
        world_size: Number of processes that wrote the checkpoint.
        step: Optimizer steps, including those that were skipped because of fp16 overflows (DeepSpeed's ``global_steps``).
        state: What scale_mae stored in addition to the weights and optimizer states. Empty for other checkpoints.
        without_frozen: Whether the checkpoint was saved with ``exclude_frozen_parameters``. Only stages 2 and 3 record this.
            They do not record which parameters are missing.
        parameters: Names of the parameters with an fp32 master, in the order of iteration. A tied parameter has all its names.

    Raises:
        CheckpointError: Files are missing, damaged, from different saves, or have an unsupported layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._open()
        except CheckpointError:
            raise
        except Exception as error:  # files that DeepSpeed did not write can fail anywhere
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(
                f"{folder}: the contents of its files are not what DeepSpeed writes ({reason[:200]})"
            ) from None

    def _open(self) -> None:
        self._files = open_deepspeed_files(self.folder)
        model = self._files.models[0]
        self.stage, self.world_size, self.step = self._files.stage, self._files.world_size, int(model["global_steps"])
        self.state: dict[str, Any] = model.get("scale_mae", {})
        self._module: dict[str, Tensor] = {n: t for n, t in model["module"].items() if isinstance(t, Tensor)}
        self._frozen_shapes: dict[str, Any] = (model.get("frozen_param_shapes") or {}) if self.stage == 3 else {}
        self.without_frozen = self.stage >= 2 and "frozen_param_shapes" in model and model["frozen_param_shapes"] is None
        buffers = set(model["buffer_names"])
        self._layout = self._build_layout(buffers)
        self._tied_to = self._find_tied_parameters(buffers)
        self.parameters = [n for n in self._module if self._tied_to.get(n, n) in self._layout.shapes]
        self._trained = set(self.parameters)
        self._check_step_counts()
        if self.stage in (1, 2):
            self._check_rounded_masters()

    def _build_layout(self, buffers: set[str]) -> Layout:
        if self.stage == 0:
            untied: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
            for name in (n for n in self._module if n not in buffers):
                untied.setdefault(_get_storage_key(self._module[name]), (name, self._module[name]))
            return Stage0Layout(self._files, self.folder, dict(untied.values()))
        return Stage3Layout(self._files, self.folder) if self.stage == 3 else Stage12Layout(self._files, self.folder)

    def _find_tied_parameters(self, buffers: set[str]) -> dict[str, str]:
        """Return the further names of tied parameters, and for each the name that the layout uses.

        Tied parameters share storage in the file. DeepSpeed's own list of them lacks modules that have two names.
        """
        names = {
            _get_storage_key(self._module[n]): n for n in (*self._frozen_shapes, *self._layout.shapes) if n in self._module
        }
        tied_to = {}
        for name, tensor in self._module.items():
            if name in buffers or name in self._layout.shapes or name in self._frozen_shapes:
                continue
            if _get_storage_key(tensor) in names:
                tied_to[name] = names[_get_storage_key(tensor)]
            elif self.stage == 3:
                raise CheckpointError(
                    f"{self.folder}: DeepSpeed stored no values of {name}, because the optimizer did not have it. "
                    "Add it to the optimizer, or freeze it, and save again."
                )
        return tied_to

    def __iter__(self) -> Iterator[str]:
        yield from self._module

    def __len__(self) -> int:
        return len(self._module)

    def __getitem__(self, name: str) -> Tensor:
        layout_name = self._tied_to.get(name, name)
        if name in self._trained:
            return self.flat(name).reshape(self._layout.shapes[layout_name])
        if layout_name not in self._frozen_shapes:
            return self._module[name].detach()
        shape = self.shape(name)
        parts = [model["frozen_param_fragments"][layout_name].detach().reshape(-1) for model in self._files.models]
        if {part.dtype for part in parts} != {self.dtype(name)}:
            raise CheckpointError(f"{self.folder}: {name} is stored quantized, which is not supported.")
        return torch.cat(parts)[: math.prod(shape)].reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        layout_name = self._tied_to.get(name, name)
        shapes = next((shapes for shapes in (self._layout.shapes, self._frozen_shapes) if layout_name in shapes), None)
        return tuple(shapes[layout_name] if shapes else self._module[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of ``reader[name]`` without reading it."""
        return torch.float32 if name in self._trained else self._module[name].dtype

    def flat(self, name: str, key: str = "fp32", start: int = 0, stop: int | None = None) -> Tensor:
        """Return the values ``[start:stop)`` of a flattened trainable parameter. No other values are read.

        Args:
            name: One of ``parameters``.
            key: ``fp32`` for the master weight, or the optimizer's name of a state (AdamW: ``exp_avg``, ``exp_avg_sq``).
            start: First value.
            stop: One past the last value. ``None`` is the end of the parameter.

        Returns:
            fp32, ``[stop - start]``. It is a view of the file if the values are contiguous there.

        Raises:
            CheckpointError: The optimizer has no such state.
            KeyError: There is no such parameter.
        """
        chunks = list(self._read_chunks(name, key, start, stop))
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks) if chunks else torch.empty(0)

    def chunks(self, name: str, key: str = "fp32") -> Iterator[Tensor]:
        """Yield all values of a flattened tensor, in order, as views of the files. Nothing is copied.

        Args:
            name: Any tensor.
            key: See :meth:`flat`. It applies to trainable parameters only.
        """
        yield from self._read_chunks(name, key) if name in self._trained else [self[name].reshape(-1)]

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor that is read later."""
        return LazyTensor(self.shape(name), self.dtype(name), partial(self.chunks, name))

    def _read_chunks(self, name: str, key: str = "fp32", start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield the values ``[start:stop)`` of a trainable parameter, one view for each fragment that contains some of them."""
        layout_name = self._tied_to.get(name, name)
        start, stop, _ = slice(start, stop).indices(math.prod(self._layout.shapes[layout_name]))
        begin = 0
        for fragment in self._layout.fragments(layout_name):
            low, high = max(start, begin), min(stop, begin + fragment.size)
            if low < high:
                flat = self._flat_tensor(fragment.rank, fragment.group, key)
                if flat is None:
                    raise CheckpointError(f"{self.folder}: its optimizer has no state {key} for {name}.")
                yield flat.detach().reshape(-1).narrow(0, fragment.start + low - begin, high - low).float()
            begin += fragment.size

    def _flat_tensor(self, rank: int, group: int, key: str) -> Tensor | None:
        if key == "fp32":
            return self._layout.masters(rank, group)
        return self._layout.optimizer_state(rank, group).get(key)

    def optimizer_step(self, name: str) -> float | None:
        """Return the optimizer's count of updates of a parameter. It is ``None`` before the first update.

        Raises:
            KeyError: There is no such parameter.
        """
        fragment = next(self._layout.fragments(self._tied_to.get(name, name)))
        step = self._layout.optimizer_state(fragment.rank, fragment.group).get("step")
        return None if step is None else float(step)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The settings of the optimizer's parameter groups, such as ``weight_decay``, without the parameters."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self._layout.param_groups()]

    def release(self) -> None:
        """Return the memory of the values that were read to the operating system.

        Tensors that are views of the files stay valid, and their values are read again when used. Values that were written to
        such a view are lost.
        """
        release_memory_maps(self._files.maps)

    def _check_step_counts(self) -> None:
        """Check that the optimizers of all ranks have made the same number of updates."""
        for group in range(self._layout.group_count if self.stage else 0):
            steps = [self._layout.optimizer_state(rank, group).get("step") for rank in range(self.world_size)]
            counts = [None if step is None else float(step) for step in steps]
            for rank, count in enumerate(counts):
                if count != counts[0]:
                    raise CheckpointError(
                        f"{self.folder}: the optimizer of rank 0 has made {counts[0]} updates, but that of rank {rank} has "
                        f"made {count}. {MIXED_SAVES}"
                    )

    def _check_rounded_masters(self) -> None:
        """Check that the module's weights equal the rounded masters, in a few fragments of every rank's flat tensors."""
        unchecked = {
            (rank, group): CHECKED_FRAGMENTS for rank in range(self.world_size) for group in range(self._layout.group_count)
        }
        for name in sorted(self._layout.shapes, key=lambda n: math.prod(self._layout.shapes[n])):
            begin = 0
            for rank, group, _, size in self._layout.fragments(name):
                unchecked[rank, group] -= 1
                if unchecked[rank, group] >= 0:
                    weight = self._module[name].detach().reshape(-1)[begin : begin + min(size, CHECKED_VALUES)]
                    master = self.flat(name, start=begin, stop=begin + weight.numel()).to(weight.dtype)
                    if not torch.equal(weight.nan_to_num(), master.nan_to_num()):
                        raise CheckpointError(
                            f"{self.folder}: {name} in *_model_states.pt differs from the rounded master weight of rank "
                            f"{rank}. {MIXED_SAVES}"
                        )
                begin += size


def _get_storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tied parameters.

    Under ZeRO-3 the module contains an empty tensor for each parameter, which tied parameters still share.
    """
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)

"""Finds and opens the files of a DeepSpeed ZeRO checkpoint, and checks that they belong together.

    stage 0     mp_rank_00_model_states.pt
    stage 1, 2  the same, and one (bf16_)zero_pp_rank_N_mp_rank_00_optim_states.pt for each process
    stage 3     one zero_pp_rank_N_mp_rank_00_model_states.pt and one ..._optim_states.pt for each process

:mod:`scale_mae.checkpoint.deepspeed_unpickle` reads one file. :mod:`scale_mae.checkpoint.deepspeed_layout` locates the values
of a parameter in the files.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_mae.checkpoint.deepspeed_unpickle import find_memory_maps, load_file
from scale_mae.checkpoint.errors import CheckpointError

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MIXED_SAVES = "The files are from different saves. Use all files of one save."


@dataclass(frozen=True)
class DeepSpeedFiles:
    """The contents of the files of one checkpoint, in rank order.

    Attributes:
        models: Contents of ``*_model_states.pt``: one for each process under stage 3, else a single one.
        optimizers: The ``optimizer_state_dict`` of each ``*_optim_states.pt``. Empty under stage 0.
        stage: ZeRO stage.
        world_size: Number of processes that wrote the checkpoint.
        maps: (address, size in bytes) of the memory maps.
    """

    models: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]
    stage: int
    world_size: int
    maps: list[tuple[int, int]]


def is_deepspeed_folder(path: Path) -> bool:
    """Return whether a path is a folder with ``*_model_states.pt``, or with a file ``latest`` that names such a folder."""
    return path.is_dir() and (any(path.glob("*_model_states.pt")) or (path / "latest").is_file())


def find_deepspeed_folder(path: Path) -> Path:
    """Return the folder with ``*_model_states.pt``: ``path`` itself, or the subfolder that its file ``latest`` names.

    Raises:
        CheckpointError: There is no such folder.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Correct the path.")
    if any(path.glob("*_model_states.pt")):
        return path
    try:
        tag = (path / "latest").read_text(errors="replace").strip()
    except OSError:
        raise CheckpointError(
            f"{path}: not a DeepSpeed checkpoint. It contains neither *_model_states.pt nor a file 'latest'."
        ) from None
    if tag not in os.listdir(path) or not (path / tag).is_dir():
        raise CheckpointError(
            f"{path / 'latest'}: names the folder {tag[:100]!r}, which does not exist. Give the folder with *_model_states.pt."
        )
    return path / tag


def open_deepspeed_files(folder: Path) -> DeepSpeedFiles:
    """Open all files of a checkpoint and check that they belong together.

    Raises:
        CheckpointError: Files are missing, superfluous, damaged, from different saves, or have an unsupported layout.
        Exception: Any other error, if the contents of the files are not what DeepSpeed writes.
    """
    model_paths, optimizer_paths = _find_files(folder)
    models = [load_file(path) for path in model_paths.values()]
    contents = [load_file(path) for path in optimizer_paths.values()]
    optimizers: list[dict[str, Any]] = [content["optimizer_state_dict"] for content in contents]
    # BF16_Optimizer of DeepSpeed is stage 1, but does not store its stage
    _check_equal(folder, optimizer_paths, [optimizer.get("zero_stage", 1) for optimizer in optimizers], "zero_stage")
    for key in ("dp_world_size", "global_steps"):
        _check_equal(folder, model_paths, [model[key] for model in models], key)
    stage = int(optimizers[0].get("zero_stage", 1)) if optimizers else 0
    world_size = int(models[0]["dp_world_size"])
    is_partitioned = model_paths[min(model_paths)].name.startswith("zero_pp_rank_")
    if models[0]["mp_world_size"] != 1 or any("ds_zero_partition_groups" in optimizer for optimizer in optimizers):
        raise CheckpointError(f"{folder}: written with tensor parallelism or mixture of experts, which are not supported.")
    if optimizers and is_partitioned != (stage == 3):
        raise CheckpointError(f"{folder}: *_model_states.pt and *_optim_states.pt have different ZeRO stages. {MIXED_SAVES}")
    has_optimizer_files = optimizers or is_partitioned or models[0]["param_shapes"]
    _check_count(folder, "optim_states", optimizer_paths, world_size if has_optimizer_files else 0)
    _check_count(folder, "model_states", model_paths, world_size if is_partitioned else 1)
    for path, optimizer in zip(optimizer_paths.values(), optimizers, strict=True):
        counts = optimizer["partition_count"]
        if {world_size} != set(counts if isinstance(counts, list) else [counts]):
            raise CheckpointError(
                f"{path}: was saved by {counts} processes, but the other files by {world_size}. {MIXED_SAVES}"
            )
    opened = zip((*model_paths.values(), *optimizer_paths.values()), (*models, *contents), strict=True)
    maps = [memory_map for path, content in opened for memory_map in find_memory_maps(path, content)]
    return DeepSpeedFiles(models, optimizers, stage, world_size, maps)


def _find_files(folder: Path) -> tuple[dict[int, Path], dict[int, Path]]:
    """Return the model files and the optimizer files by rank, in rank order."""
    models: dict[int, Path] = {}
    optimizers: dict[int, Path] = {}
    if (folder / "zero").is_dir():
        raise CheckpointError(
            f"{folder}: a universal checkpoint, which is not supported. Use the ZeRO checkpoint that it was converted from."
        )
    for path in sorted((*folder.glob("*_states.pt"), *folder.glob("*-model_states.pt"))):
        model_match, optimizer_match = _MODEL_FILE.fullmatch(path.name), _OPTIMIZER_FILE.fullmatch(path.name)
        match = model_match or optimizer_match
        if not match or int(match.group(2)):
            raise CheckpointError(
                f"{path}: written with mixture of experts, tensor or pipeline parallelism, which are not supported."
            )
        files, rank = models if model_match else optimizers, int(match.group(1) or 0)
        if rank in files:
            raise CheckpointError(f"{folder}: contains both {files[rank].name} and {path.name}. {MIXED_SAVES}")
        files[rank] = path
    if not models:
        raise CheckpointError(f"{folder}: not a DeepSpeed checkpoint. It contains no *_model_states.pt.")
    return dict(sorted(models.items())), dict(sorted(optimizers.items()))


def _check_count(folder: Path, kind: str, paths: dict[int, Path], count: int) -> None:
    """Check that there is one file of each rank below ``count``, and no other file."""
    missing = [str(rank) for rank in range(count) if rank not in paths]
    if missing:
        verb, ranks = ("is", "rank") if len(missing) == 1 else ("are", "ranks")
        numbers = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(
            f"{folder}: {len(missing)} of {count} *_{kind}.pt files {verb} missing: {ranks} {numbers}. "
            "Copy all files of the save."
        )
    if len(paths) > count:
        raise CheckpointError(
            f"{paths[max(paths)]}: {count} processes wrote this checkpoint, so it has no such rank. {MIXED_SAVES}"
        )


def _check_equal(folder: Path, paths: dict[int, Path], values: list[Any], key: str) -> None:
    names = [path.name for path in paths.values()]
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise CheckpointError(f"{folder}: {key} is {values[0]} in {names[0]}, but {value} in {name}. {MIXED_SAVES}")

"""The files of a ZeRO checkpoint: found, opened without running anything they ask for, and of one and the same save.

    stage 0     mp_rank_00_model_states.pt
    stage 1, 2  that, and one (bf16_)zero_pp_rank_N_mp_rank_00_optim_states.pt a process
    stage 3     one zero_pp_rank_N_mp_rank_00_model_states.pt a process, and its optim_states likewise

They are memory-mapped. Pickles are read by torch's restricted loader, which calls nothing but what rebuilds tensors. Objects of
classes it does not know, DeepSpeed's own or what a user stored beside the states, become stand-ins that hold nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.store import CheckpointError

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# From the standard library, what holds data. All else a pickle may name there is a call that has no place in a checkpoint.
_DATA = re.compile(
    r"(argparse|collections|datetime|decimal|fractions|pathlib|typing|uuid)\.\w+|_codecs\.encode|copyreg\._reconstructor|"
    r"builtins\.(bool|bytes|complex|dict|float|frozenset|int|list|object|range|slice|str|tuple|type)"
)


class _StandIn:
    """Takes the place of an object of an unknown class, and of the class itself; holds nothing, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _DictStandIn:
    """The same for a kind of dictionary, which the loader fills only if it is one that it knows."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _Stage(int):
    """Takes the place of DeepSpeed's ZeroStageEnum."""


def _member(owner: Any, name: str) -> _Stage:
    """Takes the place of getattr, with which Python 3.11.0 to 3.11.3, Debian 12's too, pickles a member of an enumeration."""
    if owner is not _Stage:
        raise ValueError("it asks to call builtins.getattr, which was not done")
    return _Stage(("disabled", "optimizer_states", "gradients", "weights").index(name))


@dataclass(frozen=True)
class ZeroFiles:
    """What the files of one checkpoint hold, by rank.

    Attributes:
        models: content of ``*_model_states.pt``: one, or one a process under stage 3.
        optims: ``optimizer_state_dict`` of each ``*_optim_states.pt``: none under stage 0.
        stage: ZeRO stage.
        world_size: processes that wrote it.
        maps: address and size of the memory maps.
    """

    models: list[dict[str, Any]]
    optims: list[dict[str, Any]]
    stage: int
    world_size: int
    maps: list[tuple[int, int]]


def find_folder(path: Path) -> Path:
    """The folder that holds ``*_model_states.pt``: ``path`` itself, or the one that its file ``latest`` names.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if any(path.glob("*_model_states.pt")):
        return path
    try:
        tag = (path / "latest").read_text(errors="replace").strip()
    except OSError:
        raise CheckpointError(f"{path}: no DeepSpeed checkpoint (neither *_model_states.pt nor a file 'latest')") from None
    if tag not in os.listdir(path) or not (path / tag).is_dir():
        raise CheckpointError(f"{path / 'latest'}: names {tag[:100]!r}, and there is no such folder")
    return path / tag


def open_files(folder: Path) -> ZeroFiles:
    """Open all files of a checkpoint.

    Raises:
        CheckpointError: files missing, superfluous, damaged, of different saves, or of a layout that is not supported.
        Exception: any, where they do not hold what DeepSpeed puts there.
    """
    model_paths, optim_paths = _ranked(folder)
    models = [_load(path) for path in model_paths.values()]
    contents = [_load(path) for path in optim_paths.values()]
    optims: list[dict[str, Any]] = [content["optimizer_state_dict"] for content in contents]
    # DeepSpeed's BF16_Optimizer, which is stage 1, does not tell its stage
    _same(folder, optim_paths, [optim.get("zero_stage", 1) for optim in optims], "zero_stage")
    for key in ("dp_world_size", "global_steps"):
        _same(folder, model_paths, [model[key] for model in models], key)
    stage = int(optims[0].get("zero_stage", 1)) if optims else 0
    world_size, cut = int(models[0]["dp_world_size"]), model_paths[min(model_paths)].name.startswith("zero_pp_rank_")
    if models[0]["mp_world_size"] != 1 or any("ds_zero_partition_groups" in optim for optim in optims):
        raise CheckpointError(f"{folder}: tensor parallelism or experts, layouts that are not supported")
    if optims and cut != (stage == 3):
        raise CheckpointError(f"{folder}: its *_model_states.pt and *_optim_states.pt are of different ZeRO stages")
    _complete(folder, "optim_states", optim_paths, world_size if optims or cut or models[0]["param_shapes"] else 0)
    _complete(folder, "model_states", model_paths, world_size if cut else 1)
    for path, optim in zip(optim_paths.values(), optims, strict=True):
        counts = optim["partition_count"]
        if {world_size} != set(counts if isinstance(counts, list) else [counts]):
            raise CheckpointError(f"{path}: in {counts} parts, but {world_size} processes saved the others: different saves")
    opened = zip((*model_paths.values(), *optim_paths.values()), (*models, *contents), strict=True)
    return ZeroFiles(models, optims, stage, world_size, [place for path, content in opened for place in _maps(path, content)])


def _ranked(folder: Path) -> tuple[dict[int, Path], dict[int, Path]]:
    """Model and optimizer files by rank, in rank order."""
    models: dict[int, Path] = {}
    optims: dict[int, Path] = {}
    if (folder / "zero").is_dir():
        raise CheckpointError(f"{folder}: a universal checkpoint, a layout that is not supported; use what it was made from")
    for path in sorted((*folder.glob("*_states.pt"), *folder.glob("*-model_states.pt"))):
        model, optim = _MODEL.fullmatch(path.name), _OPTIM.fullmatch(path.name)
        found = model or optim
        if not found or int(found.group(2)):
            raise CheckpointError(f"{path}: experts, tensor or pipeline parallelism, layouts that are not supported")
        files, rank = models if model else optims, int(found.group(1) or 0)
        if rank in files:
            raise CheckpointError(f"{folder}: {files[rank].name} and {path.name} are of different saves")
        files[rank] = path
    if not models:
        raise CheckpointError(f"{folder}: holds no *_model_states.pt, so it is not a DeepSpeed checkpoint")
    return dict(sorted(models.items())), dict(sorted(optims.items()))


def _complete(folder: Path, kind: str, paths: dict[int, Path], count: int) -> None:
    missing = [str(rank) for rank in range(count) if rank not in paths]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(f"{folder}: {count - len(missing)} of {count} *_{kind}.pt files are there, none of rank {some}")
    if len(paths) > count:
        raise CheckpointError(f"{paths[max(paths)]}: of another save; {count} processes wrote this one")


def _same(folder: Path, paths: dict[int, Path], values: list[Any], what: str) -> None:
    names = [path.name for path in paths.values()]
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise CheckpointError(f"{folder}: {what} is {values[0]} in {names[0]}, {value} in {name}: different saves")


def _load(path: Path) -> dict[str, Any]:
    """The content of one file, tensors memory-mapped; nothing that it names is imported or called."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known: list[Any] = [(_stand_in(name), name) for name in names]
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a damaged file makes of a pickle can raise anything
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: cannot be read (not DeepSpeed's)")
    return content


def reason(error: Exception) -> str:
    """Why torch could not load a file, in one line, without its advice to lift the restriction."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    text = re.split(r"Check the documentation|Please use `torch.serialization|, and we don't|[^.]*weights_only", text)[0]
    return " ".join(text.split())[:200] or type(error).__name__


def _stand_in(name: str) -> Any:
    """What ``name``, as a pickle gives it, shall mean."""
    module, _, rest = name.partition(".")
    module = IMPORT_MAPPING.get(module, module)  # pickles of protocol 2 call modules as Python 2 did
    if (module, rest) == ("builtins", "getattr"):
        return _member
    if module in sys.stdlib_module_names and not _DATA.fullmatch(f"{module}.{rest}"):
        raise ValueError(f"it asks to call {module}.{rest}, which was not done")
    if name.endswith(".ZeroStageEnum"):
        return _Stage
    return _DictStandIn if name.lower().endswith("dict") else _StandIn


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)


def _maps(path: Path, content: Any) -> Iterator[tuple[int, int]]:
    """Address and size of the memory map of ``path`` in which the tensors of ``content`` lie."""
    inside = next((t.untyped_storage().data_ptr() for t in _tensors(content) if t.numel()), 0)
    if sys.platform != "linux" or not inside:
        return
    name = os.path.realpath(path)
    with open("/proc/self/maps") as lines:
        for line in lines:
            address, *_, file = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(number, 16) for number in address.split("-"))
            if file == name and start <= inside < end:
                yield start, end - start


def release(maps: Iterable[tuple[int, int]]) -> None:
    """Give the pages of memory maps back to the system; what is read again is mapped again."""
    if sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise
        for start, size in maps:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)

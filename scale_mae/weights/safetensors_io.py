"""Reads and writes safetensors files one tensor at a time, so that a model of any size passes through little memory.

A file contains the length of its header in eight bytes, a JSON header, and the values of the tensors one after the other. The
header contains the dtype, shape and position of each tensor, and free metadata. A folder with several such files has an index
file as Hugging Face defines it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.config import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def compute_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values as hexadecimal text."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file.

    Args:
        path: The file.
        tensors: The tensors by name. The widest dtype is written first, so that all values are aligned.
        metadata: Free metadata.

    Raises:
        OSError: The file cannot be written.
        UserError: The format does not support a dtype.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPE_NAMES:
            raise UserError(f"{name}: safetensors files do not support {tensor.dtype}.")
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position := position + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            remaining = math.prod(tensor.shape)
            for values in tensor.chunks():
                assert values.dtype == tensor.dtype
                remaining -= values.numel()
                _write_all(file, values.detach().contiguous().view(torch.uint8).numpy().data if values.numel() else b"")
            assert remaining == 0


def _write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write everything. One system call can write less, and never writes more than 2 GiB."""
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[file.write(remaining) :]


def write_folder(
    folder: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], max_bytes: float = math.inf
) -> None:
    """Write ``model.safetensors``, or numbered shards and their index if one file would be larger than ``max_bytes``.

    A shard is larger than ``max_bytes`` only if it contains a single tensor of that size.

    Raises:
        OSError: A file cannot be written.
        UserError: The format does not support a dtype.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    shard_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_bytes + tensor.nbytes > max_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / SINGLE_FILE, tensors, metadata)
        return
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, metadata)
        file_of |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-map all tensors of a safetensors file, or of all such files in a folder. The tensors do not share memory.

    The files must be written by :func:`write_tensors`.
    """
    if path.is_dir():
        return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in map_tensors(file).items()}
    dtypes = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch requires writable memory; nothing writes
    start = 8 + int.from_bytes(mapped[:8], "little")
    tensors = {}
    for name, entry in json.loads(mapped[8:start]).items():
        if name != "__metadata__":
            offset, count, dtype = start + entry["data_offsets"][0], math.prod(entry["shape"]), dtypes[entry["dtype"]]
            values = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


class TensorFiles(Mapping[str, Tensor]):
    """Maps names to the tensors of a safetensors file or folder. Each access reads the tensor from its file.

    Args:
        path: The file, or a folder with ``model.safetensors`` or an index.

    Attributes:
        path: The file or folder.
        metadata: The metadata of the first file.

    Raises:
        UserError: A file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if (path / INDEX_FILE).is_file():
                files: dict[str, str] = json.loads((path / INDEX_FILE).read_text())["weight_map"]
                self._file_of = {name: path / file for name, file in files.items()}
            else:
                single = path / SINGLE_FILE if path.is_dir() else path
                with safetensors.safe_open(single, "pt") as file:
                    self._file_of = dict.fromkeys(file.keys(), single)
            with safetensors.safe_open(next(iter(self._file_of.values())), "pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
        except (OSError, ValueError, KeyError, StopIteration, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}).") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        # open the file for each tensor: an open file keeps every page in memory that was read
        with safetensors.safe_open(self._file_of[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

"""Safetensors files written and read one tensor at a time, so that a model of any size passes through little memory.

A file is eight bytes with the length of a JSON header, the header (dtype, shape and place of each tensor, and free metadata),
and the values one after the other. A folder of several such files has an index in Hugging Face's convention.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from scale_mae.config import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NAMES = {
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


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when asked for: its ``shape`` and ``dtype``, known before, and its values.

    ``stretches`` gives the values, flattened and in order, in one piece or several; nothing has to be copied to join them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stretches: Callable[[], Iterable[Tensor]]

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """The same rounded to ``dtype``, if it has a fraction to round; None changes nothing."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, stretches=lambda: (part.to(dtype) for part in self.stretches()))

    def read(self) -> Tensor:
        """The tensor."""
        parts = list(self.stretches())
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)
        return whole.reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Reading(Mapping[str, Tensor]):
    """Lazy tensors as a plain mapping; each is made anew whenever it is asked for."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file.

    Args:
        path: the file.
        tensors: by name; read in the order of the file, the widest dtype first, so that all values are aligned.
        metadata: texts by name.

    Raises:
        OSError: the disk.
        UserError: a dtype that the format does not know.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise UserError(f"{name}: safetensors files cannot hold {tensor.dtype}")
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place := place + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            left = math.prod(tensor.shape)
            for values in tensor.stretches():
                assert values.dtype == tensor.dtype
                left -= values.numel()
                _write(file, values.detach().contiguous().view(torch.uint8).numpy().data if values.numel() else b"")
            assert left == 0


def _write(file: BinaryIO, content: bytes | memoryview) -> None:
    """All of it; a system call may write less, and never writes more than 2 GiB."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def write_folder(
    folder: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], max_bytes: float = math.inf
) -> None:
    """Write ``model.safetensors``, or numbered files of at most ``max_bytes`` each (but for larger tensors) and their index.

    Raises:
        OSError: the disk.
        UserError: a dtype that the format does not know.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / SINGLE, tensors, metadata)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, metadata)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def map_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file of ours, or of all in a folder, as memory that is read from the file when it is used,
    each apart from the others."""
    if path.is_dir():
        return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in map_tensors(file).items()}
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable, as torch wants it; nothing writes
    start = 8 + int.from_bytes(mapped[:8], "little")
    found = {}
    for name, entry in json.loads(mapped[8:start]).items():
        if name != "__metadata__":
            place, count, dtype = start + entry["data_offsets"][0], math.prod(entry["shape"]), dtypes[entry["dtype"]]
            values = torch.frombuffer(mapped, dtype=dtype, count=count, offset=place) if count else torch.empty(0, dtype=dtype)
            found[name] = values.reshape(entry["shape"])
    return found


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of one safetensors file, or of a folder of them, read when asked for and not kept.

    Args:
        path: the file, or a folder with ``model.safetensors`` or an index.

    Raises:
        UserError: missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if (path / INDEX).is_file():
                files: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
                self._places = {name: path / file for name, file in files.items()}
            else:
                single = path / SINGLE if path.is_dir() else path
                with safetensors.safe_open(single, "pt") as file:
                    self._places = dict.fromkeys(file.keys(), single)
            with safetensors.safe_open(next(iter(self._places.values())), "pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
        except (OSError, ValueError, KeyError, StopIteration, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        # opened anew for each tensor: an open file keeps every page in memory that was ever read
        with safetensors.safe_open(self._places[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

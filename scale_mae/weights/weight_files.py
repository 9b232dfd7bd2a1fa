"""Opens files and folders of weights, from scale_mae and third parties, by their contents and without running any code.

Supported are safetensors files, files of ``torch.save`` (zip archives, and the format before 2020), and folders with one such
file, or with several shards and an index.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.config import UserError
from scale_mae.system.files import sha256
from scale_mae.weights.metadata import METADATA_FILE, METADATA_KEY
from scale_mae.weights.safe_unpickle import load_pickled_weights
from scale_mae.weights.safetensors_io import TensorFiles

ONNX, TORCH_EXPORT = "an ONNX model, not a state dict", "a torch.export program (.pt2), not a state dict"
DEFAULT_NAMES = ("model.safetensors", "pytorch_model.bin")  # of timm and transformers; a folder may contain other files as well
PICKLE_PATTERNS = ("*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True)
class WeightFiles:
    """The contents of a file or folder of weights.

    Attributes:
        files: The files that contain the tensors, sorted.
        tensors: The state dict with the keys of the files. Memory-mapped if the format allows it.
        extras: The metadata of a safetensors file (texts), or the values that a pickle contains in addition to the tensors.
        state_dict_key: The key of a pickle under which the state dict is stored, or ``None``.
        config: The folder's ``config.json``, or an empty dictionary.
        processor: The folder's ``preprocessor_config.json``, or an empty dictionary.
        metadata: The metadata of a scale_mae export (:mod:`scale_mae.weights.metadata`). Empty for third-party files.
    """

    files: list[Path]
    tensors: Mapping[str, Tensor]
    extras: dict[str, Any]
    state_dict_key: str | None
    config: dict[str, Any]
    processor: dict[str, Any]
    metadata: dict[str, Any]

    def digest(self) -> str:
        """Return the SHA-256 of the file in hexadecimal. For several files, return the SHA-256 of their joined digests."""
        sums = [sha256(file) for file in self.files]
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    @property
    def archives(self) -> list[Path]:
        """The files that are zip archives. No other format has checksums."""
        return [file for file in self.files if zipfile.is_zipfile(file)]

    def find_damage(self) -> str | None:
        """Read all archives. Return one line about the first file that differs from its checksums, or ``None``."""
        for file in self.archives:
            if entry := find_damaged_entry(file):
                return f"{file}: damaged ({entry}). Copy or download the file again."
        return None


def find_damaged_entry(file: Path) -> str | None:
    """Return the name of the first entry of a zip archive that differs from its checksum, or ``None``."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:
        return str(error)


def open_weights(path: Path) -> WeightFiles:
    """Open a file or folder of weights.

    Raises:
        CheckpointError: ``path`` is missing, damaged, of an unknown format, or a pickle that would run code.
    """
    path = find_main_file(path)
    file_format = detect_format(path)
    folder = path.parent
    metadata = parse_metadata(_read_json(folder / METADATA_FILE), folder)
    files, extras, key = [path], dict[str, Any](), None
    tensors: Mapping[str, Tensor]
    if file_format == "index":
        files = _shards(path)
        is_safetensors = detect_format(files[0]) == "safetensors"
        tensors = _merge([_open_safetensors(f) if is_safetensors else load_pickled_weights(f).tensors for f in files], path)
    elif file_format == "safetensors":
        opened = _open_safetensors(path)
        tensors, extras = opened, dict(opened.metadata)
    elif file_format == "torch":
        pickled = load_pickled_weights(path)
        tensors, extras, key = pickled.tensors, pickled.extras, pickled.state_dict_key
    else:
        raise CheckpointError(f"{path}: {file_format}. Give a safetensors file, a file of torch.save, or a folder of them.")
    return WeightFiles(
        files,
        tensors,
        extras,
        key,
        config=_read_json(folder / "config.json"),
        processor=_read_json(folder / "preprocessor_config.json"),
        metadata=metadata | parse_metadata(extras.get(METADATA_KEY), path),
    )


def read_config_json(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a folder, or of the folder that contains a file. Return an empty dictionary without one.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    return _read_json((path if path.is_dir() else path.parent) / "config.json")


def find_main_file(path: Path) -> Path:
    """Return the file that represents a folder of weights: its index, else its safetensors file, else its pickle.

    Raises:
        CheckpointError: ``path`` does not exist, contains no weights, or contains several files without an index.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder. Check the path.")
    for patterns in (("*.safetensors.index.json",), ("*.safetensors",), ("*.bin.index.json",), PICKLE_PATTERNS):
        files = sorted(file for pattern in patterns for file in path.glob(pattern) if file.is_file())
        default = [file for file in files if file.name in DEFAULT_NAMES]
        if len(default) == 1:
            return default[0]
        if len(files) > 1:
            raise CheckpointError(f"{path}: contains {len(files)} files of weights ({files[0].name}, ...). Give one of them.")
        if files:
            return files[0]
    raise CheckpointError(f"{path}: neither a run directory nor a checkpoint nor a folder of weights.")


def detect_format(path: Path) -> str:
    """Return the format of a file by its contents: ``safetensors``, ``torch``, ``index``, or a description of another one.

    Raises:
        CheckpointError: The file cannot be read.
    """
    start, entries = _read_signature(path)
    is_zip = start.startswith(b"PK\x03\x04")
    formats = (
        ("an empty file", not start),
        ("a truncated file of torch.save", is_zip and not entries),
        ("a TorchScript program, not a state dict", any("/code/" in name for name in entries)),
        (TORCH_EXPORT, any(name.endswith("archive_format") for name in entries)),
        ("torch", any(name.endswith("data.pkl") for name in entries) or re.match(rb"\x80[\x02-\x05]", start)),
        ("a zip archive that torch did not write", is_zip),
        ("safetensors", start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32),
        ("index", start[:1] == b"{" and "weight_map" in _read_json(path)),
        # A ModelProto starts with its version, a small number in field 1. Fields of names and numbers follow.
        (ONNX, start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a")),
    )
    return next((name for name, matches in formats if matches), "not a file of weights")


def _read_signature(path: Path) -> tuple[bytes, list[str]]:
    """Return the first bytes, and the names of the entries if the file is a complete zip archive."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        return start, zipfile.ZipFile(path).namelist() if start.startswith(b"PK\x03\x04") else []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except zipfile.BadZipFile:
        return start, []


def parse_metadata(content: Any, path: Path) -> dict[str, Any]:
    """Return the metadata of a scale_mae export (:mod:`scale_mae.weights.metadata`).

    Args:
        content: The value under ``METADATA_KEY``: a dictionary, the same as JSON text, or ``None`` in third-party files.
        path: The file, for errors.

    Raises:
        CheckpointError: The metadata is damaged.
    """
    try:
        metadata = json.loads(content) if isinstance(content, str) else content or {}
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("timm_kwargs", {}), dict):
        raise CheckpointError(f"{path}: damaged ({METADATA_KEY} metadata).")
    return metadata


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty dictionary if there is no such file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return content


def _open_safetensors(path: Path) -> TensorFiles:
    try:
        return TensorFiles(path)
    except UserError as error:
        raise CheckpointError(str(error)) from None


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, sorted."""
    weight_map = _read_json(index)["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: damaged (its weight_map is empty).")
    files = sorted({index.parent / str(name) for name in weight_map.values()})
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, but {index.name} names it.")
    return files


def _merge(shards: Iterable[Mapping[str, Tensor]], path: Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for shard in shards:
        for name in shard:
            if name in merged:
                raise CheckpointError(f"{path}: two of its shards contain {name}.")
            merged[name] = shard[name]
    return merged

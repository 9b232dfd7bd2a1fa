"""Files and folders of weights as others hand them out, told apart by what is in them and read without running any of it.

Known are safetensors files, what ``torch.save`` writes (zip archives, and its format before 2020), and folders of either, in
one file or in several with an index. Pickles are opened with torch's restricted loader, which makes tensors and plain values
only; besides, ``argparse.Namespace`` is let in, in which the reference keeps its options.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import TensorFiles
from scale_mae.checkpoint.store import CheckpointError
from scale_mae.checkpoint.zero_files import reason
from scale_mae.config import UserError
from scale_mae.system.files import sha256
from scale_mae.weights.metadata import FACTS_FILE, METADATA_KEY

# where training code puts the tensors when the file holds more than those, most usual first
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# files that hold a program with its weights
ONNX, PROGRAM = "an ONNX model, not plain weights", "a program of torch.export (.pt2), not plain weights"
SAFETENSORS = ".safetensors"
USUAL = ("model.safetensors", "pytorch_model.bin")  # as timm and transformers call it; they may put others beside it
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True)
class Opened:
    """What a file or folder of weights holds.

    Attributes:
        container: ``safetensors`` or ``torch``.
        files: that were read, sorted.
        tensors: by the names they have there; memory-mapped where the format allows it.
        beside: the metadata of a safetensors file (texts), or whatever a pickle holds beside the tensors.
        wrapped: the key of a pickle under which the tensors lay.
        config: of the folder's ``config.json``; empty where there is none.
        processor: of the folder's ``preprocessor_config.json``; likewise.
        facts: what we wrote beside the tensors, if we did.
    """

    container: str
    files: list[Path]
    tensors: Mapping[str, Tensor]
    beside: dict[str, Any]
    wrapped: str | None
    config: dict[str, Any]
    processor: dict[str, Any]
    facts: dict[str, Any]

    def digest(self) -> str:
        """The SHA-256 of the file in hexadecimal; for several, that of their checksums one after the other."""
        sums = [sha256(file) for file in self.files]
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    @property
    def archives(self) -> list[Path]:
        """Those files that are zip archives, the only ones with checksums."""
        return [file for file in self.files if zipfile.is_zipfile(file)]

    def damage(self) -> str | None:
        """The first file that differs from its checksums, and where, in one line. Reads them all."""
        return next((f"{file}: damaged ({entry})" for file in self.archives if (entry := bad_entry(file))), None)


def bad_entry(file: Path) -> str | None:
    """The first entry of a zip archive that differs from its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:
        return str(error)


def open_weights(path: Path) -> Opened:
    """Open a file or folder of weights.

    Raises:
        CheckpointError: missing, damaged, of an unknown format, or a pickle that would run code.
    """
    path = main_file(path)
    kind = container(path)
    folder = path.parent
    config, processor, facts = (_json(folder / name) for name in ("config.json", "preprocessor_config.json", FACTS_FILE))
    facts = read_facts(facts, folder)
    if kind == "index":
        places = _json(path)["weight_map"]
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{path}: damaged (names no files)")
        files = sorted({folder / str(name) for name in places.values()})
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, though {path.name} names it")
        if container(files[0]) == "safetensors":
            return Opened("safetensors", files, _several(files), {}, None, config, processor, facts)
        parts = [_tensors(_unpickle(file), file)[0] for file in files]
        return Opened("torch", files, _joined(parts, path), {}, None, config, processor, facts)
    if kind == "safetensors":
        opened = _safetensors(path)
        facts |= read_facts(opened.metadata.get(METADATA_KEY), path)
        return Opened(kind, [path], opened, dict(opened.metadata), None, config, processor, facts)
    if kind == "torch":
        tensors, beside, wrapped = _tensors(_unpickle(path), path)
        facts |= read_facts(beside.get(METADATA_KEY), path)
        return Opened(kind, [path], tensors, beside, wrapped, config, processor, facts)
    raise CheckpointError(f"{path}: {kind}; give a safetensors file, one of torch.save, or a folder of such")


def config_beside(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder, or of the folder of a file; empty where there is none.

    Raises:
        CheckpointError: not a JSON object.
    """
    return _json((path if path.is_dir() else path.parent) / "config.json")


def main_file(path: Path) -> Path:
    """The file that stands for a folder of weights: its index, else its only safetensors file, else its only pickle.

    Raises:
        CheckpointError: no such path, nothing there, or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    for patterns in (("*.safetensors.index.json",), ("*.safetensors",), ("*.bin.index.json",), PICKLES):
        found = sorted(file for pattern in patterns for file in path.glob(pattern) if file.is_file())
        usual = [file for file in found if file.name in USUAL]
        if len(usual) == 1:
            return usual[0]
        if len(found) > 1:
            raise CheckpointError(f"{path}: holds {len(found)} files of weights ({found[0].name}, ...); give one of them")
        if found:
            return found[0]
    raise CheckpointError(f"{path}: neither a run directory or checkpoint nor a folder of weights")


def container(path: Path) -> str:
    """What kind of file this is, by its content: ``safetensors``, ``torch``, ``index``, or a description of something else.

    Raises:
        CheckpointError: it cannot be read.
    """
    start, names = _peek(path)
    zipped = start.startswith(b"PK\x03\x04")
    kinds = (
        ("an empty file", not start),
        ("a damaged file of torch.save (its end is missing)", zipped and not names),
        ("a TorchScript program, not plain weights", any("/code/" in name for name in names)),
        (PROGRAM, any(name.endswith("archive_format") for name in names)),
        ("torch", any(name.endswith("data.pkl") for name in names) or re.match(rb"\x80[\x02-\x05]", start)),
        ("a zip archive that torch did not write", zipped),
        ("safetensors", start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32),
        ("index", start[:1] == b"{" and "weight_map" in _json(path)),
        # ModelProto begins with its version, a small number in field 1; names and numbers follow
        (ONNX, start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a")),
    )
    return next((kind for kind, holds in kinds if holds), "not a file of weights")


def _peek(path: Path) -> tuple[bytes, list[str]]:
    """The first bytes, and the names of the entries if it is a whole zip archive."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        return start, zipfile.ZipFile(path).namelist() if start.startswith(b"PK\x03\x04") else []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except zipfile.BadZipFile:
        return start, []


def read_facts(found: Any, path: Path) -> dict[str, Any]:
    """What we say of our own exports (:mod:`scale_mae.weights.metadata`), a text in files that hold nothing else.

    Args:
        found: what lies under our key; None for others' files.
        path: named in errors.

    Raises:
        CheckpointError: not what we write.
    """
    try:
        facts = json.loads(found) if isinstance(found, str) else found or {}
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("timm_kwargs", {}), dict):
        raise CheckpointError(f"{path}: damaged (what its {METADATA_KEY} metadata holds)")
    return facts


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _safetensors(path: Path) -> TensorFiles:
    try:
        return TensorFiles(path)
    except UserError as error:
        raise CheckpointError(str(error)) from None


def _several(files: list[Path]) -> Mapping[str, Tensor]:
    return _joined([_safetensors(file) for file in files], files[0].parent)


def _joined(parts: Iterable[Mapping[str, Tensor]], path: Path) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for part in parts:
        for name in part:
            if name in joined:
                raise CheckpointError(f"{path}: {name} is in two of its files")
            joined[name] = part[name]
    return joined


def _unpickle(path: Path) -> Any:
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            mmap = path.suffix != SAFETENSORS and file.read(2) == b"PK"  # torch goes by that name, and maps zip archives only
            file.seek(0)
            return torch.load(path if mmap else file, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise CheckpointError(
                f"{path}: refused, since it wants {wanted[1]} when it is read; only plain tensors and values are let in"
            ) from None
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from None
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from None


def _tensors(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """The tensors of an unpickled file, what lies beside them, and the key they lay under."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not tensors by name")
    wrapped = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    holder: dict[str, Any] = content if wrapped is None else content[wrapped]
    tensors = {str(name): value.detach() for name, value in holder.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name; keys are {', '.join(str(k) for k in list(content)[:5])}")
    beside = {str(key): value for key, value in content.items() if key != wrapped and not isinstance(value, Tensor)}
    return tensors, beside, wrapped

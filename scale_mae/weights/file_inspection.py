"""Inspects files and folders of weights: exports of scale_mae in every format, and third-party weights."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.config import UserError
from scale_mae.weights.key_matching import count_blocks
from scale_mae.weights.metadata import METADATA_FILE, METADATA_KEY
from scale_mae.weights.weight_files import (
    ONNX,
    TORCH_EXPORT,
    detect_format,
    find_damaged_entry,
    find_main_file,
    open_weights,
    parse_metadata,
)
from scale_mae.weights.weight_import import ImportedWeights, import_weight_files

Report = dict[str, Any]
PROBLEM = "problem"
DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NO_CHECKSUMS = "header and size of every file; the format has no checksums"
# The numbers of dtypes in a .pt2 file.
TORCH_EXPORT_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


@dataclass(frozen=True)
class _GraphContents:
    """The contents of an ONNX or torch.export file.

    Attributes:
        metadata: The metadata of a scale_mae export. Empty for third-party files.
        tensors: See :func:`count_tensors`.
        files: All files of the graph.
        verified: How the files were verified.
    """

    metadata: dict[str, Any]
    tensors: Report
    files: list[Path]
    verified: str


def inspect_weight_files(path: Path) -> Report:
    """Inspect an export or third-party weights; see :func:`scale_mae.weights.inspection.inspect`."""
    file = find_main_file(path)
    file_format = detect_format(file)
    return _inspect_graph(file, file_format) if file_format in (ONNX, TORCH_EXPORT) else _inspect_state_dict(path)


def count_bytes(paths: Iterable[Path]) -> int:
    """Return the size of files and folders in bytes."""
    return sum(p.stat().st_size for path in paths for p in [path, *path.rglob("*")] if p.is_file())


def format_size(size: Iterable[int]) -> str:
    """Return height and width as text: ``224 x 224``."""
    return " x ".join(map(str, size))


def count_tensors(tensors: Mapping[str, torch.Tensor]) -> Report:
    """Return the number of tensors, of parameters, and of tensors by dtype."""
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    return {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtypes": {DTYPE_NAMES.get(name, name): count for name, count in dtypes.most_common()},
    }


def _inspect_state_dict(path: Path) -> Report:
    files = open_weights(path)
    meta_tensors = {key: torch.empty_like(files.tensors[key], device="meta") for key in files.tensors}
    report: Report = {"kind": "tensors of an unknown model", "path": str(path)}
    try:
        weights = import_weight_files(path, replace(files, tensors=meta_tensors))
    except CheckpointError as error:
        report["not a plain ViT"] = str(error).removeprefix(f"{path}: ")
    else:
        report |= {"kind": weights.provenance.kind, **_architecture_report(weights)}
    damage = files.find_damage()
    return report | {
        **_metadata_report(files.metadata),
        **count_tensors(meta_tensors),
        "files": len(files.files),
        "bytes": count_bytes(files.files),
        "verified": None if damage else "CRC-32 of every entry" if files.archives else NO_CHECKSUMS,
        PROBLEM: damage or _find_missing_file(path, files.metadata),
    }


def _find_missing_file(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """Return an error if a file of an exported folder is missing. The metadata lists all files."""
    if not (path / METADATA_FILE).is_file():
        return None
    missing = [path / name for name in metadata.get("files", ()) if not (path / name).exists()]
    return f"{missing[0]}: missing from the export." if missing else None


def _architecture_report(weights: ImportedWeights) -> Report:
    """Return the sizes that the shapes show, and what the provenance adds."""
    tensors, provenance = weights.tensors, weights.provenance
    width, _, *patch = tensors["patch_embed.proj.weight"].shape
    heads = "" if provenance.heads is None else f", {provenance.heads} heads"
    encoder = f"width {width}, depth {count_blocks(tensors, 'blocks')}{heads}, patches of {format_size(patch)}"
    if "pos_embed" in tensors and tensors["pos_embed"].dim() == 3:
        encoder += f", {tensors['pos_embed'].shape[1] - 1} patches per image"
    report: Report = {"encoder": encoder, "LayerNorm epsilon": provenance.layer_norm_eps}
    if "decoder_embed.weight" in tensors:
        heads = "" if provenance.decoder_heads is None else f", {provenance.decoder_heads} heads"
        width = tensors["decoder_embed.weight"].shape[0]
        report["decoder"] = f"width {width}, depth {count_blocks(tensors, 'decoder_blocks')}{heads}"
    if weights.skipped:
        report["other tensors"] = ", ".join(sorted(weights.skipped))
    known = {
        "mean": list(provenance.mean) if provenance.mean else None,
        "std": list(provenance.std) if provenance.std else None,
        "step": provenance.step,
    }
    return report | {key: value for key, value in known.items() if value is not None}


def _metadata_report(metadata: Mapping[str, Any]) -> Report:
    """Return the metadata of an export without the configuration of the run."""
    keys = (
        *("format", "dtype", "image_size", "patch_size", "task", "num_classes", "probe", "ema", "pooling", "norm_pixel"),
        *("mean", "std", "step", "config_digest", "position_embeddings"),
    )
    report = {key.replace("_", " "): metadata[key] for key in keys if key in metadata}
    source = metadata.get("initialized_from")
    return report | ({"initialized from": str(source).removeprefix("Initialized from ")} if source else {})


def _inspect_graph(file: Path, file_format: str) -> Report:
    contents = (_read_onnx if file_format == ONNX else _read_torch_export)(file)
    graph = "ONNX model" if file_format == ONNX else "torch.export program"
    return {
        "kind": f"scale-mae export, {graph}" if contents.metadata else graph,
        "path": str(file),
        **_metadata_report(contents.metadata),
        **contents.tensors,
        "files": len(contents.files),
        "bytes": count_bytes(contents.files),
        "verified": contents.verified,
        PROBLEM: None,
    }


def _read_torch_export(file: Path) -> _GraphContents:
    if entry := find_damaged_entry(file):
        raise CheckpointError(f"{file}: damaged ({entry}). Copy or download the file again.")
    with zipfile.ZipFile(file) as archive:
        entries = {name.partition("/")[2]: name for name in archive.namelist()}
        metadata_entry = entries.get(f"extra/{METADATA_KEY}.json")
        metadata = archive.read(metadata_entry).decode() if metadata_entry else None
        config = json.loads(archive.read(entries["data/weights/model_weights_config.json"]))["config"]
    tensor_metas = [entry["tensor_meta"] for entry in config.values()]
    shapes = [[side["as_int"] for side in meta["sizes"]] for meta in tensor_metas]
    tensors = {
        str(i): torch.empty(shape, dtype=TORCH_EXPORT_DTYPES[meta["dtype"]], device="meta")
        for i, (shape, meta) in enumerate(zip(shapes, tensor_metas, strict=True))
    }
    return _GraphContents(parse_metadata(metadata, file), count_tensors(tensors), [file], "CRC-32 of every entry")


def _read_onnx(file: Path) -> _GraphContents:
    """Read an ONNX model without its values. A large model stores its tensors in other files of the same folder."""
    try:
        import onnx
    except ImportError:
        raise UserError(f"{file}: reading an ONNX model requires onnx. Install it: pip install 'scale-mae[export]'.") from None
    model = onnx.load(file, load_external_data=False)
    tensors = model.graph.initializer
    dtypes = Counter(onnx.TensorProto.DataType.Name(t.data_type).lower() for t in tensors)
    external = {file.parent / entry.value for t in tensors for entry in t.external_data if entry.key == "location"}
    for path in external:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but {file.name} stores tensors in it.")
    metadata = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    counts = {
        "tensors": len(tensors),
        "parameters": sum(torch.Size(t.dims).numel() for t in tensors),
        "dtypes": {{"float": "fp32", "float16": "fp16"}.get(name, name): count for name, count in dtypes.most_common()},
    }
    return _GraphContents(parse_metadata(metadata, file), counts, [file, *sorted(external)], NO_CHECKSUMS)

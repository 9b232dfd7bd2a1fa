"""What files of weights hold: exports of ours in any format, and those of others."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scale_mae.checkpoint.store import CheckpointError
from scale_mae.config import UserError
from scale_mae.weights.importing import Weights, weights_of
from scale_mae.weights.key_matching import depth
from scale_mae.weights.metadata import FACTS_FILE, METADATA_KEY
from scale_mae.weights.weight_files import ONNX, PROGRAM, bad_entry, container, main_file, open_weights, read_facts

Report = dict[str, Any]
PROBLEM = "problem"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NO_CHECKSUMS = "the format has no checksums; header and size of every file agree"
# numbers of dtypes in a .pt2
SCALAR_TYPES = {
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


def inspect_weights(path: Path) -> Report:
    """What an export, or a file or folder of others, is; see :func:`scale_mae.weights.inspect.inspect`."""
    file = main_file(path)
    kind = container(file)
    return _program(file, kind) if kind in (ONNX, PROGRAM) else _weights(path)


def bytes_in(paths: Iterable[Path]) -> int:
    """Size of files and folders."""
    return sum(p.stat().st_size for path in paths for p in [path, *path.rglob("*")] if p.is_file())


def by(pair: Iterable[int]) -> str:
    """Sides as text."""
    return " x ".join(map(str, pair))


def counts(tensors: Mapping[str, torch.Tensor]) -> Report:
    """Number of tensors and values, and how many tensors have which type."""
    types = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    return {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtypes": {SHORT.get(name, name): count for name, count in types.most_common()},
    }


def _weights(path: Path) -> Report:
    opened = open_weights(path)
    headers = {n: torch.empty_like(opened.tensors[n], device="meta") for n in opened.tensors}
    report: Report = {"kind": "tensors of an unknown model", "path": str(path)}
    try:
        weights = weights_of(path, replace(opened, tensors=headers))
    except CheckpointError as error:
        report["not a plain ViT"] = str(error).removeprefix(f"{path}: ")
    else:
        report |= {"kind": weights.origin.kind, **_sizes(weights)}
    damaged = opened.damage()
    return report | {
        **_told(opened.facts),
        **counts(headers),
        "files": len(opened.files),
        "bytes": bytes_in(opened.files),
        "verified": None if damaged else "CRC-32 of every entry" if opened.archives else NO_CHECKSUMS,
        PROBLEM: damaged or _missing(path, opened.facts),
    }


def _missing(path: Path, facts: Mapping[str, Any]) -> str | None:
    """A folder of ours lists its files."""
    if not (path / FACTS_FILE).is_file():
        return None
    return next(
        (f"{path / name}: missing from the export" for name in facts.get("files", ()) if not (path / name).exists()), None
    )


def _sizes(weights: Weights) -> Report:
    """What the shapes say, and the origin."""
    names, origin = weights.tensors, weights.origin
    width, _, *patch = names["patch_embed.proj.weight"].shape
    heads = "" if origin.heads is None else f", {origin.heads} heads"
    encoder = f"width {width}, depth {depth(names, 'blocks')}{heads}, patches of {by(patch)}"
    if "pos_embed" in names:
        encoder += f", {names['pos_embed'].shape[1] - 1} of them" if names["pos_embed"].dim() == 3 else ""
    report: Report = {"encoder": encoder, "LayerNorm epsilon": origin.layer_norm_eps}
    if "decoder_embed.weight" in names:
        heads = "" if origin.decoder_heads is None else f", {origin.decoder_heads} heads"
        width = names["decoder_embed.weight"].shape[0]
        report["decoder"] = f"width {width}, depth {depth(names, 'decoder_blocks')}{heads}"
    if weights.left_out:
        report["head"] = ", ".join(sorted(weights.left_out))
    statistics = {"mean": list(origin.mean) if origin.mean else None, "std": list(origin.std) if origin.std else None}
    return report | {key: value for key, value in {**statistics, "step": origin.step}.items() if value is not None}


def _told(facts: Mapping[str, Any]) -> Report:
    """What an export of ours says of itself, but for the whole config."""
    names = ("format", "dtype", "image_size", "patch_size", "task", "num_classes", "probe", "ema", "pooling", "norm_pixel")
    more = ("mean", "std", "step", "config_digest", "position_tables")
    told = {name.replace("_", " "): facts[name] for name in (*names, *more) if name in facts}
    began = facts.get("began_with")
    return told | ({"began with": str(began).removeprefix("began with ")} if began else {})


def _program(file: Path, kind: str) -> Report:
    facts, tensors, files, verified = (_onnx if kind == ONNX else _exported)(file)
    return {
        "kind": ("scale-mae export, " if facts else "") + ("ONNX model" if kind == ONNX else "program of torch.export"),
        "path": str(file),
        **_told(facts),
        **tensors,
        "files": len(files),
        "bytes": bytes_in(files),
        "verified": verified,
        PROBLEM: None,
    }


def _exported(file: Path) -> tuple[Report, Report, list[Path], str]:
    """Of a ``.pt2``: our facts, its tensors, its files, how it was verified."""
    if entry := bad_entry(file):
        raise CheckpointError(f"{file}: damaged ({entry})")
    with zipfile.ZipFile(file) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        facts = archive.read(names[f"extra/{METADATA_KEY}.json"]).decode() if f"extra/{METADATA_KEY}.json" in names else None
        config = json.loads(archive.read(names["data/weights/model_weights_config.json"]))["config"]
    metas = [entry["tensor_meta"] for entry in config.values()]
    shapes = [[side["as_int"] for side in meta["sizes"]] for meta in metas]
    tensors = {
        str(i): torch.empty(shape, dtype=SCALAR_TYPES[meta["dtype"]], device="meta")
        for i, (shape, meta) in enumerate(zip(shapes, metas, strict=True))
    }
    return read_facts(facts, file), counts(tensors), [file], "CRC-32 of every entry"


def _onnx(file: Path) -> tuple[Report, Report, list[Path], str]:
    """The same of an ONNX model; large ones keep their tensors in files beside it."""
    try:
        import onnx
    except ImportError:
        raise UserError(f"{file}: an ONNX model, to read which onnx is needed: pip install 'scale-mae[export]'") from None
    model = onnx.load(file, load_external_data=False)
    types = Counter(onnx.TensorProto.DataType.Name(t.data_type).lower() for t in model.graph.initializer)
    outside = {
        file.parent / entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"
    }
    for beside in outside:
        if not beside.is_file():
            raise CheckpointError(f"{beside}: missing, though {file.name} keeps tensors there")
    facts = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    counted = {
        "tensors": len(model.graph.initializer),
        "parameters": sum(torch.Size(t.dims).numel() for t in model.graph.initializer),
        "dtypes": {{"float": "fp32", "float16": "fp16"}.get(name, name): count for name, count in types.most_common()},
    }
    return read_facts(facts, file), counted, [file, *sorted(outside)], NO_CHECKSUMS

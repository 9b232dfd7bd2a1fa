"""Defines the export formats: how each is written, and how it is verified with the library that its users load it with.

To add a format, write its functions and add an entry to ``FORMATS`` and to ``WEIGHT_FORMATS`` (``weights/command.py``). If it
supports classifiers, also add it to ``CLASSIFIER_FORMATS`` (``weights/export_source.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.config import UserError
from scale_mae.weights.export_source import ExportSource
from scale_mae.weights.graph_export import (
    INSTALL_HINT,
    read_back_torch_export,
    run_onnx,
    run_torch_export,
    write_onnx,
    write_torch_export,
)
from scale_mae.weights.huggingface import (
    CLASSIFIER_ARCHITECTURE,
    ModelType,
    build_model_config,
    build_preprocessor_config,
    to_huggingface,
)
from scale_mae.weights.metadata import METADATA_KEY, build_timm_config
from scale_mae.weights.safetensors_io import TensorFiles, map_tensors, write_folder, write_tensors

if TYPE_CHECKING:  # importing timm takes seconds; convert() does it in a thread
    from scale_mae.weights.parity import Outputs, ParityBatch

SAFETENSORS = ".safetensors"
TensorPairs = tuple[Mapping[str, LazyTensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ExportFormat:
    """An export format.

    Attributes:
        suffix: Suffix of a file name. ``None`` if the format is always a folder.
        supports_folder: Whether a path without the suffix is a folder.
        has_decoder: Whether the format contains the decoder. Then parity is checked by loss and prediction, else by the tokens
            and the embedding of the encoder, or by the logits of the classifier.
        write: Writes the file or folder.
        run: Loads the file or folder and returns what it computes. ``None`` if comparing all tensors is enough.
        read_back: Returns the tensors that should be in it, and those that were read back, under the same keys. ``None`` if
            they cannot be read back.
        parity_images: Number of images of the parity check.
        disk_copies: How many copies of the tensors are on disk while it is written.
    """

    suffix: str | None
    supports_folder: bool
    has_decoder: bool
    write: Callable[[ExportSource, Path], None]
    run: Callable[[ExportSource, Path, ParityBatch], Outputs] | None
    read_back: Callable[[ExportSource, Path], TensorPairs] | None
    parity_images: int = 1
    disk_copies: int = 1


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------- timm


def _write_timm(source: ExportSource, target: Path) -> None:
    if target.suffix == SAFETENSORS:
        write_tensors(target, source.encoder, source.header)
    else:
        write_folder(target, source.encoder, source.header)
        _write_json(target / "config.json", build_timm_config(source.metadata))


def _run_timm(source: ExportSource, target: Path, batch: ParityBatch) -> Outputs:
    import timm

    from scale_mae.weights.model_builder import build_encoder
    from scale_mae.weights.parity import compute_timm_outputs, streamed_weights

    with torch.device("meta"):
        is_folder = target.is_dir()
        model = timm.create_model(f"local-dir:{target}").eval() if is_folder else build_encoder(source.metadata)
    with streamed_weights(model, map_tensors(target)):
        return compute_timm_outputs(model, batch)


def _read_back_timm(source: ExportSource, target: Path) -> TensorPairs:
    return source.encoder, TensorFiles(target)


# ---------------------------------------------------------------- state dict


def _write_state_dict(source: ExportSource, target: Path) -> None:
    if target.suffix == SAFETENSORS:
        write_tensors(target, source.exported, source.header)
    else:
        write_folder(target, source.exported, source.header, source.max_bytes)


def _read_back_state_dict(source: ExportSource, target: Path) -> TensorPairs:
    TensorFiles(target)  # raises if the safetensors library cannot read the file
    return source.exported, map_tensors(target)


# ---------------------------------------------------------------- reference repository (mae)


def _write_mae(source: ExportSource, target: Path) -> None:
    """Write a file of ``torch.save``, which needs all tensors at once. Map them from a temporary file to save memory."""
    temporary = target.with_suffix(SAFETENSORS)
    write_tensors(temporary, source.exported, {})
    mapped = map_tensors(temporary)
    torch.save({"model": {key: mapped[key] for key in source.exported}, METADATA_KEY: source.metadata}, target)
    temporary.unlink()


def _load_mae_file(target: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(target, map_location="cpu", mmap=True, weights_only=True)["model"]
    return tensors


def _run_mae(source: ExportSource, target: Path, batch: ParityBatch) -> Outputs:
    from scale_mae.weights.model_builder import build_meta_mae
    from scale_mae.weights.parity import compute_mae_outputs, streamed_weights

    assert source.config
    model = build_meta_mae(source.config)
    with streamed_weights(model, _load_mae_file(target)):
        return compute_mae_outputs(model, batch)


def _read_back_mae(source: ExportSource, target: Path) -> TensorPairs:
    return source.exported, _load_mae_file(target)


# ---------------------------------------------------------------- Hugging Face (vit_mae, vit)


def _write_huggingface(model_type: ModelType) -> Callable[[ExportSource, Path], None]:
    def write(source: ExportSource, target: Path) -> None:
        dtype = str(next(iter(source.exported.values())).dtype).removeprefix("torch.")
        config = build_model_config(source.metadata, model_type, dtype)
        write_folder(target, to_huggingface(source.exported, model_type), source.header)
        _write_json(target / "config.json", config)
        _write_json(target / "preprocessor_config.json", build_preprocessor_config(source.metadata))

    return write


def _read_back_huggingface(model_type: ModelType) -> Callable[[ExportSource, Path], TensorPairs]:
    return lambda source, target: (to_huggingface(source.exported, model_type), TensorFiles(target))


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(f"transformers, which verifies this format, is not installed. {INSTALL_HINT}") from None
    return transformers


@torch.inference_mode()
def _run_huggingface(source: ExportSource, target: Path, batch: ParityBatch) -> Outputs:
    transformers = _import_transformers()
    (architecture,) = json.loads((target / "config.json").read_text())["architectures"]
    arguments: dict[str, Any] = {"add_pooling_layer": False} if architecture == "ViTModel" else {}
    had_progress_bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loading_info = getattr(transformers, architecture).from_pretrained(
            target, local_files_only=True, dtype=torch.float32, output_loading_info=True, **arguments
        )
    finally:
        if had_progress_bar:
            transformers.utils.logging.enable_progress_bar()
    if problems := {kind: keys for kind, keys in loading_info.items() if keys}:
        raise UserError(f"transformers cannot load the export: {problems}.")
    model.eval()
    if architecture == CLASSIFIER_ARCHITECTURE:
        return {"logits": model(batch.images).logits}
    if architecture == "ViTModel":
        tokens = model(batch.images).last_hidden_state
        return {"tokens": tokens, "embedding": tokens[:, 0]}
    model.config.mask_ratio = batch.mask_ratio
    output = model(batch.images, noise=batch.noise)
    return {"loss": output.loss, "pred": output.logits}


FORMATS: dict[str, ExportFormat] = {
    "timm": ExportFormat(
        suffix=SAFETENSORS,
        supports_folder=True,
        has_decoder=False,
        write=_write_timm,
        run=_run_timm,
        read_back=_read_back_timm,
    ),
    "vit_mae": ExportFormat(
        suffix=None,
        supports_folder=True,
        has_decoder=True,
        write=_write_huggingface("vit_mae"),
        run=_run_huggingface,
        read_back=_read_back_huggingface("vit_mae"),
    ),
    "vit": ExportFormat(
        suffix=None,
        supports_folder=True,
        has_decoder=False,
        write=_write_huggingface("vit"),
        run=_run_huggingface,
        read_back=_read_back_huggingface("vit"),
    ),
    "mae": ExportFormat(
        suffix=".pth",
        supports_folder=False,
        has_decoder=True,
        write=_write_mae,
        run=_run_mae,
        read_back=_read_back_mae,
        disk_copies=2,
    ),
    "state_dict": ExportFormat(
        suffix=SAFETENSORS,
        supports_folder=True,
        has_decoder=True,
        write=_write_state_dict,
        run=None,
        read_back=_read_back_state_dict,
    ),
    "onnx": ExportFormat(
        suffix=".onnx",
        supports_folder=False,
        has_decoder=False,
        write=write_onnx,
        run=run_onnx,
        read_back=None,
        parity_images=3,
    ),
    "torch_export": ExportFormat(
        suffix=".pt2",
        supports_folder=False,
        has_decoder=False,
        write=write_torch_export,
        run=run_torch_export,
        read_back=read_back_torch_export,
        parity_images=3,
    ),
}

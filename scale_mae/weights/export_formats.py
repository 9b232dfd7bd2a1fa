"""The formats of exported weights: how each is written, and what it computes when read back the way its users read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scale_mae.checkpoint.safetensors_io import LazyTensor, TensorFiles, map_tensors, write_folder, write_tensors
from scale_mae.config import UserError
from scale_mae.weights.export_source import Source
from scale_mae.weights.graph_export import (
    EXTRA,
    onnx_outputs,
    torch_export_outputs,
    torch_export_tensors,
    write_onnx,
    write_torch_export,
)
from scale_mae.weights.huggingface import CLASSIFIER, Kind, model_config, preprocessor_config, to_huggingface
from scale_mae.weights.metadata import METADATA_KEY, timm_config

if TYPE_CHECKING:  # timm takes seconds to import; convert() does it meanwhile
    from scale_mae.weights.parity import Outputs, Probe

SAFETENSORS = ".safetensors"
Tensors = tuple[Mapping[str, LazyTensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        suffix: how the name of a file ends; None: always a folder.
        folder: whether any other name is that of a folder.
        whole: the decoder too, compared by loss and prediction; else the encoder, by tokens and embedding, or the classifier,
            by logits.
        images: computed at once when it is verified.
        write: makes the file or folder.
        outputs: what it computes; None where every tensor is compared to the bit instead, which says more.
        tensors: what is in it, and the same read back from it, under the same names; None where it cannot be read back.
        copies: how often its values lie on the disk while it is written.
    """

    suffix: str | None
    folder: bool
    whole: bool
    images: int
    write: Callable[[Source, Path], None]
    outputs: Callable[[Source, Path, Probe], Outputs] | None
    tensors: Callable[[Source, Path], Tensors] | None
    copies: int = 1


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_timm(source: Source, target: Path) -> None:
    if target.suffix == SAFETENSORS:
        write_tensors(target, source.encoder, source.metadata)
    else:
        write_folder(target, source.encoder, source.metadata)
        _write_json(target / "config.json", timm_config(source.facts))


def _timm(source: Source, target: Path, probe: Probe) -> Outputs:
    import timm

    from scale_mae.weights.models import build_encoder
    from scale_mae.weights.parity import streamed, timm_outputs

    with torch.device("meta"):
        folder = target.is_dir()
        encoder = timm.create_model(f"local-dir:{target}").eval() if folder else build_encoder(source.facts)
    with streamed(encoder, map_tensors(target)):
        return timm_outputs(encoder, probe)


def _write_state_dict(source: Source, target: Path) -> None:
    if target.suffix == SAFETENSORS:
        write_tensors(target, source.exported, source.metadata)
    else:
        write_folder(target, source.exported, source.metadata, source.max_bytes)


def _state_dict_tensors(source: Source, target: Path) -> tuple[Mapping[str, LazyTensor], Mapping[str, Tensor]]:
    TensorFiles(target)  # it is what safetensors takes for a file of its own
    return source.exported, map_tensors(target)


def _mae_with(source: Source, weights: Mapping[str, Tensor], probe: Probe) -> Outputs:
    from scale_mae.weights.parity import empty_mae, mae_outputs, streamed

    assert source.config
    model = empty_mae(source.config)
    with streamed(model, weights):
        return mae_outputs(model, probe)


def _write_mae(source: Source, target: Path) -> None:
    """Through a file of the same tensors that is mapped into memory, since ``torch.save`` wants all at once."""
    passing = target.with_suffix(SAFETENSORS)
    write_tensors(passing, source.exported, {})
    mapped = map_tensors(passing)
    torch.save({"model": {name: mapped[name] for name in source.exported}, METADATA_KEY: source.facts}, target)
    passing.unlink()


def _mae_tensors(target: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(target, map_location="cpu", mmap=True, weights_only=True)["model"]
    return tensors


def _mae(source: Source, target: Path, probe: Probe) -> Outputs:
    return _mae_with(source, _mae_tensors(target), probe)


def _write_huggingface(kind: Kind) -> Callable[[Source, Path], None]:
    def write(source: Source, target: Path) -> None:
        dtype = str(next(iter(source.exported.values())).dtype).removeprefix("torch.")
        config = model_config(source.facts, kind, dtype)
        write_folder(target, to_huggingface(source.exported, kind), source.metadata)
        _write_json(target / "config.json", config)
        _write_json(target / "preprocessor_config.json", preprocessor_config(source.facts))

    return write


def _huggingface_tensors(kind: Kind) -> Callable[[Source, Path], Tensors]:
    return lambda source, target: (to_huggingface(source.exported, kind), TensorFiles(target))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(f"transformers, which would verify this format, is not installed; {EXTRA}") from None
    return transformers


@torch.inference_mode()
def _huggingface(source: Source, target: Path, probe: Probe) -> Outputs:
    transformers = _transformers()
    (architecture,) = json.loads((target / "config.json").read_text())["architectures"]
    arguments: dict[str, Any] = {"add_pooling_layer": False} if architecture == "ViTModel" else {}
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, architecture).from_pretrained(
            target, local_files_only=True, dtype=torch.float32, output_loading_info=True, **arguments
        )
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    if problems := {what: found for what, found in report.items() if found}:
        raise UserError(f"transformers finds {problems}")
    model.eval()
    if architecture == CLASSIFIER:
        return {"logits": model(probe.images).logits}
    if architecture == "ViTModel":
        tokens = model(probe.images).last_hidden_state
        return {"tokens": tokens, "embedding": tokens[:, 0]}
    model.config.mask_ratio = probe.mask_ratio
    output = model(probe.images, noise=probe.noise)
    return {"loss": output.loss, "pred": output.logits}


FORMATS: dict[str, Format] = {
    "timm": Format(SAFETENSORS, True, False, 1, _write_timm, _timm, lambda s, target: (s.encoder, TensorFiles(target))),
    "vit_mae": Format(None, True, True, 1, _write_huggingface("vit_mae"), _huggingface, _huggingface_tensors("vit_mae")),
    "vit": Format(None, True, False, 1, _write_huggingface("vit"), _huggingface, _huggingface_tensors("vit")),
    "mae": Format(".pth", False, True, 1, _write_mae, _mae, lambda s, target: (s.exported, _mae_tensors(target)), copies=2),
    "state_dict": Format(SAFETENSORS, True, True, 1, _write_state_dict, None, _state_dict_tensors),
    "onnx": Format(".onnx", False, False, 3, write_onnx, onnx_outputs, None),
    "torch_export": Format(".pt2", False, False, 3, write_torch_export, torch_export_outputs, torch_export_tensors),
}

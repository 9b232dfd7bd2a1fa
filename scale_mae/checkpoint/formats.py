"""The formats of exported weights: how each is written, and what it computes when read back the way its users read it."""

from __future__ import annotations

import io
import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scale_mae.checkpoint.facts import METADATA_KEY, timm_config
from scale_mae.checkpoint.huggingface import ARCHITECTURES, Kind, model_config, preprocessor_config, to_huggingface
from scale_mae.checkpoint.tensor_file import Lazy, map_tensors, write_folder, write_tensors
from scale_mae.config import Config, UserError

if TYPE_CHECKING:  # timm takes seconds to import; convert() does it meanwhile
    from scale_mae.checkpoint.parity import Outputs, Probe

SAFETENSORS = ".safetensors"
ONNX_BYTES = 1.5e9
EXTRA = "pip install 'scale-mae[export]'"


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        weights: fp32, under our names; position tables of the size asked for.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        facts: see :mod:`scale_mae.checkpoint.facts`.
        config: of the run, with the image size asked for; None for what others trained.
        exported: the weights in the types that they are written in.
        max_bytes: of a file, where a format may have several.
    """

    weights: Mapping[str, Lazy]
    dtype: str
    facts: dict[str, Any]
    config: Config | None
    exported: Mapping[str, Lazy]
    max_bytes: float = math.inf

    @property
    def encoder(self) -> dict[str, Lazy]:
        """The encoder's part of ``exported``, under the names that timm has for its way of pooling."""
        part = {n: t for n, t in self.exported.items() if not n.startswith("decoder_") and n != "mask_token"}
        if self.facts["timm_kwargs"]["global_pool"] == "avg":
            part = {f"fc_{n}" if n.startswith("norm.") else n: t for n, t in part.items()}
        return part

    @property
    def metadata(self) -> dict[str, str]:
        """The facts as a text under their key."""
        return {METADATA_KEY: json.dumps(self.facts)}


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        suffix: how the name of a file ends; None: always a folder.
        folder: whether any other name is that of a folder.
        whole: the decoder too, compared by loss and prediction; else the encoder, by tokens and embedding.
        images: computed at once when it is verified.
        write: makes the file or folder.
        outputs: what it computes.
        copies: how often its values lie on the disk while it is written.
    """

    suffix: str | None
    folder: bool
    whole: bool
    images: int
    write: Callable[[Source, Path], None]
    outputs: Callable[[Source, Path, Probe], Outputs]
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

    from scale_mae.checkpoint.export import build_encoder
    from scale_mae.checkpoint.parity import streamed, timm_outputs

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


def _state_dict(source: Source, target: Path, probe: Probe) -> Outputs:
    return _mae_with(source, map_tensors(target), probe)


def _mae_with(source: Source, weights: Mapping[str, Tensor], probe: Probe) -> Outputs:
    from scale_mae.checkpoint.parity import empty_mae, mae_outputs, streamed

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


def _mae(source: Source, target: Path, probe: Probe) -> Outputs:
    content = torch.load(target, map_location="cpu", mmap=True, weights_only=True)
    return _mae_with(source, content["model"], probe)


def _write_huggingface(kind: Kind) -> Callable[[Source, Path], None]:
    def write(source: Source, target: Path) -> None:
        dtype = str(next(iter(source.exported.values())).dtype).removeprefix("torch.")
        config = model_config(source.facts, kind, dtype)
        write_folder(target, to_huggingface(source.exported, kind), source.metadata)
        _write_json(target / "config.json", config)
        _write_json(target / "preprocessor_config.json", preprocessor_config(source.facts))

    return write


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(f"transformers, which would verify this format, is not installed; {EXTRA}") from None
    return transformers


@torch.inference_mode()
def _huggingface(source: Source, target: Path, probe: Probe) -> Outputs:
    transformers = _transformers()
    kind: Kind = json.loads((target / "config.json").read_text())["model_type"]
    arguments: dict[str, Any] = {"add_pooling_layer": False} if kind == "vit" else {}
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, ARCHITECTURES[kind]).from_pretrained(
            target, local_files_only=True, dtype=torch.float32, output_loading_info=True, **arguments
        )
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    if problems := {what: found for what, found in report.items() if found}:
        raise UserError(f"transformers finds {problems}")
    model.eval()
    if kind == "vit":
        tokens = model(probe.images).last_hidden_state
        return {"tokens": tokens, "embedding": tokens[:, 0]}
    model.config.mask_ratio = probe.mask_ratio
    output = model(probe.images, noise=probe.noise)
    return {"loss": output.loss, "pred": output.logits}


class _Program(nn.Module):
    """An encoder as a program: fp32 images to fp32 ``tokens`` and ``embedding``, whatever the type of its weights."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        from scale_mae.checkpoint.export import build_encoder

        with torch.device("meta"):
            self.encoder = build_encoder(source.facts)
        weights = {name: tensor.read() for name, tensor in source.encoder.items()}
        self.encoder.load_state_dict(weights, strict=True, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` to ``[B, 1 + L, D]`` and ``[B, D]``."""
        tokens = self.encoder.forward_features(images.to(self.encoder.cls_token.dtype))
        return tokens.float(), self.encoder.forward_head(tokens, pre_logits=True).float()


def _example(source: Source) -> Tensor:
    return torch.zeros(2, 3, *source.facts["image_size"])


def _at_two_batch_sizes(probe: Probe, run: Callable[[Tensor], Any]) -> Outputs:
    """All images at once, the first one replaced by what it gives alone: a fixed batch size would show."""
    tokens, embedding = (torch.as_tensor(part).clone() for part in run(probe.images))
    for part, alone in zip((tokens, embedding), run(probe.images[:1]), strict=True):
        part[:1] = torch.as_tensor(alone)
    return {"tokens": tokens, "embedding": embedding}


def _write_torch_export(source: Source, target: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(_Program(source), (_example(source),), dynamic_shapes={"images": {0: batch}})
    content = io.BytesIO()  # on a full disk torch would end the process
    torch.export.save(program, content, extra_files={f"{METADATA_KEY}.json": source.metadata[METADATA_KEY]})
    target.write_bytes(content.getbuffer())


@torch.inference_mode()
def _torch_export(source: Source, target: Path, probe: Probe) -> Outputs:
    return _at_two_batch_sizes(probe, torch.export.load(target).module())


def _write_onnx(source: Source, target: Path) -> None:
    if source.dtype == "bf16":
        raise UserError("--to onnx --dtype bf16: onnxruntime has no bf16 arithmetic on CPUs to verify it with; use fp16")
    _onnxruntime()
    program = torch.onnx.export(
        _Program(source),
        (_example(source),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["tokens", "embedding"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
    )
    assert program
    program.model.metadata_props.update(source.metadata)
    # a file of this format holds 2 GB at most; what is more lies beside it, under a name that no earlier file refers to
    named = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    program.save(named, external_data=sum(t.nbytes for t in source.encoder.values()) > ONNX_BYTES)
    named.rename(target)


def _onnxruntime() -> Any:
    try:
        import onnx
        import onnxruntime
        import onnxscript

        assert onnx
        assert onnxscript
    except ImportError as error:
        raise UserError(f"{error.name}, which --to onnx needs, is not installed; {EXTRA}") from None
    return onnxruntime


def _onnx(source: Source, target: Path, probe: Probe) -> Outputs:
    session = _onnxruntime().InferenceSession(target, providers=["CPUExecutionProvider"])
    return _at_two_batch_sizes(probe, lambda images: session.run(None, {"images": images.numpy()}))


FORMATS: dict[str, Format] = {
    "timm": Format(SAFETENSORS, True, False, 1, _write_timm, _timm),
    "vit_mae": Format(None, True, True, 1, _write_huggingface("vit_mae"), _huggingface),
    "vit": Format(None, True, False, 1, _write_huggingface("vit"), _huggingface),
    "mae": Format(".pth", False, True, 1, _write_mae, _mae, copies=2),
    "state_dict": Format(SAFETENSORS, True, True, 1, _write_state_dict, _state_dict),
    "onnx": Format(".onnx", False, False, 3, _write_onnx, _onnx),
    "torch_export": Format(".pt2", False, False, 3, _write_torch_export, _torch_export),
}

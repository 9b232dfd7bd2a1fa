"""Encoders and classifiers as programs, which need none of our code: ONNX and torch.export, written and run."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scale_mae.checkpoint.safetensors_io import LazyTensor
from scale_mae.config import UserError
from scale_mae.weights.metadata import METADATA_KEY

if TYPE_CHECKING:
    from scale_mae.weights.export_source import Source
    from scale_mae.weights.parity import Outputs, Probe

ONNX_BYTES = 1.5e9
EXTRA = "pip install 'scale-mae[export]'"


class _Program(nn.Module):
    """An encoder as a program: fp32 images to fp32 ``tokens`` and ``embedding``, of a classifier to ``logits``, whatever the
    type of its weights."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        from scale_mae.weights.models import build_encoder

        with torch.device("meta"):
            self.encoder = build_encoder(source.facts)
        weights = {name: tensor.read() for name, tensor in source.encoder.items()}
        self.encoder.load_state_dict(weights, strict=True, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``[B, 3, H, W]`` to ``[B, 1 + L, D]`` and ``[B, D]``, or to ``[B, K]``."""
        tokens = self.encoder.forward_features(images.to(self.encoder.cls_token.dtype))
        if not isinstance(self.encoder.head, nn.Identity):
            return (self.encoder.forward_head(tokens).float(),)
        return tokens.float(), self.encoder.forward_head(tokens, pre_logits=True).float()


def _example(source: Source) -> Tensor:
    return torch.zeros(2, 3, *source.facts["image_size"])


def _names(source: Source) -> list[str]:
    """Of the outputs."""
    return ["logits"] if source.facts["timm_kwargs"]["num_classes"] else ["tokens", "embedding"]


def _at_two_batch_sizes(source: Source, probe: Probe, run: Callable[[Tensor], Any]) -> Outputs:
    """All images at once, the first one replaced by what it gives alone: a fixed batch size would show."""
    outputs = [torch.as_tensor(part).clone() for part in run(probe.images)]
    for part, single in zip(outputs, run(probe.images[:1]), strict=True):
        part[:1] = torch.as_tensor(single)
    return dict(zip(_names(source), outputs, strict=True))


def write_torch_export(source: Source, target: Path) -> None:
    """Write a ``.pt2`` for any batch size."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(_Program(source), (_example(source),), dynamic_shapes={"images": {0: batch}})
    content = io.BytesIO()  # on a full disk torch would end the process
    torch.export.save(program, content, extra_files={f"{METADATA_KEY}.json": source.metadata[METADATA_KEY]})
    target.write_bytes(content.getbuffer())


@torch.inference_mode()
def torch_export_outputs(source: Source, target: Path, probe: Probe) -> Outputs:
    """What it computes."""
    return _at_two_batch_sizes(source, probe, torch.export.load(target).module())


def write_onnx(source: Source, target: Path) -> None:
    """Write an ``.onnx`` for any batch size, and a file beside it if it is large.

    Raises:
        UserError: bf16, or packages that are not installed.
    """
    if source.dtype == "bf16":
        raise UserError("--to onnx --dtype bf16: onnxruntime has no bf16 arithmetic on CPUs to verify it with; use fp16")
    _onnxruntime()
    program = torch.onnx.export(
        _Program(source),
        (_example(source),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=_names(source),
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


def onnx_outputs(source: Source, target: Path, probe: Probe) -> Outputs:
    """What it computes in onnxruntime, on the host."""
    session = _onnxruntime().InferenceSession(target, providers=["CPUExecutionProvider"])
    return _at_two_batch_sizes(source, probe, lambda images: session.run(None, {"images": images.numpy()}))


def torch_export_tensors(source: Source, target: Path) -> tuple[dict[str, LazyTensor], dict[str, Tensor]]:
    """What is to be in it, and what is."""
    return {f"encoder.{name}": t for name, t in source.encoder.items()}, torch.export.load(target).state_dict

"""Exports encoders and classifiers as computation graphs that need no code of scale_mae: ONNX and torch.export."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scale_mae.checkpoint.lazy_tensor import LazyTensor
from scale_mae.config import UserError
from scale_mae.weights.metadata import METADATA_KEY

if TYPE_CHECKING:
    from scale_mae.weights.export_source import ExportSource
    from scale_mae.weights.parity import Outputs, ParityBatch

ONNX_INLINE_BYTES = 1.5e9  # an ONNX file is limited to 2 GB; larger tensors are stored in a file next to it
INSTALL_HINT = "Install it: pip install 'scale-mae[export]'."


class _GraphModule(nn.Module):
    """The model to trace. Input and outputs are fp32 for every dtype of the weights.

    An encoder returns ``tokens`` and ``embedding``, a classifier ``logits``.
    """

    def __init__(self, source: ExportSource) -> None:
        super().__init__()
        from scale_mae.weights.model_builder import build_encoder

        with torch.device("meta"):
            self.encoder = build_encoder(source.metadata)
        weights = {key: tensor.read() for key, tensor in source.encoder.items()}
        self.encoder.load_state_dict(weights, strict=True, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map ``[B, 3, H, W]`` to ``[B, 1 + L, D]`` and ``[B, D]``, or to ``[B, K]``."""
        tokens = self.encoder.forward_features(images.to(self.encoder.cls_token.dtype))
        if not isinstance(self.encoder.head, nn.Identity):
            return (self.encoder.forward_head(tokens).float(),)
        return tokens.float(), self.encoder.forward_head(tokens, pre_logits=True).float()


def _example_images(source: ExportSource) -> Tensor:
    return torch.zeros(2, 3, *source.metadata["image_size"])


def _output_names(source: ExportSource) -> list[str]:
    return ["logits"] if source.metadata["timm_kwargs"]["num_classes"] else ["tokens", "embedding"]


def _run_at_two_batch_sizes(source: ExportSource, batch: ParityBatch, run: Callable[[Tensor], Any]) -> Outputs:
    """Run all images at once, then the first one alone, and return both. A graph with a fixed batch size would fail."""
    outputs = [torch.as_tensor(output).clone() for output in run(batch.images)]
    for output, single in zip(outputs, run(batch.images[:1]), strict=True):
        output[:1] = torch.as_tensor(single)
    return dict(zip(_output_names(source), outputs, strict=True))


def write_torch_export(source: ExportSource, target: Path) -> None:
    """Write a ``.pt2`` file that accepts any batch size."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(_GraphModule(source), (_example_images(source),), dynamic_shapes={"images": {0: batch}})
    content = io.BytesIO()  # torch ends the process if it writes to a full disk itself
    torch.export.save(program, content, extra_files={f"{METADATA_KEY}.json": source.header[METADATA_KEY]})
    target.write_bytes(content.getbuffer())


@torch.inference_mode()
def run_torch_export(source: ExportSource, target: Path, batch: ParityBatch) -> Outputs:
    """Return what a ``.pt2`` file computes."""
    return _run_at_two_batch_sizes(source, batch, torch.export.load(target).module())


def read_back_torch_export(source: ExportSource, target: Path) -> tuple[dict[str, LazyTensor], dict[str, Tensor]]:
    """Return the expected and the actual tensors of a ``.pt2`` file, under the same keys."""
    return {f"encoder.{key}": t for key, t in source.encoder.items()}, torch.export.load(target).state_dict


def write_onnx(source: ExportSource, target: Path) -> None:
    """Write an ``.onnx`` file that accepts any batch size. Large tensors go to a file next to it.

    Raises:
        UserError: The dtype is bf16, or a required package is not installed.
    """
    if source.dtype == "bf16":
        raise UserError("--to onnx --dtype bf16: onnxruntime cannot verify bf16 on the CPU. Use --dtype fp16.")
    _import_onnxruntime()
    program = torch.onnx.export(
        _GraphModule(source),
        (_example_images(source),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=_output_names(source),
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
    )
    assert program
    program.model.metadata_props.update(source.header)
    # A random part makes the name of the external file unique, so that no earlier ONNX file refers to it.
    unique = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    program.save(unique, external_data=sum(t.nbytes for t in source.encoder.values()) > ONNX_INLINE_BYTES)
    unique.rename(target)


def _import_onnxruntime() -> Any:
    try:
        import onnx
        import onnxruntime
        import onnxscript

        assert onnx
        assert onnxscript
    except ImportError as error:
        raise UserError(f"--to onnx: the package {error.name} is not installed. {INSTALL_HINT}") from None
    return onnxruntime


def run_onnx(source: ExportSource, target: Path, batch: ParityBatch) -> Outputs:
    """Return what an ``.onnx`` file computes in onnxruntime on the CPU."""
    session = _import_onnxruntime().InferenceSession(target, providers=["CPUExecutionProvider"])
    return _run_at_two_batch_sizes(source, batch, lambda images: session.run(None, {"images": images.numpy()}))

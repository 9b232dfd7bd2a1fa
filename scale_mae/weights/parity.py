"""Checks the parity of an export: the exported model must compute what the checkpoint computes, for a few fixed images.

Models are built on the meta device, and each layer gets its weights only while it computes. A forward pass therefore needs
little more memory than the largest tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from scale_mae.checkpoint.errors import CheckpointError
from scale_mae.checkpoint.lazy_tensor import LazyTensorReader
from scale_mae.config import Config, UserError
from scale_mae.model.mae import MAE
from scale_mae.model.sizes import PROBE_EPS
from scale_mae.weights.classifier_heads import ClassifierHead
from scale_mae.weights.export_source import ExportSource
from scale_mae.weights.metadata import Pool, encoder_metadata
from scale_mae.weights.model_builder import build_encoder, build_meta_mae

Outputs = dict[str, Tensor]
# Largest difference of an output between export and checkpoint, relative to the standard deviation of the output.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.25, "fp16": 0.05}


@dataclass(frozen=True)
class ParityBatch:
    """The input of the forward passes, which is always the same for an image size.

    One sixteenth of the patches is visible. That is enough, because a wrong weight shows in every token, and it is fast.

    Attributes:
        images: ``[B, 3, H, W]``
        noise: Mask noise ``[B, L]``.
        mask_ratio: Fraction of patches that is hidden.
    """

    images: Tensor
    noise: Tensor
    mask_ratio: float

    @classmethod
    def for_config(cls, config: Config, count: int) -> ParityBatch:
        """Return ``count`` images for a model. Every second image has the inverted mask noise of the one before."""
        m = config.model
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, *m.image_size, generator=generator)
        patches = (m.image_size[0] // m.patch[0]) * (m.image_size[1] // m.patch[1])
        noise = torch.rand(count, patches, generator=generator)
        noise[1::2] = 1 - noise[::2][: count // 2]
        visible = max(1, patches // 16)
        return cls(images, noise, 1 - (visible + 0.5) / patches)  # plus half a patch, because the model rounds down


@contextmanager
def streamed_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model on the meta device compute in fp32. Read the weights of a module again each time it computes.

    Args:
        model: A model on the meta device. The tensors of its outermost module stay in memory within the context.
        weights: A state dict with exactly the keys and shapes of the model.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """
    state = model.state_dict()
    if set(state) != set(weights):
        missing, unexpected = sorted(set(state) - set(weights)), sorted(set(weights) - set(state))
        raise CheckpointError(
            f"the tensors do not match the model: missing keys {missing[:3]}, unexpected keys {unexpected[:3]}."
        )

    def load(module: nn.Module, prefix: str) -> None:
        for owned in (module._parameters, module._buffers):
            for key, empty in owned.items():
                if empty is not None:
                    tensor = weights[prefix + key].float()
                    if tensor.shape != empty.shape:
                        shapes = f"{prefix}{key} has shape {list(tensor.shape)}, the model {list(empty.shape)}"
                        raise CheckpointError(f"the tensors do not match the model: {shapes}.")
                    owned[key] = nn.Parameter(tensor, requires_grad=False) if owned is module._parameters else tensor  # type: ignore[assignment]

    def unload(module: nn.Module) -> None:
        for owned in (module._parameters, module._buffers):
            for key, tensor in owned.items():
                if tensor is not None:
                    owned[key] = tensor.to("meta")  # type: ignore[assignment]

    hooks = []
    for name, module in model.named_modules():
        if name and any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            hooks.append(module.register_forward_pre_hook(lambda m, _, prefix=f"{name}.": load(m, prefix)))
            hooks.append(module.register_forward_hook(lambda m, *_: unload(m)))
    load(model, "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a few tokens, one thread is faster than several
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        unload(model)
        for hook in hooks:
            hook.remove()


class _ProbeHead(nn.Module):
    """The head of a linear probe as it was trained: BatchNorm, then one of the linear layers."""

    def __init__(self, width: int, classes: int, probe: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=PROBE_EPS, affine=False)
        self.probes = nn.ModuleDict({str(probe): nn.Linear(width, classes)})

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return the logits ``[B, K]``."""
        features: Tensor = self.norm(features_BD)
        for layer in self.probes.values():
            features = layer(features)
        return features


def build_meta_classifier(metadata: dict[str, Any], head: ClassifierHead) -> VisionTransformer:
    """Build the classifier of a run on the meta device, with the keys of its checkpoint."""
    with torch.device("meta"):
        if head.probe is None:
            return build_encoder(metadata)
        model = build_encoder(encoder_metadata(metadata))
        model.head = _ProbeHead(model.embed_dim, len(head.classes), head.probe)
        return model.eval()


def compute_checkpoint_outputs(source: ExportSource, batch: ParityBatch, *, with_decoder: bool) -> Outputs:
    """Return what a checkpoint of scale_mae computes.

    Returns:
        The ``logits`` of a classifier. For a MAE: the outputs of :func:`compute_mae_outputs` if ``with_decoder``, else those
        of :func:`compute_encoder_outputs`.
    """
    assert source.config
    weights = LazyTensorReader(source.weights)
    if source.head:
        classifier = build_meta_classifier(source.metadata, source.head)
        with streamed_weights(classifier, weights):
            return compute_timm_outputs(classifier, batch)
    model = build_meta_mae(source.config)
    with streamed_weights(model, weights):
        if with_decoder:
            return compute_mae_outputs(model, batch)
        return compute_encoder_outputs(model, batch, source.metadata["timm_kwargs"]["global_pool"])


@torch.inference_mode()
def compute_encoder_outputs(model: MAE, batch: ParityBatch, pool: Pool) -> Outputs:
    """Return what a timm encoder computes for unmasked images: ``tokens`` ``[B, 1 + L, D]`` and ``embedding`` ``[B, D]``.

    With ``avg``, the tokens are those before the final norm, and the embedding is the norm of their mean.
    """
    before_norm: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    tokens = model.features(batch.images)
    hook.remove()
    if pool == "token":
        return {"tokens": tokens, "embedding": tokens[:, 0]}
    return {"tokens": before_norm[0], "embedding": model.norm(before_norm[0][:, 1:].mean(dim=1))}


@torch.inference_mode()
def compute_timm_outputs(model: VisionTransformer, batch: ParityBatch) -> Outputs:
    """Return ``tokens`` and ``embedding`` of a timm encoder, or the ``logits`` ``[B, K]`` of a timm classifier."""
    if not isinstance(model.head, nn.Identity):
        return {"logits": model(batch.images)}
    tokens = model.forward_features(batch.images)
    return {"tokens": tokens, "embedding": model.forward_head(tokens, pre_logits=True)}


@torch.inference_mode()
def compute_mae_outputs(model: MAE, batch: ParityBatch) -> Outputs:
    """Return ``loss`` and ``pred`` for masked images."""
    output = model(batch.images, batch.noise, batch.mask_ratio)
    return {"loss": output.loss, "pred": output.pred}


def check_parity(expected: Outputs, outputs: Mapping[str, Any], dtype: str, out: object) -> None:
    """Compare the outputs of checkpoint and export.

    Args:
        expected: The outputs of the checkpoint.
        outputs: The outputs of the export.
        dtype: The dtype of the export.
        out: The path of the export, for the error.

    Raises:
        UserError: An output differs by more than the tolerance of the dtype.
    """
    for name, reference in expected.items():
        scale = reference.std() if reference.numel() > 1 else reference.abs()
        difference = ((outputs[name].float() - reference).abs().max() / scale).item()
        if not difference <= TOLERANCE[dtype]:
            raise UserError(
                f"{out}: not written; the export's {name} differ from the checkpoint's by {difference:.2g} of their standard "
                f"deviation. The limit for {dtype} is {TOLERANCE[dtype]}."
            )

"""The forward passes that prove an export: what it computes for a few fixed images, beside what the checkpoint computes.

Models are made without memory for their weights; each layer is given its own for the moment in which it computes. So a pass
takes little more memory than the largest tensor, whatever the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from scale_mae.checkpoint.safetensors_io import Reading
from scale_mae.checkpoint.store import CheckpointError
from scale_mae.config import Config, UserError
from scale_mae.model.mae import MAE
from scale_mae.model.sizes import PROBE_EPS
from scale_mae.weights.classifier_heads import Head
from scale_mae.weights.export_source import Source
from scale_mae.weights.metadata import Pool, without_head
from scale_mae.weights.models import build_encoder, model_from_config

Outputs = dict[str, Tensor]
# Largest difference of an output between the export and the checkpoint, relative to the output's deviation.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.25, "fp16": 0.05}


@dataclass(frozen=True)
class Probe:
    """``images`` ``[B, 3, H, W]``, mask noise ``[B, L]`` and the share it hides, always the same for one size.

    A sixteenth of the patches is seen: a weight that differs shows in any token, and each token costs time.
    """

    images: Tensor
    noise: Tensor
    mask_ratio: float

    @classmethod
    def of(cls, config: Config, count: int) -> Probe:
        """``count`` images for a model; every second one is masked the other way round."""
        m = config.model
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, *m.image_size, generator=generator)
        patches = (m.image_size[0] // m.patch[0]) * (m.image_size[1] // m.patch[1])
        noise = torch.rand(count, patches, generator=generator)
        noise[1::2] = 1 - noise[::2][: count // 2]
        seen = max(1, patches // 16)
        return cls(images, noise, 1 - (seen + 0.5) / patches)  # half a patch more, as the ratio is rounded down


def empty_mae(config: Config) -> MAE:
    """The model of a run, without memory for its weights."""
    with torch.device("meta"):
        return model_from_config(config).eval()


@contextmanager
def streamed(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let an empty model compute with ``weights``, read anew for each use, in fp32.

    Args:
        model: on the meta device. What its outermost module owns itself is there all the time.
        weights: exactly the model's ``state_dict``, by names and shapes.

    Raises:
        CheckpointError: a tensor is missing, superfluous or misshapen.
    """
    wanted = model.state_dict()
    if set(wanted) != set(weights):
        missing, superfluous = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
        raise CheckpointError(f"its tensors do not fit the model: missing {missing[:3]}, superfluous {superfluous[:3]}")

    def fill(module: nn.Module, prefix: str) -> None:
        for owned in (module._parameters, module._buffers):
            for key, hollow in owned.items():
                if hollow is not None:
                    tensor = weights[prefix + key].float()
                    if tensor.shape != hollow.shape:
                        raise CheckpointError(f"{prefix}{key} is {list(tensor.shape)}, the model needs {list(hollow.shape)}")
                    owned[key] = nn.Parameter(tensor, requires_grad=False) if owned is module._parameters else tensor  # type: ignore[assignment]

    def drain(module: nn.Module) -> None:
        for owned in (module._parameters, module._buffers):
            for key, full in owned.items():
                if full is not None:
                    owned[key] = full.to("meta")  # type: ignore[assignment]

    handles = []
    for name, module in model.named_modules():
        if name and any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            handles.append(module.register_forward_pre_hook(lambda m, _, prefix=f"{name}.": fill(m, prefix)))
            handles.append(module.register_forward_hook(lambda m, *_: drain(m)))
    fill(model, "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a few tokens are sooner computed than shared out
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        drain(model)
        for handle in handles:
            handle.remove()


class _Probed(nn.Module):
    """The head of a linear probe as it was trained: BatchNorm, then one of the linear layers of the sweep."""

    def __init__(self, width: int, classes: int, probe: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=PROBE_EPS, affine=False)
        self.probes = nn.ModuleDict({str(probe): nn.Linear(width, classes)})

    def forward(self, features_BD: Tensor) -> Tensor:
        """``[B, K]``."""
        features: Tensor = self.norm(features_BD)
        for layer in self.probes.values():
            features = layer(features)
        return features


def empty_classifier(facts: dict[str, Any], head: Head) -> VisionTransformer:
    """The classifier of a run, with the names that its checkpoint has, without memory for its weights."""
    with torch.device("meta"):
        if head.probe is None:
            return build_encoder(facts)
        model = build_encoder(without_head(facts))
        model.head = _Probed(model.embed_dim, len(head.classes), head.probe)
        return model.eval()


def source_outputs(source: Source, probe: Probe, *, whole: bool) -> Outputs:
    """What a checkpoint of ours computes: of a classifier ``logits``, of a MAE what :func:`mae_outputs` gives if ``whole``,
    else its encoder's outputs."""
    assert source.config
    weights = Reading(source.weights)
    if source.head:
        classifier = empty_classifier(source.facts, source.head)
        with streamed(classifier, weights):
            return timm_outputs(classifier, probe)
    model = empty_mae(source.config)
    with streamed(model, weights):
        return mae_outputs(model, probe) if whole else encoder_outputs(model, probe, source.facts["timm_kwargs"]["global_pool"])


@torch.inference_mode()
def encoder_outputs(model: MAE, probe: Probe, pool: Pool) -> Outputs:
    """What a timm encoder makes of whole images: ``tokens`` ``[B, 1 + L, D]`` and ``embedding`` ``[B, D]``.

    With ``avg`` the tokens are those before the final norm, and the embedding is the norm of their mean.
    """
    before: list[Tensor] = []
    handle = model.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    tokens = model.features(probe.images)
    handle.remove()
    if pool == "token":
        return {"tokens": tokens, "embedding": tokens[:, 0]}
    return {"tokens": before[0], "embedding": model.norm(before[0][:, 1:].mean(dim=1))}


@torch.inference_mode()
def timm_outputs(encoder: VisionTransformer, probe: Probe) -> Outputs:
    """The same of a timm model; of one with a head ``logits`` ``[B, K]``."""
    if not isinstance(encoder.head, nn.Identity):
        return {"logits": encoder(probe.images)}
    tokens = encoder.forward_features(probe.images)
    return {"tokens": tokens, "embedding": encoder.forward_head(tokens, pre_logits=True)}


@torch.inference_mode()
def mae_outputs(model: MAE, probe: Probe) -> Outputs:
    """``loss`` and ``pred`` of masked images."""
    output = model(probe.images, probe.noise, probe.mask_ratio)
    return {"loss": output.loss, "pred": output.pred}


def require_equal(expected: Outputs, got: Mapping[str, Any], dtype: str, out: object) -> None:
    """Compare what the checkpoint and the export compute.

    Raises:
        UserError: they differ by more than the dtype explains.
    """
    for name, wanted in expected.items():
        scale = wanted.std() if wanted.numel() > 1 else wanted.abs()
        difference = ((got[name].float() - wanted).abs().max() / scale).item()
        if not difference <= TOLERANCE[dtype]:
            raise UserError(
                f"{out}: not written; its {name} differs from the checkpoint's by {difference:.2g} of its deviation, more than "
                f"{TOLERANCE[dtype]} for {dtype}"
            )

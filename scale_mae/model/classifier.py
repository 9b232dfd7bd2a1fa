"""A ViT classifier: fine-tuned as a whole or in its last blocks, or frozen with linear probes on top.

Shapes: B images, C classes, D width, N probes. Parameter names are those of timm, so that weights load without renaming.
Frozen weights are buffers under their usual names. They stay exactly as they were loaded, in fp32, because the optimizer and
the engine change, shard and round parameters only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from scale_mae.model.flops import Flops, vit_flops
from scale_mae.model.losses import soft_target_cross_entropy
from scale_mae.model.sizes import LAYER_NORM_EPS, PROBE_EPS, EncoderSize

Pool = Literal["mean", "token"]
POOLS: dict[Pool, Literal["avg", "token"]] = {"mean": "avg", "token": "token"}  # name in scale_mae -> name in timm
# Standard deviations of initial weights, from the code of He et al. 2022.
HEAD_STD = 2e-5  # of a head that is fine-tuned with its encoder
PROBE_STD = 0.01  # of a linear probe


class ClassifierOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        loss: Cross-entropy in nats, scalar, fp32.
        logits: ``[B, C]``, or ``[N, B, C]`` for probes.
    """

    loss: Tensor
    logits: Tensor


class LinearProbes(nn.Module):
    """Several linear classifiers on the same features, after a BatchNorm without affine parameters (He et al. 2022, A.1).

    Args:
        width: D.
        classes: C.
        count: N.
    """

    def __init__(self, width: int, classes: int, count: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=PROBE_EPS)
        linear = [nn.Linear(width, classes) for _ in range(count)]
        for probe in linear:
            nn.init.trunc_normal_(probe.weight, std=PROBE_STD)
            nn.init.zeros_(probe.bias)
        self.probes = nn.ModuleList(linear)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return the logits, ``[N, B, C]``."""
        scaled = self.norm(features_BD.float()).to(self.probes[0].weight.dtype)
        return torch.stack([probe(scaled) for probe in self.probes])


class Classifier(VisionTransformer):  # type: ignore[misc]
    """A ViT classifier. All parts are trained until :meth:`freeze` or :meth:`add_probes` is called.

    Args:
        size: Width, depth and heads.
        image_size: (height, width) in pixels.
        patch_size: (height, width) in pixels; must divide ``image_size``.
        classes: C.
        pool: ``mean`` of the patch tokens, then ``fc_norm``; or the class ``token`` after ``norm``.
        drop_path: Stochastic depth rate of the last block. The rates rise linearly from 0 at the first block.

    Attributes:
        frozen: Whether any part is frozen.
        lr_multipliers: Multiple of the learning rate of each probe.
    """

    def __init__(
        self,
        size: EncoderSize,
        *,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        classes: int,
        pool: Pool = "mean",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            image_size,
            patch_size,
            num_classes=classes,
            global_pool=POOLS[pool],
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            mlp_ratio=size.mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
            drop_path_rate=drop_path,
        )
        self.size, self.drop_path = size, drop_path
        self.lr_multipliers: tuple[float, ...] = (1.0,)
        self.frozen = False
        self._frozen_fraction = 0.0  # of the blocks, to count operations

    def freeze(self, trainable_blocks: float) -> None:
        """Freeze everything except the last blocks, the norm after them, and the head.

        Args:
            trainable_blocks: Number of blocks to train. With half a block, its MLP is trained. With 0, only the head is.

        Raises:
            ValueError: The encoder has fewer blocks.
        """
        depth, full, half = len(self.blocks), int(trainable_blocks), trainable_blocks % 1
        if trainable_blocks > depth:
            raise ValueError(
                f"classify.trainable_blocks={trainable_blocks:g}, but the encoder has {depth} blocks. Set at most {depth}."
            )
        _to_buffers(self.patch_embed)
        for name in ("cls_token", "pos_embed"):
            _to_buffer(self, name)
        for block in self.blocks[: depth - full]:
            _to_buffers(block)
        if half:
            block = self.blocks[depth - full - 1]
            for part in (block.norm2, block.mlp):
                _to_parameters(part)
        if not trainable_blocks:
            _to_buffers(self.norm)
            _to_buffers(self.fc_norm)
        for module in self.modules():  # autocast does not convert the input of a layer norm, which must match its weights
            if isinstance(module, nn.LayerNorm) and any(True for _ in module.parameters()):
                module.register_forward_pre_hook(lambda norm, inputs: inputs[0].to(norm.weight.dtype))
        self.frozen = True
        # approximately two thirds of the operations of a block are in its MLP
        self._frozen_fraction = (depth - full - half * 2 / 3) / depth

    def add_probes(self, lr_multipliers: Sequence[float]) -> None:
        """Freeze everything and replace the head by linear probes.

        Args:
            lr_multipliers: Multiple of the learning rate of each probe.
        """
        self.freeze(0)
        self.lr_multipliers = tuple(lr_multipliers)
        self.head = LinearProbes(self.embed_dim, self.num_classes, len(self.lr_multipliers))

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """The trained blocks: the backward pass needs their activations."""
        return [block for block in self.blocks if any(True for _ in block.parameters())]

    @property
    def uses_rng(self) -> bool:
        """Whether the forward pass of a block draws random numbers."""
        return self.drop_path > 0

    def lr_scales(self) -> dict[str, float]:
        """Return the multiple of the learning rate by parameter name. For other parameters it is 1."""
        if not isinstance(self.head, LinearProbes):
            return {}
        names = [name for name, _ in self.head.named_parameters()]
        return {f"head.{name}": self.lr_multipliers[int(name.split(".")[1])] for name in names}

    def flops(self) -> Flops:
        """Return the floating-point operations per image."""
        outputs = self.num_classes * len(self.lr_multipliers)
        patches, pixels = self.patch_embed.num_patches, 3 * math.prod(self.patch_embed.patch_size)
        return vit_flops(self.size, num_patches=patches, patch_pixels=pixels, classes=outputs, frozen=self._frozen_fraction)

    def batch_norm_statistics(self) -> list[Tensor]:
        """Return the running statistics of the BatchNorms themselves, in fp32. They differ between processes."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm1d)]
        return [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]

    def forward(self, images_B3HW: Tensor, targets_BC: Tensor | None = None) -> ClassifierOutput:
        """Classify images and compute the loss.

        Args:
            images_B3HW: Normalized images.
            targets_BC: Probability of each class. Without it the loss is 0.
        """
        dtype = next(p.dtype for p in self.parameters())
        with self._autocast(images_B3HW.device, dtype):
            x = images_B3HW if self.frozen else images_B3HW.to(dtype)
            logits = self.head(self.forward_head(self.forward_features(x), pre_logits=True))
        loss = torch.zeros((), device=logits.device)
        if targets_BC is not None:
            loss = soft_target_cross_entropy(logits, targets_BC)
        return ClassifierOutput(loss, logits)

    def _autocast(self, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """Compute products in the dtype of the trained weights. The frozen weights are in fp32."""
        mixed = self.frozen and dtype != torch.float32
        return torch.autocast(device.type, dtype=dtype) if mixed else nullcontext()

    def _apply(self, fn: Any, recurse: bool = True) -> Classifier:
        buffers = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, before in buffers.items():
            moved = self.get_buffer(name)
            if moved.dtype != before.dtype:  # a cast would round the frozen weights
                owner, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(owner), attribute, before.to(moved.device))
        return self


def build_classifier(size: EncoderSize, *, seed: int, from_scratch: bool, **kwargs: Any) -> Classifier:
    """Build a classifier whose initial weights depend on the seed only. Nothing is frozen yet.

    Args:
        size: Size of the encoder.
        seed: Seed of the initial weights.
        from_scratch: The encoder is trained from these weights. Otherwise it gets pre-trained weights later, and the head
            starts near zero.
        kwargs: Further arguments of :class:`Classifier`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(size, **kwargs)
        if not from_scratch:
            nn.init.trunc_normal_(model.head.get_parameter("weight"), std=HEAD_STD)
    return model


def _to_buffers(module: nn.Module) -> None:
    """Replace all parameters by buffers of the same names."""
    for part in module.modules():
        for name in [*part._parameters]:
            _to_buffer(part, name)


def _to_buffer(module: nn.Module, name: str) -> None:
    tensor = getattr(module, name)
    if tensor is not None:
        delattr(module, name)
        module.register_buffer(name, tensor.detach())


def _to_parameters(module: nn.Module) -> None:
    """Replace all buffers by parameters of the same names."""
    for part in module.modules():
        for name in [*part._buffers]:
            tensor = getattr(part, name)
            if tensor is not None:
                delattr(part, name)
                part.register_parameter(name, nn.Parameter(tensor))

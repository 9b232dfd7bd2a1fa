"""A ViT that classifies: fine-tuned as a whole, in its last blocks only, or with frozen weights under linear probes.

Shapes: B images, C classes, D width, N probes. Parameter names are timm's, so that files interchange without a rename table.
What is not trained is a buffer under its usual name, as it is of no concern to the optimizer, nor to the engine that shards and
rounds parameters: it stays fp32, to the bit.
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
from torch.nn import functional

from scale_mae.model.flops import Flops, vit_flops
from scale_mae.model.sizes import LAYER_NORM_EPS, PROBE_EPS, EncoderSize

Pool = Literal["mean", "token"]
POOLS: dict[Pool, Literal["avg", "token"]] = {"mean": "avg", "token": "token"}  # as timm calls them
HEAD_STD, PROBE_STD = 2e-5, 0.01  # of the first weights of a head on trained and on frozen features; He et al. 2022, code


class ClassifierOutput(NamedTuple):
    """``loss`` scalar fp32, the cross entropy in nats; ``logits`` ``[B, C]``, of probes ``[N, B, C]``."""

    loss: Tensor
    logits: Tensor


class LinearProbes(nn.Module):
    """Linear classifiers side by side on the same features, which a BatchNorm without affine scales (He et al. 2022, A.1).

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
        """Logits ``[N, B, C]``."""
        scaled = self.norm(features_BD.float()).to(self.probes[0].weight.dtype)
        return torch.stack([probe(scaled) for probe in self.probes])


class Classifier(VisionTransformer):  # type: ignore[misc]
    """See this module's text.

    Args:
        size: width, depth and heads.
        image_size: (height, width) in pixels.
        patch: (height, width) in pixels; divides ``image_size``.
        classes: C.
        pool: ``mean`` of the patch tokens, then ``fc_norm``; or the class ``token`` after ``norm``.
        drop_path: stochastic depth of the last block; from 0 for the first in equal steps.
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
        self.rates: tuple[float, ...] = (1.0,)
        self.frozen, self._frozen_share = False, 0.0  # whether any part is; share of the blocks that are, for counting

    def freeze(self, train_blocks: float) -> None:
        """Train the last blocks only, with the norm after them and the head; of half a block its MLP.

        Args:
            train_blocks: 0 leaves the head alone.

        Raises:
            ValueError: the encoder has not so many blocks.
        """
        depth, whole, half = len(self.blocks), int(train_blocks), train_blocks % 1
        if train_blocks > depth:
            raise ValueError(f"classify.trainable_blocks={train_blocks:g}, but the encoder has {depth} blocks")
        _to_buffers(self.patch_embed)
        for name in ("cls_token", "pos_embed"):
            _to_buffer(self, name)
        for block in self.blocks[: depth - whole]:
            _to_buffers(block)
        if half:
            block = self.blocks[depth - whole - 1]
            for part in (block.norm2, block.mlp):
                _to_buffers(part, back=True)
        if not train_blocks:
            _to_buffers(self.norm)
            _to_buffers(self.fc_norm)
        for module in self.modules():  # of what autocast leaves to itself, which takes no input finer than its weights
            if isinstance(module, nn.LayerNorm) and any(True for _ in module.parameters()):
                module.register_forward_pre_hook(lambda norm, given: given[0].to(norm.weight.dtype))
        self.frozen = True
        # the MLP is two thirds of a block's products, near enough
        self._frozen_share = (depth - whole - half * 2 / 3) / depth

    def probe(self, rates: Sequence[float]) -> None:
        """Freeze everything, and put linear probes in the head's place.

        Args:
            rates: multiple of the learning rate of each.
        """
        self.freeze(0)
        self.head, self.rates = LinearProbes(self.embed_dim, self.num_classes, len(rates)), tuple(rates)

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """Blocks whose activations the backward pass needs."""
        return [block for block in self.blocks if any(True for _ in block.parameters())]

    @property
    def uses_rng(self) -> bool:
        """Whether the forward pass of a block draws random numbers."""
        return self.drop_path > 0

    def lr_scales(self) -> dict[str, float]:
        """Multiple of the learning rate, by name of a parameter; of others it is 1."""
        if not isinstance(self.head, LinearProbes):
            return {}
        names = [name for name, _ in self.head.named_parameters()]
        return {f"head.{name}": self.rates[int(name.split(".")[1])] for name in names}

    def flops(self) -> Flops:
        """Operations of one image."""
        heads = self.num_classes * len(self.rates)
        patches, pixels = self.patch_embed.num_patches, 3 * math.prod(self.patch_embed.patch_size)
        return vit_flops(self.size, num_patches=patches, patch_pixels=pixels, classes=heads, frozen=self._frozen_share)

    def statistics(self) -> list[Tensor]:
        """Running means of what a process has seen, which differ between processes; fp32, in place."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm1d)]
        return [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]

    def forward(self, images_B3HW: Tensor, targets_BC: Tensor | None = None) -> ClassifierOutput:
        """Classify.

        Args:
            images_B3HW: normalised images.
            targets_BC: probability of each class; None: the loss is 0.
        """
        trained = next(p.dtype for p in self.parameters())
        with self._arithmetic(images_B3HW.device, trained):
            x = images_B3HW if self.frozen else images_B3HW.to(trained)
            logits = self.head(self.forward_head(self.forward_features(x), pre_logits=True))
        loss = torch.zeros((), device=logits.device)
        if targets_BC is not None:
            # a probe's loss is its own: the sum of all gives each the gradients that it would have alone
            likelihoods = functional.log_softmax(logits.float(), dim=-1)
            loss = -(targets_BC.float() * likelihoods).sum(dim=-1).mean(dim=-1).sum()
        return ClassifierOutput(loss, logits)

    def _arithmetic(self, device: torch.device, trained: torch.dtype) -> AbstractContextManager[Any]:
        """Frozen weights are fp32, trained ones what the engine makes of them: products are computed in the latter."""
        mixed = self.frozen and trained != torch.float32
        return torch.autocast(device.type, dtype=trained) if mixed else nullcontext()

    def _apply(self, fn: Any, recurse: bool = True) -> Classifier:
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != before.dtype:  # a cast would round what is to stay as it is
                owner, _, own = name.rpartition(".")
                setattr(self.get_submodule(owner), own, before.to(moved.device))
        return self


def build_classifier(size: EncoderSize, *, seed: int, scratch: bool, **kwargs: Any) -> Classifier:
    """A classifier whose first weights are a function of ``seed``; nothing is frozen yet.

    Args:
        size: of the encoder.
        seed: of everything random.
        scratch: its encoder is going to learn from these weights; else it gets others, and the head begins near zero.
        kwargs: see :class:`Classifier`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(size, **kwargs)
        if not scratch:
            nn.init.trunc_normal_(model.head.get_parameter("weight"), std=HEAD_STD)
    return model


def _to_buffers(module: nn.Module, *, back: bool = False) -> None:
    for part in module.modules():
        for name in [*(part._buffers if back else part._parameters)]:
            _to_buffer(part, name, back=back)


def _to_buffer(module: nn.Module, name: str, *, back: bool = False) -> None:
    """Make a parameter a buffer of the same name, or the other way round."""
    tensor = getattr(module, name)
    if tensor is None:
        return
    delattr(module, name)
    if back:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor.detach())

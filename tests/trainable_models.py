"""A small classifier that the engine can train: timm's ViT plus the members of ``TrainableModule``."""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

CLASSES, SIDE = 5, 16


class Output(NamedTuple):
    loss: Tensor
    logits: Tensor


class SmallClassifier(VisionTransformer):
    """A ViT of depth 4. It takes images ``[B, 3, 16, 16]`` and labels ``[B]``, or images alone and returns logits."""

    def __init__(self, drop_path=0.0, lr_scales=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": CLASSES}
            super().__init__(**sizes, global_pool="avg", drop_path_rate=drop_path)
            nn.init.normal_(self.head.weight, std=0.1)  # with zeros, the layers below would have no gradient in the first step
        self._lr_scales, self.uses_rng = lr_scales or {}, drop_path > 0

    @property
    def transformer_blocks(self):
        return list(self.blocks)

    def lr_scales(self):
        return self._lr_scales

    def forward(self, images, labels=None):
        logits = super().forward(images.to(self.cls_token.dtype)).float()
        return logits if labels is None else Output(nn.functional.cross_entropy(logits, labels), logits)


def labeled_batch(step, size=8):
    """Return random images and labels that depend only on ``step``."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, SIDE, SIDE, generator=generator), torch.randint(CLASSES, (size,), generator=generator)

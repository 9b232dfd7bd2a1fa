"""Exact operation counts of the models."""

from __future__ import annotations

from dataclasses import dataclass

from scale_mae.model.sizes import EncoderSize


@dataclass(frozen=True)
class Flops:
    """Operations of one image in a MAE; 1 multiply-add = 2, matrix products only (the usual convention for MFU).

    ``patch_embed`` is apart because its backward pass computes no gradient with respect to the image. ``blocks`` has the
    forward pass of each transformer block, encoder first, and of these operations those of the block's last product.
    ``frozen`` are those of the forward pass that have no backward pass; if there are any, ``patch_embed`` is among them.
    """

    patch_embed: int
    encoder: int
    bridge: int
    decoder: int
    predict: int
    blocks: tuple[tuple[int, int], ...]
    frozen: int = 0

    @property
    def forward(self) -> int:
        """Operations of the forward pass."""
        return self.patch_embed + self.encoder + self.bridge + self.decoder + self.predict

    @property
    def train(self) -> int:
        """Operations of forward and backward; recomputed activations are not work done and do not count."""
        return 3 * self.forward - (2 * self.frozen or self.patch_embed)


def _block(tokens: int, width: int, mlp_ratio: float) -> tuple[int, int]:
    hidden = int(width * mlp_ratio)
    projections = 2 * tokens * width * (3 * width + width + 2 * hidden)
    attention = 2 * 2 * tokens * tokens * width
    return projections + attention, 2 * tokens * width * hidden


def mae_flops(
    size: EncoderSize,
    *,
    num_patches: int,
    num_visible: int,
    patch_pixels: int,
    decoder_width: int = 512,
    decoder_depth: int = 8,
) -> Flops:
    """Operation counts of one image.

    Args:
        size: the encoder.
        patches: L, patches of the whole image.
        num_visible: visible patches that the encoder sees.
        patch_pixels: values in one patch, ``3 * patch_h * patch_w``.
        decoder_width: D of the decoder.
        decoder_depth: blocks of the decoder.
    """
    encoder = [_block(num_visible + 1, size.width, size.mlp_ratio)] * size.depth
    decoder = [_block(num_patches + 1, decoder_width, 4.0)] * decoder_depth
    return Flops(
        patch_embed=2 * num_patches * patch_pixels * size.width,
        encoder=sum(whole for whole, _ in encoder),
        bridge=2 * (num_visible + 1) * size.width * decoder_width,
        decoder=sum(whole for whole, _ in decoder),
        predict=2 * (num_patches + 1) * decoder_width * patch_pixels,
        blocks=(*encoder, *decoder),
    )


def vit_flops(size: EncoderSize, *, num_patches: int, patch_pixels: int, classes: int, frozen: float = 0.0) -> Flops:
    """Operation counts of one image in a classifier, which sees every patch.

    Args:
        size: the encoder.
        patches: L.
        patch_pixels: values in one patch, ``3 * patch_h * patch_w``.
        classes: outputs of the head.
        frozen: share of the blocks that is not trained, from the first on; the patch projection is not either then.
    """
    block = _block(num_patches + 1, size.width, size.mlp_ratio)
    embed, trained = 2 * num_patches * patch_pixels * size.width, round(size.depth * (1 - frozen))
    return Flops(
        patch_embed=embed,
        encoder=block[0] * size.depth,
        bridge=0,
        decoder=0,
        predict=2 * size.width * classes,
        blocks=(block,) * trained,
        frozen=round(embed + block[0] * size.depth * frozen) if frozen else 0,
    )

"""Counts the floating-point operations of the models exactly."""

from __future__ import annotations

from dataclasses import dataclass

from scale_mae.model.sizes import EncoderSize


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per image.

    A multiply-add counts as 2. Only matrix products count, as is usual for MFU.

    Attributes:
        patch_embed: Forward pass of the patch projection. Its backward pass computes no gradient for the image.
        encoder: Forward pass of the encoder blocks.
        decoder_embed: Forward pass of the projection from encoder to decoder.
        decoder: Forward pass of the decoder blocks.
        head: Forward pass of the last layer: the predictor of a masked autoencoder, or the head of a classifier.
        blocks: For each trained block, encoder first: the operations of its forward pass, and those of its last product.
        frozen: Forward pass of all parts that have no backward pass. If it is not 0, it includes ``patch_embed``.
    """

    patch_embed: int
    encoder: int
    decoder_embed: int
    decoder: int
    head: int
    blocks: tuple[tuple[int, int], ...]
    frozen: int = 0

    @property
    def forward(self) -> int:
        """Operations of the forward pass."""
        return self.patch_embed + self.encoder + self.decoder_embed + self.decoder + self.head

    @property
    def train(self) -> int:
        """Operations of the forward and backward pass. Recomputed activations do not count."""
        return 3 * self.forward - (2 * self.frozen or self.patch_embed)


def _block(tokens: int, width: int, mlp_ratio: float) -> tuple[int, int]:
    """Return the operations of a transformer block, and those of its last product."""
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
    """Count the operations of a masked autoencoder for one image.

    Args:
        size: The size of the encoder.
        num_patches: Patches of the image.
        num_visible: Patches that the encoder sees.
        patch_pixels: Values per patch, ``3 * patch_h * patch_w``.
        decoder_width: Width of the decoder.
        decoder_depth: Blocks of the decoder.
    """
    encoder = [_block(num_visible + 1, size.width, size.mlp_ratio)] * size.depth
    decoder = [_block(num_patches + 1, decoder_width, 4.0)] * decoder_depth
    return Flops(
        patch_embed=2 * num_patches * patch_pixels * size.width,
        encoder=sum(block for block, _ in encoder),
        decoder_embed=2 * (num_visible + 1) * size.width * decoder_width,
        decoder=sum(block for block, _ in decoder),
        head=2 * (num_patches + 1) * decoder_width * patch_pixels,
        blocks=(*encoder, *decoder),
    )


def vit_flops(size: EncoderSize, *, num_patches: int, patch_pixels: int, classes: int, frozen: float = 0.0) -> Flops:
    """Count the operations of a classifier for one image.

    Args:
        size: The size of the encoder, which sees every patch.
        num_patches: Patches of the image.
        patch_pixels: Values per patch, ``3 * patch_h * patch_w``.
        classes: Outputs of the head.
        frozen: Fraction of the blocks that is not trained, from the first block on. If it is not 0, the patch projection is
            not trained either.
    """
    block = _block(num_patches + 1, size.width, size.mlp_ratio)
    embed, trained = 2 * num_patches * patch_pixels * size.width, round(size.depth * (1 - frozen))
    return Flops(
        patch_embed=embed,
        encoder=block[0] * size.depth,
        decoder_embed=0,
        decoder=0,
        head=2 * size.width * classes,
        blocks=(block,) * trained,
        frozen=round(embed + block[0] * size.depth * frozen) if frozen else 0,
    )

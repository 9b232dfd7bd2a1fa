"""The table of encoder sizes, and exact operation counts for any of them."""

from __future__ import annotations

from dataclasses import dataclass

LAYER_NORM_EPS = 1e-6  # of every norm of encoder and decoder
PROBE_EPS = 1e-6  # of the BatchNorm before linear probes


@dataclass(frozen=True)
class Size:
    """One encoder: width and depth in the paper's sense, and the patch side it is usually built with (pixels)."""

    width: int
    depth: int
    heads: int
    patch: int
    mlp_ratio: float = 4.0


# tiny, small, base, large: Touvron et al. 2021 and Dosovitskiy et al. 2021; huge: He et al. 2022; giant: Zhai et al. 2022;
# 2b: Singh et al. 2023 (MAE pre-pretraining). nano is ours: it learns on two CPU cores in minutes, for the demo.
SIZES: dict[str, Size] = {
    "nano": Size(width=96, depth=6, heads=3, patch=16),
    "tiny": Size(width=192, depth=12, heads=3, patch=16),
    "small": Size(width=384, depth=12, heads=6, patch=16),
    "base": Size(width=768, depth=12, heads=12, patch=16),
    "large": Size(width=1024, depth=24, heads=16, patch=16),
    "huge": Size(width=1280, depth=32, heads=16, patch=14),
    "giant": Size(width=1408, depth=40, heads=16, patch=14, mlp_ratio=48 / 11),
    "2b": Size(width=2560, depth=24, heads=32, patch=14),
}


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
    size: Size,
    *,
    patches: int,
    kept: int,
    patch_pixels: int,
    decoder_width: int = 512,
    decoder_depth: int = 8,
) -> Flops:
    """Operation counts of one image.

    Args:
        size: the encoder.
        patches: L, patches of the whole image.
        kept: visible patches that the encoder sees.
        patch_pixels: values in one patch, ``3 * patch_h * patch_w``.
        decoder_width: D of the decoder.
        decoder_depth: blocks of the decoder.
    """
    encoder = [_block(kept + 1, size.width, size.mlp_ratio)] * size.depth
    decoder = [_block(patches + 1, decoder_width, 4.0)] * decoder_depth
    return Flops(
        patch_embed=2 * patches * patch_pixels * size.width,
        encoder=sum(whole for whole, _ in encoder),
        bridge=2 * (kept + 1) * size.width * decoder_width,
        decoder=sum(whole for whole, _ in decoder),
        predict=2 * (patches + 1) * decoder_width * patch_pixels,
        blocks=(*encoder, *decoder),
    )


def vit_flops(size: Size, *, patches: int, patch_pixels: int, classes: int, frozen: float = 0.0) -> Flops:
    """Operation counts of one image in a classifier, which sees every patch.

    Args:
        size: the encoder.
        patches: L.
        patch_pixels: values in one patch, ``3 * patch_h * patch_w``.
        classes: outputs of the head.
        frozen: share of the blocks that is not trained, from the first on; the patch projection is not either then.
    """
    block = _block(patches + 1, size.width, size.mlp_ratio)
    embed, trained = 2 * patches * patch_pixels * size.width, round(size.depth * (1 - frozen))
    return Flops(
        patch_embed=embed,
        encoder=block[0] * size.depth,
        bridge=0,
        decoder=0,
        predict=2 * size.width * classes,
        blocks=(block,) * trained,
        frozen=round(embed + block[0] * size.depth * frozen) if frozen else 0,
    )

"""The table of encoder sizes."""

from __future__ import annotations

from dataclasses import dataclass

LAYER_NORM_EPS = 1e-6  # of every layer norm in encoder and decoder
PROBE_EPS = 1e-6  # of the BatchNorm before linear probes


@dataclass(frozen=True)
class EncoderSize:
    """The size of an encoder.

    Attributes:
        width: Embedding dimension.
        depth: Number of transformer blocks.
        heads: Number of attention heads.
        patch_size: Default patch side in pixels.
        mlp_ratio: Hidden width of the MLP as a multiple of ``width``.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    mlp_ratio: float = 4.0


# Sources: tiny, small, base and large, Touvron et al. 2021 and Dosovitskiy et al. 2021; huge, He et al. 2022; giant, Zhai et
# al. 2022; 2b, Singh et al. 2023 (MAE pre-pretraining). nano is from scale_mae: it learns in minutes on two CPU cores.
SIZES: dict[str, EncoderSize] = {
    "nano": EncoderSize(width=96, depth=6, heads=3, patch_size=16),
    "tiny": EncoderSize(width=192, depth=12, heads=3, patch_size=16),
    "small": EncoderSize(width=384, depth=12, heads=6, patch_size=16),
    "base": EncoderSize(width=768, depth=12, heads=12, patch_size=16),
    "large": EncoderSize(width=1024, depth=24, heads=16, patch_size=16),
    "huge": EncoderSize(width=1280, depth=32, heads=16, patch_size=14),
    "giant": EncoderSize(width=1408, depth=40, heads=16, patch_size=14, mlp_ratio=48 / 11),
    "2b": EncoderSize(width=2560, depth=24, heads=32, patch_size=14),
}

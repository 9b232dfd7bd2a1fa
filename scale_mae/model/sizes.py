"""The table of encoder sizes, and exact operation counts for any of them."""

from __future__ import annotations

from dataclasses import dataclass

LAYER_NORM_EPS = 1e-6  # of every norm of encoder and decoder
PROBE_EPS = 1e-6  # of the BatchNorm before linear probes


@dataclass(frozen=True)
class EncoderSize:
    """One encoder: width and depth in the paper's sense, and the patch side it is usually built with (pixels)."""

    width: int
    depth: int
    heads: int
    patch_size: int
    mlp_ratio: float = 4.0


# tiny, small, base, large: Touvron et al. 2021 and Dosovitskiy et al. 2021; huge: He et al. 2022; giant: Zhai et al. 2022;
# 2b: Singh et al. 2023 (MAE pre-pretraining). nano is ours: it learns on two CPU cores in minutes, for the demo.
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

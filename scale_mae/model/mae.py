"""The masked autoencoder (He et al. 2022): encoder on visible patches, light decoder on all, loss on the removed ones.

Shapes: B images, L patches, K visible patches, D encoder width, E decoder width, P values of a patch.
Parameter names are those of the published weights, so that files interchange without a rename table.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from scale_mae.model.flops import Flops, mae_flops
from scale_mae.model.masking import num_visible_patches, random_masking
from scale_mae.model.pos_embed import sincos_pos_embed
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES, EncoderSize
from scale_mae.model.targets import Target, compute_target

POS_EMBED_NAMES = ("pos_embed", "decoder_pos_embed")  # fp32 buffers, never trained


class MAEOutput(NamedTuple):
    """``loss`` scalar fp32; ``pred`` ``[B, L, P]``; ``mask`` ``[B, L]``, 1 = removed; ``latent`` ``[B, 1 + K, D]``."""

    loss: Tensor
    pred: Tensor
    mask: Tensor
    latent: Tensor


class MAE(nn.Module):
    """Masked autoencoder with a ViT encoder.

    Args:
        size: the encoder's width, depth and heads.
        image_size: (height, width) in pixels.
        patch: (height, width) in pixels; must divide ``image_size``.
        mask_ratio: share of patches removed, in (0, 1).
        target: ``norm_pixel`` (each patch normalised by its own mean and deviation) or ``pixel``.
        decoder_width: E, divisible by 4 and by ``decoder_heads``.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.

    Raises:
        ValueError: sizes that do not divide, or a mask ratio that keeps or removes nothing.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor
    uses_rng = False  # no dropout, no stochastic depth

    def __init__(
        self,
        size: EncoderSize,
        *,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        mask_ratio: float = 0.75,
        target: Target = "norm_pixel",
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        if any(i % p for i, p in zip(image_size, patch_size, strict=True)):
            raise ValueError(f"image size {image_size} is not divisible by patch_size {patch_size}")
        self.size, self.image_size, self.patch_size = size, image_size, patch_size
        self.grid = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
        self.mask_ratio, self.target = mask_ratio, target
        self._kept(mask_ratio)  # refuses a ratio that keeps or removes nothing, before the weights are made

        norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        block: Any = partial(Block, qkv_bias=True, norm_layer=norm)
        self.patch_embed = PatchEmbed(image_size, patch_size, 3, size.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.blocks = nn.ModuleList(block(size.width, size.heads, size.mlp_ratio) for _ in range(size.depth))
        self.norm = norm(size.width)
        self.decoder_embed = nn.Linear(size.width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_blocks = nn.ModuleList(block(decoder_width, decoder_heads, 4.0) for _ in range(decoder_depth))
        self.decoder_norm = norm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, patch_size[0] * patch_size[1] * 3)
        self.register_buffer("pos_embed", sincos_pos_embed(size.width, self.grid))
        self.register_buffer("decoder_pos_embed", sincos_pos_embed(decoder_width, self.grid))
        self._initialise()

    @property
    def num_patches(self) -> int:
        """L, patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """The transformer blocks in the order in which they run."""
        return [*self.blocks, *self.decoder_blocks]

    def no_weight_decay(self) -> set[str]:
        """None: the tokens decay, as in the reference."""
        return set()

    def lr_scales(self) -> dict[str, float]:
        """None: one learning rate for all."""
        return {}

    def flops(self) -> Flops:
        """Operations of one image."""
        return mae_flops(
            self.size,
            num_patches=self.num_patches,
            num_visible=num_visible_patches(self.num_patches, self.mask_ratio),
            patch_pixels=self.decoder_pred.out_features,
            decoder_width=self.decoder_embed.out_features,
            decoder_depth=len(self.decoder_blocks),
        )

    def _kept(self, mask_ratio: float) -> int:
        keep = num_visible_patches(self.num_patches, mask_ratio) if 0 < mask_ratio < 1 else 0
        if not 0 < keep < self.num_patches:
            raise ValueError(f"mask ratio {mask_ratio} keeps {keep} of {self.num_patches} patches; it must keep some, not all")
        return keep

    def _initialise(self) -> None:
        """Xavier-uniform for every linear map, the patch projection taken as one; tokens N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The reference leaves this one bias at PyTorch's default, uniform in 1/sqrt(fan in); so do we.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.size.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def _apply(self, fn: Any, recurse: bool = True) -> MAE:
        # Casting the module to bf16 would round the position tables, and one that came with learned weights cannot be remade:
        # they move with the module, but stay fp32.
        kept = {name: getattr(self, name) for name in POS_EMBED_NAMES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in kept.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, table.to(moved.device, torch.float32))
        return self

    def _embed(self, images_B3HW: Tensor) -> Tensor:
        """Patch tokens with positions, ``[B, L, D]``, in the parameters' precision."""
        tokens: Tensor = self.patch_embed(images_B3HW.to(self.patch_embed.proj.weight.dtype))
        return tokens + self.pos_embed[:, 1:].to(tokens.dtype)

    def _encode_tokens(self, tokens_BKD: Tensor) -> Tensor:
        cls = self.cls_token + self.pos_embed[:, :1].to(self.cls_token.dtype)
        x = torch.cat([cls.expand(tokens_BKD.shape[0], -1, -1), tokens_BKD], dim=1)
        for block in self.blocks:
            x = block(x)
        encoded: Tensor = self.norm(x)
        return encoded

    def features(self, images_B3HW: Tensor) -> Tensor:
        """The encoder on whole, unmasked images: ``[B, 1 + L, D]``, class token first, after the final norm."""
        return self._encode_tokens(self._embed(images_B3HW))

    def decode(self, latent_B1KD: Tensor, ids_restore_BL: Tensor) -> Tensor:
        """Predict every patch, ``[B, L, P]``, from the encoded visible ones."""
        x = self.decoder_embed(latent_B1KD)
        b, length = ids_restore_BL.shape
        removed = self.mask_token.expand(b, length + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], removed.to(x.dtype)], dim=1)
        patches = patches.gather(1, ids_restore_BL[..., None].expand(-1, -1, patches.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed.to(x.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        pred: Tensor = self.decoder_pred(self.decoder_norm(x))
        return pred[:, 1:]

    def forward(self, images_B3HW: Tensor, noise_BL: Tensor, mask_ratio: float | None = None) -> MAEOutput:
        """One forward pass.

        Args:
            images_B3HW: normalised images.
            noise_BL: a number per patch; the patches with the smallest ones are kept.
            mask_ratio: in place of the model's own, for pictures at other ratios.
        """
        keep = self._kept(self.mask_ratio if mask_ratio is None else mask_ratio)
        ids_keep, ids_restore, mask = random_masking(noise_BL, keep)
        tokens = self._embed(images_B3HW)
        visible = tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[2]))
        latent = self._encode_tokens(visible)
        pred = self.decode(latent, ids_restore)
        error = (pred.float() - compute_target(images_B3HW, self.patch_size, self.target)).square().mean(dim=-1)
        loss = (error * mask).sum() / mask.sum()
        return MAEOutput(loss, pred, mask, latent)


def build_mae(
    size: str, *, image_size: tuple[int, int], patch_size: tuple[int, int] | None = None, seed: int | None = None, **kwargs: Any
) -> MAE:
    """A MAE of a named size; ``patch_size`` defaults to the size's own. A ``seed`` makes the initial weights a function of it.

    Raises:
        ValueError: see :class:`MAE`.
        KeyError: unknown ``size``.
    """
    shape = SIZES[size]
    patch_size = patch_size or (shape.patch_size, shape.patch_size)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return MAE(shape, image_size=image_size, patch_size=patch_size, **kwargs)

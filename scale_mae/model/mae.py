"""The masked autoencoder (He et al. 2022): an encoder of the visible patches, a light decoder of all patches, and the loss.

Shapes: B images, L patches, K visible patches, D encoder width, E decoder width, P values per patch.
Parameter names are those of the published weights, so that weights load without renaming.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from scale_mae.model.flops import Flops, mae_flops
from scale_mae.model.losses import reconstruction_loss
from scale_mae.model.masking import num_visible_patches, random_masking
from scale_mae.model.pos_embed import sincos_pos_embed
from scale_mae.model.sizes import LAYER_NORM_EPS, SIZES, EncoderSize
from scale_mae.model.targets import Target, compute_target

POS_EMBED_NAMES = ("pos_embed", "decoder_pos_embed")  # fp32 buffers, never trained


class MAEOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        loss: Scalar, fp32.
        pred: Predicted patches, ``[B, L, P]``.
        mask: 1 = removed, ``[B, L]``.
        latent: Encoded class token and visible patches, ``[B, 1 + K, D]``.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    latent: Tensor


class MAE(nn.Module):
    """Masked autoencoder with a ViT encoder.

    Args:
        size: Width, depth and heads of the encoder.
        image_size: (height, width) in pixels.
        patch_size: (height, width) in pixels; must divide ``image_size``.
        mask_ratio: Fraction of patches removed, in (0, 1).
        target: ``norm_pixel`` (pixels normalized per patch) or ``pixel``; see :mod:`scale_mae.model.targets`.
        decoder_width: E, divisible by 4 and by ``decoder_heads``.
        decoder_depth: Number of decoder blocks.
        decoder_heads: Number of attention heads of the decoder.

    Raises:
        ValueError: ``patch_size`` does not divide ``image_size``, or ``mask_ratio`` keeps all or no patches.
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
        self._num_visible(mask_ratio)  # check the ratio before the weights are created

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
        self._initialize_weights()

    @property
    def num_patches(self) -> int:
        """Number of patches per image, L."""
        return self.grid[0] * self.grid[1]

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """The transformer blocks in the order in which they run."""
        return [*self.blocks, *self.decoder_blocks]

    def no_weight_decay(self) -> set[str]:
        """Return no names: the tokens decay too, as in the reference."""
        return set()

    def lr_scales(self) -> dict[str, float]:
        """Return no multipliers: all parameters have the same learning rate."""
        return {}

    def flops(self) -> Flops:
        """Return the floating-point operations per image."""
        return mae_flops(
            self.size,
            num_patches=self.num_patches,
            num_visible=num_visible_patches(self.num_patches, self.mask_ratio),
            patch_pixels=self.decoder_pred.out_features,
            decoder_width=self.decoder_embed.out_features,
            decoder_depth=len(self.decoder_blocks),
        )

    def _num_visible(self, mask_ratio: float) -> int:
        visible = num_visible_patches(self.num_patches, mask_ratio) if 0 < mask_ratio < 1 else 0
        if not 0 < visible < self.num_patches:
            raise ValueError(
                f"mask ratio {mask_ratio} keeps {visible} of {self.num_patches} patches; it must keep at least one, but not all"
            )
        return visible

    def _initialize_weights(self) -> None:
        """Initialize linear layers and the patch projection Xavier-uniform, tokens N(0, 0.02), as the reference does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The bias of the patch projection keeps PyTorch's default, uniform in 1/sqrt(fan in), as in the reference.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.size.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def _apply(self, fn: Any, recurse: bool = True) -> MAE:
        # Position embeddings move with the module but stay fp32. A cast to bf16 would round them, and embeddings that were
        # loaded with learned weights cannot be computed again.
        tables = {name: getattr(self, name) for name in POS_EMBED_NAMES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in tables.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, table.to(moved.device, torch.float32))
        return self

    def _embed(self, images_B3HW: Tensor) -> Tensor:
        """Return patch tokens with position embeddings, ``[B, L, D]``, in the dtype of the parameters."""
        tokens: Tensor = self.patch_embed(images_B3HW.to(self.patch_embed.proj.weight.dtype))
        return tokens + self.pos_embed[:, 1:].to(tokens.dtype)

    def _encode_tokens(self, tokens_BKD: Tensor) -> Tensor:
        """Prepend the class token and run the encoder blocks: ``[B, 1 + K, D]``."""
        cls = self.cls_token + self.pos_embed[:, :1].to(self.cls_token.dtype)
        x = torch.cat([cls.expand(tokens_BKD.shape[0], -1, -1), tokens_BKD], dim=1)
        for block in self.blocks:
            x = block(x)
        encoded: Tensor = self.norm(x)
        return encoded

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Encode unmasked images: ``[B, 1 + L, D]``, class token first, after the final norm."""
        return self._encode_tokens(self._embed(images_B3HW))

    def decode(self, latent_B1KD: Tensor, ids_restore_BL: Tensor) -> Tensor:
        """Predict all patches, ``[B, L, P]``, from the encoded visible patches."""
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
        """Mask, encode, decode and compute the loss.

        Args:
            images_B3HW: Normalized images.
            noise_BL: One number per patch. The patches with the smallest numbers stay visible.
            mask_ratio: Overrides the mask ratio of the model, for pictures at other ratios.
        """
        visible = self._num_visible(self.mask_ratio if mask_ratio is None else mask_ratio)
        ids_keep, ids_restore, mask = random_masking(noise_BL, visible)
        tokens = self._embed(images_B3HW)
        latent = self._encode_tokens(tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[2])))
        pred = self.decode(latent, ids_restore)
        loss = reconstruction_loss(pred, compute_target(images_B3HW, self.patch_size, self.target), mask)
        return MAEOutput(loss, pred, mask, latent)


def build_mae(
    size: str, *, image_size: tuple[int, int], patch_size: tuple[int, int] | None = None, seed: int | None = None, **kwargs: Any
) -> MAE:
    """Build a masked autoencoder of a named size.

    Args:
        size: A key of :data:`scale_mae.model.sizes.SIZES`.
        image_size: (height, width) in pixels.
        patch_size: (height, width) in pixels; the patch size of ``size`` by default.
        seed: Seed of the initial weights. Without it, the global generator is used.
        kwargs: Further arguments of :class:`MAE`.

    Raises:
        ValueError: See :class:`MAE`.
        KeyError: ``size`` is unknown.
    """
    shape = SIZES[size]
    patch_size = patch_size or (shape.patch_size, shape.patch_size)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return MAE(shape, image_size=image_size, patch_size=patch_size, **kwargs)

"""Activation recomputation: which activations are kept for the backward pass, and which are computed again.

none       keep all
full       keep each block's input, recompute the block
every_k    likewise for every k-th block, keep all of the others
selective  keep the outputs of matrix products and attention, recompute what is cheap (norms, activations)
offload    as full, with the block inputs in host memory (fairscale)
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scale_mae.config.sections import TrainConfig
from scale_mae.model.flops import Flops

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(block: nn.Module, **options: Any) -> None:
    # A function of this file, not a partial of torch's: torch.compile passes over frames of torch and would compile nothing.
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(type(self).forward, self, x, use_reentrant=False, **options)
        return out

    block.forward = MethodType(forward, block)  # in place: names of parameters stay


def apply_activation_checkpointing(
    blocks: list[nn.Module],
    policy: str,
    every: int = TrainConfig().activation_checkpointing_every,
    *,
    uses_rng: bool = False,
) -> None:
    """Set the policy of transformer blocks, in place.

    Args:
        blocks: in the order in which they run.
        policy: see this module's text.
        every: k of ``every_k``.
        draws_random: blocks draw random numbers: the generator's state is kept, so that they draw the same again.

    Raises:
        ValueError: unknown policy.
    """
    recomputed = partial(_recomputed, preserve_rng_state=uses_rng)
    if policy == "full":
        for block in blocks:
            recomputed(block)
    elif policy == "every_k":
        for block in blocks[::every]:
            recomputed(block)
    elif policy == "selective":
        for block in blocks:
            recomputed(block, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))
    elif policy == "offload":
        for block in blocks:
            checkpoint_wrapper(block, offload_to_cpu=True)  # keeps the generator's state always
    elif policy != "none":
        raise ValueError(f"unknown recompute policy {policy!r}")


def recomputed_flops(flops: Flops, policy: str, every: int) -> int:
    """Operations of one image that a policy does once more, counted as those of :class:`Flops` are.

    Torch's checkpoint ends as soon as all is there that the backward pass needs, before a block's last product; fairscale's
    does the whole block again. (Fused attention recomputes within its backward pass besides, which is not counted.)

    Args:
        flops: of the model.
        policy: see this module's text.
        every: k of ``every_k``.
    """
    if policy == "offload":
        return sum(whole for whole, _ in flops.blocks)
    chosen = {"full": flops.blocks, "every_k": flops.blocks[::every]}.get(policy, ())
    return sum(whole - last for whole, last in chosen)

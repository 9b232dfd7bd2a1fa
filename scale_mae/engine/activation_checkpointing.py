"""Activation checkpointing: which activations the forward pass keeps, and which the backward pass recomputes.

none       keep all activations
full       keep the input of each block, recompute the block
every_k    do so for every k-th block, keep all activations of the other blocks
selective  keep the outputs of matrix products and attention, recompute the cheap operations (norms, activation functions)
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

from scale_mae.config.schema import TrainConfig
from scale_mae.model.flops import Flops

_aten = torch.ops.aten
SAVED_OPS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def apply_activation_checkpointing(
    blocks: list[nn.Module],
    policy: str,
    every: int = TrainConfig().activation_checkpointing_every,
    *,
    uses_rng: bool = False,
) -> None:
    """Apply a policy to transformer blocks, in place.

    Args:
        blocks: The blocks in the order in which they run.
        policy: One of the policies in this module's docstring.
        every: The k of ``every_k``.
        uses_rng: Whether the blocks draw random numbers. If so, the state of the generator is saved, so that the
            recomputation draws the same numbers.

    Raises:
        ValueError: The policy is unknown.
    """
    checkpointed = partial(_checkpoint_block, preserve_rng_state=uses_rng)
    if policy == "full":
        for block in blocks:
            checkpointed(block)
    elif policy == "every_k":
        for block in blocks[::every]:
            checkpointed(block)
    elif policy == "selective":
        for block in blocks:
            checkpointed(block, context_fn=partial(create_selective_checkpoint_contexts, _choose_saved_ops))
    elif policy == "offload":
        for block in blocks:
            checkpoint_wrapper(block, offload_to_cpu=True)  # always saves the state of the generator
    elif policy != "none":
        raise ValueError(f"unknown activation checkpointing policy {policy!r}")


def count_recomputed_flops(flops: Flops, policy: str, every: int) -> int:
    """Return the operations of one image that a policy recomputes, counted in the same way as :class:`Flops`.

    PyTorch's checkpoint stops the recomputation once it has all that the backward pass needs, which is before a block's
    last product. fairscale's checkpoint recomputes the whole block. The recomputation inside the backward pass of fused
    attention is not counted.

    Args:
        flops: The operations of the model.
        policy: One of the policies in this module's docstring.
        every: The k of ``every_k``.
    """
    if policy == "offload":
        return sum(block for block, _ in flops.blocks)
    recomputed = {"full": flops.blocks, "every_k": flops.blocks[::every]}.get(policy, ())
    return sum(block - last_product for block, last_product in recomputed)


def _checkpoint_block(block: nn.Module, **options: Any) -> None:
    # A function of this file, not a partial of torch's: torch.compile skips frames of torch, and would compile nothing.
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(type(self).forward, self, x, use_reentrant=False, **options)
        return out

    block.forward = MethodType(forward, block)  # no wrapper module, so that parameter names do not change


def _choose_saved_ops(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

"""The losses: squared error on the removed patches for pre-training, and cross-entropy for classification.

Shapes: B images, L patches, P values per patch, C classes, N probes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def reconstruction_loss(pred_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor) -> Tensor:
    """Return the mean squared error over the removed patches (He et al. 2022), a scalar in fp32.

    Args:
        pred_BLP: Predicted patches.
        target_BLP: Targets from :func:`scale_mae.model.targets.compute_target`.
        mask_BL: 1 = removed.
    """
    error_BL = (pred_BLP.float() - target_BLP).square().mean(dim=-1)
    return (error_BL * mask_BL).sum() / mask_BL.sum()


def soft_target_cross_entropy(logits: Tensor, targets_BC: Tensor) -> Tensor:
    """Return the cross-entropy in nats, a scalar in fp32.

    The loss is a mean over images and a sum over probes, so each probe gets the gradient that it would get alone.

    Args:
        logits: ``[B, C]``, or ``[N, B, C]`` for probes.
        targets_BC: Probability of each class.
    """
    log_probabilities = functional.log_softmax(logits.float(), dim=-1)
    return -(targets_BC.float() * log_probabilities).sum(dim=-1).mean(dim=-1).sum()

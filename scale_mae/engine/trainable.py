"""What the engine trains: a module that says of itself what training has to know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from scale_mae.model.flops import Flops


class TrainableModule(Protocol):
    """A ``torch.nn.Module`` whose parameters are exactly what is trained; what is frozen is a buffer.

    Called with the tensors of a micro-batch, it returns something with a ``loss``, a scalar.

    Attributes:
        training: of every module.
        recomputable: the transformer blocks, in the order in which they run; each takes one tensor ``x``.
        draws_random: whether these blocks draw random numbers, for stochastic depth for instance.
    """

    training: bool

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """See the class."""

    @property
    def uses_rng(self) -> bool:
        """See the class."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that never decay, besides biases and one-dimensional ones."""

    def lr_scales(self) -> dict[str, float]:
        """Multiples of the learning rate, by name of a parameter; 1 for those that are not named."""

    def flops(self) -> Flops:
        """Operations of one image."""

    # What follows is torch.nn.Module's.

    @property
    def __call__(self) -> Any:
        """Forward, with the hooks that ZeRO-3 needs."""

    def to(self, device: torch.device) -> Any:
        """Move."""

    def train(self, mode: bool = True) -> Any:
        """Leave evaluation mode, or enter it."""

    def eval(self) -> Any:
        """Enter evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, with names."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """By name."""

    def register_forward_hook(self, hook: Any) -> Any:
        """Called after the forward pass."""

    def get_submodule(self, target: str) -> nn.Module:
        """By name."""

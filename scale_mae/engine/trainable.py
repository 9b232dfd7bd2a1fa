"""The interface of a model that the engine trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from scale_mae.model.flops import Flops


class TrainableModule(Protocol):
    """A ``torch.nn.Module`` that all trained weights are parameters of, and all frozen weights buffers of.

    It is called with the tensors of a micro-batch. It returns an object with the attribute ``loss``, a scalar.

    Attributes:
        training: Whether the module is in training mode.
        transformer_blocks: The blocks that are checkpointed and compiled, in the order in which they run. Each takes one
            tensor ``x``.
        uses_rng: Whether these blocks draw random numbers, for example for stochastic depth.
    """

    training: bool

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """See the class."""

    @property
    def uses_rng(self) -> bool:
        """See the class."""

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and one-dimensional parameters."""

    def lr_scales(self) -> dict[str, float]:
        """Return learning-rate multipliers by parameter name. The multiplier of all other parameters is 1."""

    def flops(self) -> Flops:
        """Return the operations of one image."""

    # The members below are those of torch.nn.Module.

    @property
    def __call__(self) -> Any:
        """Run the forward pass, with the hooks that ZeRO-3 needs."""

    def to(self, device: torch.device) -> Any:
        """Move the module to a device."""

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode."""

    def eval(self) -> Any:
        """Set evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the trained weights."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the trained weights and their names."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter of a name."""

    def register_forward_hook(self, hook: Any) -> Any:
        """Register a function that is called after the forward pass."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return the submodule of a name."""

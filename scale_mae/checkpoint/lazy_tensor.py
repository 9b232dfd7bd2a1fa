"""Tensors that are read when they are needed, so that a model of any size passes through little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known, and whose values are read later.

    Attributes:
        shape: Shape.
        dtype: Dtype.
        chunks: Reads the flattened values in order, in one or more tensors. The caller need not join them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterable[Tensor]]

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """Return the tensor cast to ``dtype``. ``None`` and integer tensors leave it unchanged."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, chunks=lambda: (chunk.to(dtype) for chunk in self.chunks()))

    def read(self) -> Tensor:
        """Read the tensor."""
        chunks = list(self.chunks())
        values = chunks[0] if len(chunks) == 1 else torch.cat(chunks) if chunks else torch.empty(0, dtype=self.dtype)
        return values.reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensorReader(Mapping[str, Tensor]):
    """Maps names to tensors. Each access reads the tensor again."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

"""RandAugment (Cubuk et al. 2020) as timm has it, of many images at once, and each image's by its own seeds only."""

from __future__ import annotations

import functools
import importlib.util
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scale_mae.data.errors import DataError
from scale_mae.system.thread_pool import DaemonThreadPool


class RandAugment:
    """Changes 8-bit RGB images by randomly chosen operations; may be called from many threads at once.

    Args:
        policy: in timm's notation, as ``data.randaugment``.
        mean: of the channels in [0, 1]; what an operation moves into the image has this colour.

    Raises:
        DataError: timm does not know the policy.
    """

    def __init__(self, policy: str, mean: Sequence[float]) -> None:
        # as timm's create_transform has them for interpolation="bicubic", with which the paper's classifiers were fine-tuned;
        # the image's size is left out, because shifts are relative in every rand policy
        hparams = {
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            self._transform = _timms().rand_augment_transform(policy, hparams)
        except (AssertionError, ValueError) as error:
            raise DataError(
                f"data.randaugment={policy}: not a policy of timm's ({error}); take one such as rand-m9-mstd0.5-inc1"
            ) from None

    def __call__(self, image_HW3: NDArray[np.uint8], seeds: tuple[int, int]) -> NDArray[np.uint8]:
        """A changed copy, ``[H, W, 3]``: what timm gives when Python's generator has the first seed and NumPy's the second.

        Args:
            image_HW3: RGB.
            seeds: in [0, 2^64) and [0, 2^32). They should differ: both generators are Mersenne twisters.
        """
        _own.python.seed(seeds[0])
        _own.numpy.seed(seeds[1])
        image, timms = Image.fromarray(image_HW3), self._transform
        weights = timms.choice_weights  # with weights no operation is chosen twice
        for number in _own.numpy.choice(len(timms.ops), timms.num_layers, replace=weights is None, p=weights):
            image = timms.ops[number](image)
        return np.asarray(image)

    def start(
        self, images_BHW3: Tensor, seeds_B2: NDArray[np.uint64], pool: DaemonThreadPool, tasks: int
    ) -> list[Future[None]]:
        """Change the images of a batch in place, in up to ``tasks`` tasks of a pool; done when all that is returned is.

        Args:
            images_BHW3: uint8, in host memory.
            seeds_B2: from :meth:`SamplePlan.augment_seeds`.
            pool: the threads.
            tasks: how finely to cut the batch.
        """
        images, seeds = images_BHW3.numpy(), seeds_B2.tolist()
        size = -(-len(images) // tasks)
        return [
            pool.submit(self._change, images[first : first + size], seeds[first : first + size])
            for first in range(0, len(images), size)
        ]

    def _change(self, images_BHW3: NDArray[np.uint8], seeds: Sequence[tuple[int, int]]) -> None:
        for image_HW3, (first, second) in zip(images_BHW3, seeds, strict=True):
            image_HW3[:] = self(image_HW3, (first, second >> 32))


class _Generators(threading.local):
    """A thread's own generators, in the place of the ones of the whole process."""

    def __init__(self) -> None:
        self.python, self.numpy = random.Random(0), np.random.RandomState(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.python, name)  # random.random(), random.gauss() and whatever else timm's operations call


_own = _Generators()


@functools.lru_cache
def _timms() -> ModuleType:
    """A copy of timm's module that draws from the generators of each thread; timm's own goes on as it is."""
    spec = importlib.util.find_spec("timm.data.auto_augment")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.random = _own  # type: ignore[attr-defined]
    timms_posterize = module.posterize

    def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
        # timm asks for no bits at its highest magnitude, which gave black before Pillow refused it
        return timms_posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)

    module.NAME_TO_OP.update({name: posterize for name, op in module.NAME_TO_OP.items() if op is timms_posterize})
    return module


def on_host(images: Tensor) -> Tensor:
    """Images of a GPU in page-locked host memory, without waiting for what else the GPU has to do."""
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    stream: Any = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        host.copy_(images, non_blocking=True)
    stream.synchronize()
    return host

"""RandAugment (Cubuk et al. 2020) as timm implements it, for many images in parallel. Each image has its own seeds."""

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
    """Applies randomly chosen operations to 8-bit RGB images. Many threads may call it at the same time.

    Args:
        policy: ``data.randaugment``, in timm's notation.
        mean: Mean of the channels in [0, 1]. Operations fill uncovered pixels with this color.

    Raises:
        DataError: timm does not know the policy.
    """

    def __init__(self, policy: str, mean: Sequence[float]) -> None:
        # The parameters are those of timm's create_transform with interpolation="bicubic", which the paper's fine-tuning used.
        # The image size is not needed, because shifts are relative in every "rand" policy.
        hparams = {
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            self._transform = _thread_safe_timm().rand_augment_transform(policy, hparams)
        except (AssertionError, ValueError) as error:
            raise DataError(
                f"data.randaugment={policy}: not a policy of timm ({error}). Set it to a policy such as rand-m9-mstd0.5-inc1."
            ) from None

    def __call__(self, image_HW3: NDArray[np.uint8], seeds: tuple[int, int]) -> NDArray[np.uint8]:
        """Return an augmented copy, ``[H, W, 3]``. It equals timm's result with the same seeds.

        Args:
            image_HW3: RGB.
            seeds: Seeds of Python's generator, in [0, 2^64), and of NumPy's, in [0, 2^32). They should differ, because both
                generators are Mersenne twisters.
        """
        _generators.python.seed(seeds[0])
        _generators.numpy.seed(seeds[1])
        image, transform = Image.fromarray(image_HW3), self._transform
        weights = transform.choice_weights  # with weights, no operation is chosen twice
        for number in _generators.numpy.choice(len(transform.ops), transform.num_layers, replace=weights is None, p=weights):
            image = transform.ops[number](image)
        return np.asarray(image)

    def start(
        self, images_BHW3: Tensor, seeds_B2: NDArray[np.uint64], pool: DaemonThreadPool, tasks: int
    ) -> list[Future[None]]:
        """Start to augment the images of a batch in place. The batch is ready when all returned futures are done.

        Args:
            images_BHW3: uint8, in host memory.
            seeds_B2: From :meth:`SamplePlan.augment_seeds`.
            pool: The threads.
            tasks: Largest number of tasks into which the batch is split.
        """
        images, seeds = images_BHW3.numpy(), seeds_B2.tolist()
        size = -(-len(images) // tasks)
        return [
            pool.submit(self._augment_in_place, images[first : first + size], seeds[first : first + size])
            for first in range(0, len(images), size)
        ]

    def _augment_in_place(self, images_BHW3: NDArray[np.uint8], seeds: Sequence[tuple[int, int]]) -> None:
        for image_HW3, (first, second) in zip(images_BHW3, seeds, strict=True):
            image_HW3[:] = self(image_HW3, (first, second >> 32))


class _ThreadGenerators(threading.local):
    """The generators of one thread. They replace Python's and NumPy's global generators."""

    def __init__(self) -> None:
        self.python, self.numpy = random.Random(0), np.random.RandomState(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.python, name)  # random.random(), random.gauss() and so on, as timm's operations call them


_generators = _ThreadGenerators()


@functools.lru_cache
def _thread_safe_timm() -> ModuleType:
    """Return a copy of timm's module that draws from the generators of each thread. timm's own module stays unchanged."""
    spec = importlib.util.find_spec("timm.data.auto_augment")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.random = _generators  # type: ignore[attr-defined]
    timm_posterize = module.posterize

    def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
        # At its highest magnitude timm keeps 0 bits. Old versions of Pillow returned black; new ones raise an error.
        return timm_posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)

    module.NAME_TO_OP.update({name: posterize for name, op in module.NAME_TO_OP.items() if op is timm_posterize})
    return module


def copy_to_pinned_memory(images: Tensor) -> Tensor:
    """Copy images from a GPU to page-locked host memory. This does not wait for other work on the GPU."""
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    stream: Any = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        host.copy_(images, non_blocking=True)
    stream.synchronize()
    return host

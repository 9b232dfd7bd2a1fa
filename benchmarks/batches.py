"""Batches of our loader with any decoder, and how fast a stream of batches is."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from itertools import islice
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from scale_mae.config.schema import DataConfig
from scale_mae.data import decoders
from scale_mae.data.index import Index
from scale_mae.data.loader import BatchShard, Loader
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.data.transforms import normalize

SIZE, MEAN, STD = (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Turn(NamedTuple):
    """Speed of a stream of batches, and how many cores this process and its children kept busy."""

    images_per_s: float
    busy_cores: float


def our_batches(
    index: Index, name: decoders.DecoderName, batch: int, threads: int, device: torch.device
) -> Generator[Tensor, None, None]:
    """Normalised batches on the device, without end.

    Raises:
        RuntimeError: Pillow decoded images in place of the decoder, so the speed would not be the decoder's.
    """
    decoder = decoders.build_decoder(name, SIZE, batch, threads, device)
    plan = SamplePlan(0, len(index), batch)
    loader = Loader(
        index, plan, BatchShard(0, 1, batch, 1), DataConfig(threads=threads), decoder, SIZE, 196, device.type == "cuda"
    )
    batches = loader.batches(0, 1_000_000)
    try:
        for found in batches:
            assert not found.failures
            check_fallbacks(decoder)
            yield normalize(found.images.to(device, non_blocking=True), MEAN, STD)
    finally:
        batches.close()


def check_fallbacks(decoder: decoders.Decoder) -> None:
    """Raise where Pillow decoded images in place of the decoder; says why it had to."""
    if decoder.fallbacks:
        why = getattr(decoder, "failure", "")
        raise RuntimeError(f"Pillow decoded {decoder.fallbacks} images in place of {type(decoder).__name__}: {why}")


def turn(make: Callable[[], Generator[Tensor, None, None]], *, batches: int, seconds: float = 0.0) -> Turn:
    """Start a stream, skip two batches, and time at least ``batches`` batches and at least ``seconds`` seconds."""
    stream = make()
    try:
        for _ in islice(stream, 2):
            pass
        _wait()
        began, cpu, images = time.perf_counter(), cpu_seconds(), 0
        for number, found in enumerate(stream, 1):
            images += len(found)
            if number >= batches and time.perf_counter() - began >= seconds:
                break
        _wait()
        wall = time.perf_counter() - began
        return Turn(images / wall, (cpu_seconds() - cpu) / wall)
    finally:
        stream.close()


def cpu_seconds() -> float:
    """CPU time so far of this process and its running children."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Images a second of each decoder, its agreement with Pillow, and what training loses to data."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from batches import SIZE, check_fallbacks, our_batches, turn
from numpy.typing import NDArray

from gpu_stages import feed_training
from gpu_stages.photographs import make_jpegs
from gpu_stages.stage import Stage
from scale_mae.config.schema import DataConfig
from scale_mae.data import decoders, pillow
from scale_mae.data.errors import DataError
from scale_mae.data.index import Index
from scale_mae.data.index_builder import build_index
from scale_mae.data.loader import num_decoding_threads
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.metrics.nvml import Nvml

DECODERS: tuple[decoders.DecoderName, ...] = ("dali_gpu", "dali_cpu", "pillow")
LIMITS = {"dali_gpu": (0.5, 8), "dali_cpu": (0.1, 3)}  # mean of an image and largest difference, as in the tests
ROUNDS, MORE_ROUNDS = 2, 4  # turns of each decoder, the latter where time is left
TRAINING = 75.0  # seconds that training takes
COUNTERS = {  # of NVML, in per cent
    "jpeg_engine": "nvmlDeviceGetJpgUtilization",
    "video_decoder": "nvmlDeviceGetDecoderUtilization",
    "gpu": "nvmlDeviceGetUtilizationRates",
}


def run(stage: Stage) -> None:
    with stage.case("jpegs") as case:
        make_jpegs(stage.folder / "jpegs", 48 if stage.rehearse else 2000)
        index = build_index(str(stage.folder / "jpegs"), stage.folder / "photos.index", verify=False)
        case.update(images=len(index), mean_bytes=int(index.entries["length"].mean()))
    if "error" in case:
        return
    names, stage.result["not_here"] = available(stage.device)
    for name in names:
        if name != "pillow":
            with stage.case(f"parity {name}", needs=5) as case:
                case.update(parity(index, name, 16 if stage.rehearse else 256, stage.device))
                check_limits(case, *LIMITS[name])
    with stage.case("decoders", needs=20) as case:
        compete(stage, case, index, names)
    feed_training.run(stage, max(names, key=partial(speed, case)))


def available(device: torch.device) -> tuple[list[decoders.DecoderName], dict[str, str]]:
    """The decoders that can be used here, and why the others cannot."""
    names: list[decoders.DecoderName] = []
    missing = {}
    for name in DECODERS:
        try:
            decoders.choose_decoder(name, device)
        except DataError as error:
            missing[name] = str(error)
        else:
            names.append(name)
    return names, missing


def parity(index: Index, name: decoders.DecoderName, count: int, device: torch.device) -> dict[str, Any]:
    """How the crops of a decoder differ from Pillow's crops of the same images.

    Raises:
        RuntimeError: Pillow decoded images in place of the decoder.
    """
    plan, threads = SamplePlan(0, len(index), count), num_decoding_threads(DataConfig())
    positions = np.arange(count)
    samples = plan.samples(positions)
    entries = index.entries[samples]
    crops = plan.crops(positions, entries["width"], entries["height"], DataConfig(), SIZE)
    encoded = [index.read(int(sample)) for sample in samples]
    with closing(decoders.build_decoder(name, SIZE, count, threads, device)) as decoder, ThreadPoolExecutor(threads) as pool:
        images, errors = decoder.decode_batch(list(pool.map(decoder.prepare_image, encoded, crops)))
        check_fallbacks(decoder)
        wanted = list(pool.map(pillow.decode, encoded, crops, [SIZE] * count))
    assert not errors, f"{len(errors)} of {count} images are not decoded: {next(iter(errors.values()))}"
    return {"images": count, "device": images.device.type, **differences(images.cpu().numpy(), np.stack(wanted))}


def differences(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> dict[str, Any]:
    """Of pixel values, which are 0 to 255; ``mean_of_image`` is that of the image with the largest mean difference."""
    each = np.abs(found.astype(np.int16) - wanted)
    return {
        "mean": float(each.mean()),
        "mean_of_image": float(each.mean(axis=(1, 2, 3)).max()),
        "largest": int(each.max()),
        "above_8": int((each > 8).sum()),
    }


def check_limits(found: dict[str, Any], mean: float, largest: int) -> None:
    """Raise where images are not the reference decoder's."""
    assert found["mean_of_image"] <= mean, f"an image differs by {found['mean_of_image']:.3f} in the mean, {mean} is the limit"
    assert found["largest"] <= largest, f"a pixel differs by {found['largest']}, {largest} is the limit"


def compete(stage: Stage, case: dict[str, Any], index: Index, names: list[decoders.DecoderName]) -> None:
    """The decoders take turns (A B C, C B A). A decoder that fails drops out; the others go on. Saves after each turn."""
    batch, seconds = (8, 0.2) if stage.rehearse else (256, 1.5)
    threads = num_decoding_threads(DataConfig())
    case.update(batch=batch, threads=threads, cores=len(os.sched_getaffinity(0)), turns={}, failed={})
    for number in range(ROUNDS if stage.rehearse else MORE_ROUNDS):
        if number >= ROUNDS and stage.left() < TRAINING:
            break
        for name in names[:: -1 if number % 2 else 1]:
            if name in case["failed"]:
                continue
            make = partial(our_batches, index, name, batch, threads, stage.device)
            try:
                with sampled(stage.device) as samples:
                    found = turn(make, batches=2, seconds=seconds)
                case["turns"].setdefault(name, []).append(found._asdict() | samples)
            except Exception as error:
                case["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                case["turns"].pop(name, None)
            stage.save()


def speed(case: dict[str, Any], name: str) -> float:
    """Median images a second of a decoder; 0 where it was not measured."""
    return median(found["images_per_s"] for found in case["turns"][name]) if name in case.get("turns", {}) else 0.0


@contextmanager
def sampled(device: torch.device) -> Iterator[dict[str, list[float]]]:
    """Per cent of the time that parts of the GPU are busy, which a thread asks NVML for meanwhile; empty where it has none."""
    samples: dict[str, list[float]] = {name: [] for name in COUNTERS}
    number, over = Nvml().gpu_index(device), threading.Event()
    if number is None:
        yield samples
        return
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(number)

    def sample() -> None:
        while not over.wait(0.1):
            for name, function in COUNTERS.items():
                try:
                    value = getattr(pynvml, function)(handle)
                except (pynvml.NVMLError, AttributeError):  # this GPU, its driver or this package does not have it
                    continue
                samples[name].append(float(value.gpu if name == "gpu" else value[0]))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each decoder, and one for each model that trains."""
    cases = {case["case"]: case for case in result["cases"]}
    found = cases.get("decoders", {})
    table = []
    for name in DECODERS:
        row = {"case": name, "images/s": "-", "busy cores": "-", "JPEG engine": "-"}
        if turns := found.get("turns", {}).get(name):
            cores = median(each["busy_cores"] for each in turns)
            row |= {"images/s": f"{speed(found, name):.0f}", "busy cores": f"{cores:.1f}"}
            engine = [max(each["jpeg_engine"]) for each in turns if each["jpeg_engine"]]
            row |= {"JPEG engine": f"{median(engine):.0f} %"} if engine else {}
        table.append(row | {"finding": _finding(name, result, cases)})
    return table + feed_training.rows(result)


def _finding(name: str, result: dict[str, Any], cases: dict[str, dict[str, Any]]) -> str:
    if name in result.get("not_here", {}):
        return result["not_here"][name]
    if name in cases.get("decoders", {}).get("failed", {}):
        return f"failed: {cases['decoders']['failed'][name]}"
    if name == "pillow":
        return "the reference decoder"
    case = cases.get(f"parity {name}", {})
    if "mean" not in case:
        return str(case.get("error", "not measured yet"))
    return f"differs from Pillow by {case['mean']:.3f} in the mean, {case['largest']} at most" + (
        ", beyond the limit" if "error" in case else ""
    )

"""How much time does the sample plan take (order, crop boxes and mask noise), compared with the training step that uses it?

python benchmarks/plan.py --out benchmarks/results/plan_cpu_NAME.json

The plan is timed for data sets of 60,000 and 10^9 images, for one rank of a job of 1, 8 and 4,096 processes. The global
batch has 4,096 images, so these ranks plan 4,096, 512 and 1 images. The times are compared with a forward and backward pass
of ViT-B/16 that is timed on this machine. They are also compared with an H100 that reaches 40 % of its 989 TFLOP/s, at 58.5
GFLOP for an image.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from report import save

from scale_mae.config import load_config
from scale_mae.config.schema import DataConfig
from scale_mae.data.sample_plan import SamplePlan
from scale_mae.model.mae import MAE
from scale_mae.weights.model_builder import build_mae_from_config

GLOBAL_BATCH, PATCHES, IMAGE_SIZE = 4096, 196, (224, 224)
H100_FLOPS = 0.4 * 989e12
AUGMENTATION = DataConfig()
WIDTHS, HEIGHTS = np.full(GLOBAL_BATCH, 500), np.full(GLOBAL_BATCH, 375)


def plan_step(plan: SamplePlan, step: int, ranks: int) -> None:
    """Plan the share of the middle rank in one step."""
    positions = plan.positions(step, ranks // 2, ranks, 0, GLOBAL_BATCH // ranks)
    plan.samples(positions)
    plan.crops(positions, WIDTHS[: len(positions)], HEIGHTS[: len(positions)], AUGMENTATION, IMAGE_SIZE)
    plan.mask_noise(positions, PATCHES)


def time_plans(rounds: int) -> dict[tuple[int, int], list[float]]:
    """Return the seconds of each round for each (data set size, number of ranks). The cases take turns."""
    cases = [(size, ranks) for size in (60_000, 10**9) for ranks in (1, 8, 4096)]
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases if number % 2 else cases[::-1]:
            size, ranks = case
            plan = SamplePlan(0, size, GLOBAL_BATCH)
            start = time.perf_counter()
            plan_step(plan, number * 1000 + 5, ranks)
            seconds[case].append(time.perf_counter() - start)
    return seconds


def peak_memory(size: int, ranks: int) -> int:
    """Return the peak bytes that Python and NumPy allocate for one step."""
    tracemalloc.start()
    plan_step(SamplePlan(0, size, GLOBAL_BATCH), 10**6, ranks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def train_seconds_per_image(batch: int, steps: int) -> tuple[float, int]:
    """Return the seconds and the FLOPs of a forward and backward pass of ViT-B/16 in bf16, per image."""
    model: MAE = build_mae_from_config(load_config("vit_base"))
    images, noise = torch.randn(batch, 3, *IMAGE_SIZE), torch.rand(batch, PATCHES)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, noise).loss
        loss.backward()
        model.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / batch, model.flops().train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="timed plans of each case (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images in the timed training step (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    args = parser.parse_args()
    step, flops = train_seconds_per_image(args.batch, 4)
    h100 = flops / H100_FLOPS
    seconds = time_plans(args.rounds)
    table = []
    for (size, ranks), times in seconds.items():
        images = GLOBAL_BATCH // ranks
        median = statistics.median(times)
        table.append(
            {
                "images": f"{size:,}",
                "ranks": f"{ranks:,}",
                "us per rank and step": f"{median * 1e6:.0f}",
                "us per image": f"{median / images * 1e6:.2f}",
                "share of this machine's step": f"{median / images / step:.5%}",
                "share of an H100's step": f"{median / images / h100:.2%}" if images > 1 else "see text",
                "peak KiB": f"{peak_memory(size, ranks) / 1024:.0f}",
            }
        )
    save(
        args.out,
        device=torch.device("cpu"),
        title=f"Sample plan at global batch {GLOBAL_BATCH}, medians of {args.rounds} rounds taken in turns; a ViT-B step takes "
        f"{step * 1e3:.0f} ms per image here in bf16, {h100 * 1e6:.0f} us on an H100 at 40 % of its peak",
        table=table,
        step_seconds_per_image=step,
        seconds={f"{size} images, {ranks} ranks": times for (size, ranks), times in seconds.items()},
    )


if __name__ == "__main__":
    main()

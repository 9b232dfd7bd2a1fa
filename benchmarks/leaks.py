"""Does the loader leak file descriptors, threads, shared memory or resident memory over 10,000 steps?

python benchmarks/leaks.py --out benchmarks/results/leaks_cpu_NAME.json

Packs the shipped training images into tar shards, damages one image in a thousand, and loads 10,000 batches of 32 with each
decoder. This covers reading, decoding, fallbacks and substitutes. The first 1,000 steps are warm-up.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from report import save

from scale_mae.config.schema import DataConfig
from scale_mae.data import decoders
from scale_mae.data.index import Index
from scale_mae.data.loader import BatchShard, Loader
from scale_mae.data.pack import pack
from scale_mae.data.sample_plan import SamplePlan

SIZE, BATCH = (32, 32), 32


def damage_images(index: Index, every: int) -> None:
    """Damage every ``every``-th image in its shard."""
    for sample in range(0, len(index), every):
        entry = index.entries[sample]
        with open(index.shards[entry["shard"]], "r+b") as file:
            file.seek(int(entry["offset"]) + 200)
            file.write(bytes(int(entry["length"]) - 202) if sample % 2 else b"\xff\xd9" * (int(entry["length"]) // 2 - 100))


def resources() -> dict[str, float]:
    """Return the resources that this process holds."""
    process = psutil.Process()
    shared = sum(1 for _ in os.scandir("/dev/shm"))
    mib = process.memory_info().rss / 2**20
    return {
        "file descriptors": process.num_fds(),
        "threads": threading.active_count(),
        "shared memory files": shared,
        "resident MiB": mib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="batches of each decoder (default: %(default)s)")
    parser.add_argument("--decoders", nargs="+", default=["pillow", "dali_cpu"], help="decoders (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if "dali_gpu" in args.decoders else torch.device("cpu")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        index = pack("demo:train", folder, shard_mb=1).index
        damage_images(index, 1000)
        for name in args.decoders:
            decoder = decoders.build_decoder(name, SIZE, BATCH, 2, device)
            plan, share = SamplePlan(0, len(index), BATCH), BatchShard(0, 1, BATCH, 1)
            loader = Loader(index, plan, share, DataConfig(threads=2), decoder, SIZE, 4, warn=print)
            failures, measurements, start = 0, [], time.perf_counter()
            for step, batch in enumerate(loader.batches(0, args.steps), 1):
                failures += len(batch.failures)
                if step in (args.steps // 10, args.steps // 2, args.steps):
                    measurements.append((step, resources()))
            for step, measured in measurements:
                table.append(
                    {"decoder": name, "step": f"{step:,}"}
                    | {key: f"{value:.0f}" for key, value in measured.items()}
                    | {"substitutes": str(failures), "fallbacks": str(decoder.fallbacks)}
                )
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    save(
        args.out,
        device=torch.device("cpu"),
        title=f"Resources of the loader over {args.steps:,} steps of {BATCH} images",
        table=table,
    )


if __name__ == "__main__":
    main()

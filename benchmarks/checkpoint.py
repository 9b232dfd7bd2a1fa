"""How long training stands still for a checkpoint, straight to the run directory and by way of a node-local folder.

python benchmarks/checkpoint.py --out benchmarks/results/checkpoint_cpu_NAME.json --local /dev/shm

Two gloo ranks train the demo's images with a ViT of ``--size`` under ZeRO-2, saving every fourth step, once with
``checkpoint.local_dir`` and once without, in turns. Read from the runs' own logs: how long each save held up the loop, how
long it took until the checkpoint had its name, and the time of a step between saves. On this machine both folders belong to
the same host: the run directory is on its disk, and the local folder should be on something faster.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from report import save

STEPS, EVERY = 12, 4
SAVED = re.compile(r"saved .* in ([\d.]+) s(?:; training stood still for ([\d.]+) s of it)?")


def run(size: str, run_dir: Path, local: Path | None) -> dict[str, list[float]]:
    """One run; seconds until checkpoints were named, seconds training stood still for them, seconds of its steps."""
    setting = {
        "run.dir": run_dir,
        "model.size": size,
        "model.image_size": 64,
        "model.decoder_width": 512,
        "model.decoder_heads": 16,
        "train.duration": f"{STEPS} steps",
        "checkpoint.interval": f"{EVERY} steps",
        "checkpoint.keep_latest": 1,
        "log.interval": 1,
        "optim.warmup": "2 steps",
        "engine.deepspeed": "zero2",
        "train.precision": "bf16",
    } | ({"checkpoint.local_dir": local} if local else {})
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "scale_mae",
        "pretrain",
    ]
    subprocess.run([*command, "debug", *(f"{k}={v}" for k, v in setting.items())], check=True, capture_output=True)
    named, still = [], []
    for line in (run_dir / "log.txt").read_text().splitlines():
        if found := SAVED.search(line):
            named.append(float(found[1]))
            still.append(float(found[2] or found[1]))
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["step_time_s"] for line in lines if line["step"] > 2}
    nbytes = sum(p.stat().st_size for p in (run_dir / "checkpoints").rglob("*") if p.is_file())
    return {"named": named, "still": still, "step": list(steps.values()), "bytes": [nbytes]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local", type=Path, required=True, help="node-local folder")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where run directories are made")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    samples: dict[str, dict[str, list[float]]] = {"straight": {}, "local first": {}}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder, tempfile.TemporaryDirectory(dir=args.local) as local:
        for number in range(args.rounds):
            for way, values in samples.items():
                run_dir = Path(folder) / f"{number}"
                for key, found in run(args.size, run_dir, Path(local) if way == "local first" else None).items():
                    values.setdefault(key, []).extend(found)
                shutil.rmtree(run_dir)
                print(number, way, {k: round(statistics.median(v), 3) for k, v in values.items()}, flush=True)
    step = statistics.median(samples["straight"]["step"])
    table = [
        {
            "checkpoint written": way,
            "training stood still": f"{statistics.median(values['still']):.2f} s",
            "in steps": f"{statistics.median(values['still']) / step:.1f}",
            "named after": f"{statistics.median(values['named']):.2f} s",
            "a step": f"{statistics.median(values['step']):.2f} s",
        }
        for way, values in samples.items()
    ]
    ratio = statistics.median(samples["local first"]["still"]) / statistics.median(samples["straight"]["still"])
    nbytes = samples["straight"]["bytes"][0]
    title = (
        f"Saving a {args.size} encoder and its decoder, {nbytes / 1e9:.2f} GB, two ranks, ZeRO-2, bf16; "
        f"local first stands still {ratio:.2f} times as long; {args.rounds} rounds in turns, medians"
    )
    save(args.out, device=torch.device("cpu"), title=title, table=table, samples=samples)


if __name__ == "__main__":
    main()

"""ViT-H/14 (657 M parameters) really trains on two CPU processes: two steps under ZeRO-3, saved, converted, loaded by timm.

    python benchmarks/vit_huge.py --out benchmarks/results/FILE.json

Reports the largest resident memory of any process, as the operating system counts it, the time of a step and of each phase,
and the sizes on disk. Everything runs through the console command, as a user would type it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import report
import timm
import torch
from safetensors.torch import load_file
from watch import watch

SETTING = [
    "model.size=huge",
    "model.image_size=224",
    "model.patch_size=14",
    "model.decoder_width=512",
    "model.decoder_depth=8",
    "model.decoder_heads=16",
    "train.duration=2 steps",
    "train.global_batch=2",
    "train.micro_batch=1",
    "train.precision=bf16",
    "train.activation_checkpointing=full",
    "optim.warmup=0 steps",
    "engine.deepspeed=zero3",
    "checkpoint.interval=2 steps",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "huge.safetensors"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "scale_mae"]
        trained = watch([*launcher, "pretrain", "debug", f"run.dir={run}", *SETTING])
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        converted = watch([sys.executable, "-m", "scale_mae", "convert", str(run), "--to", "timm", "--out", str(out)])
        encoder = timm.create_model("vit_huge_patch14_224.mae")
        encoder.load_state_dict(load_file(out), strict=True)
        checkpoint = sum(p.stat().st_size for p in (run / "checkpoints" / "step-00000002").rglob("*") if p.is_file())
        exported = out.stat().st_size
    table = [
        {
            "phase": phase,
            "seconds": f"{taken.seconds:.0f}",
            "peak GiB of a process": f"{taken.private / 2**30:.2f}",
            "of all together": f"{taken.together / 2**30:.2f}",
            "on disk, GiB": f"{size / 2**30:.2f}",
        }
        for phase, taken, size in (
            ("two steps and a checkpoint, 2 processes", trained, checkpoint),
            ("convert and check", converted, exported),
        )
    ]
    last = steps[-1]
    title = f"ViT-H/14, ZeRO-3, bf16, micro-batch 1, 2 processes; step {last['step_time_s']:.1f} s, loss {last['loss']:.3f}"
    report.save(options.out, device=torch.device("cpu"), title=title, table=table, log=steps)


if __name__ == "__main__":
    main()

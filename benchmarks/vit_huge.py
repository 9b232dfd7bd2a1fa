"""Trains ViT-H/14 (657 M parameters) on two CPU processes: two steps under ZeRO-3, a checkpoint, and an export that timm loads.

    python benchmarks/vit_huge.py --out benchmarks/results/FILE.json

Reports the peak memory of the processes, the time of a step and of each phase, and the sizes on disk. All phases run
through the console command.
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
from process_memory import measure
from safetensors.torch import load_file

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
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "huge.safetensors"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "scale_mae"]
        training = measure([*launcher, "pretrain", "debug", f"run.dir={run}", *SETTING])
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        conversion = measure([sys.executable, "-m", "scale_mae", "convert", str(run), "--to", "timm", "--out", str(out)])
        encoder = timm.create_model("vit_huge_patch14_224.mae")
        encoder.load_state_dict(load_file(out), strict=True)
        checkpoint = sum(p.stat().st_size for p in (run / "checkpoints" / "step-00000002").rglob("*") if p.is_file())
        exported = out.stat().st_size
    table = [
        {
            "phase": phase,
            "seconds": f"{usage.seconds:.0f}",
            "peak GiB of a process": f"{usage.largest / 2**30:.2f}",
            "peak GiB of all processes": f"{usage.total / 2**30:.2f}",
            "GiB on disk": f"{size / 2**30:.2f}",
        }
        for phase, usage, size in (
            ("two steps and a checkpoint, 2 processes", training, checkpoint),
            ("conversion and its check", conversion, exported),
        )
    ]
    last = steps[-1]
    title = f"ViT-H/14, ZeRO-3, bf16, micro-batch 1, 2 processes; step {last['step_time_s']:.1f} s, loss {last['loss']:.3f}"
    report.save(options.out, device=torch.device("cpu"), title=title, table=table, log=steps)


if __name__ == "__main__":
    main()

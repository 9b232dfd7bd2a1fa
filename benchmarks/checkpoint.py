"""How long does a checkpoint block training, written directly to the run directory or first to a node-local folder?

python benchmarks/checkpoint.py --out benchmarks/results/checkpoint_cpu_NAME.json --local /dev/shm

Two gloo ranks train a ViT of ``--size`` on the demo's images under ZeRO-2 and save every fourth step. Runs with and without
``checkpoint.local_dir`` take turns. The history and the log of each run state how long each save blocked training, how long it
took until the commit, and how long a step between saves took. Both folders belong to the same host. The run directory is on its
disk, and the local folder should be on something faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from report import save

from scale_mae.runs import history

STEPS, SAVE_INTERVAL = 12, 4
DIRECT, LOCAL = "directly", "through a local folder"


def run(size: str, run_dir: Path, local: Path | None) -> dict[str, list[float]]:
    """Run once. Return the seconds of each save until its commit, the seconds it blocked training, and those of each step."""
    setting = {
        "run.dir": run_dir,
        "model.size": size,
        "model.image_size": 64,
        "model.decoder_width": 512,
        "model.decoder_heads": 16,
        "train.duration": f"{STEPS} steps",
        "checkpoint.interval": f"{SAVE_INTERVAL} steps",
        "checkpoint.keep_latest": 1,
        "log.interval": 1,
        "optim.warmup": "2 steps",
        "engine.deepspeed": "zero2",
        "train.precision": "bf16",
    } | ({"checkpoint.local_dir": local} if local else {})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scale_mae"]
    command = [*launcher, "pretrain", "debug", *(f"{key}={value}" for key, value in setting.items())]
    subprocess.run(command, check=True, capture_output=True)
    saves = [event for event in history.read(run_dir) if event["event"] == "checkpoint"]
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["step_time_s"] for line in lines if line["step"] > 2}
    return {
        "commit": [event["seconds"] for event in saves],
        "blocked": [event["blocked_seconds"] for event in saves],
        "step": list(steps.values()),
        "bytes": [saves[-1]["bytes"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", help="encoder size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--local", type=Path, required=True, help="node-local folder")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="folder for the run directories")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    args = parser.parse_args()
    samples: dict[str, dict[str, list[float]]] = {DIRECT: {}, LOCAL: {}}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder, tempfile.TemporaryDirectory(dir=args.local) as local:
        for number in range(args.rounds):
            for variant, values in samples.items():
                run_dir = Path(folder) / f"{number}"
                for key, measured in run(args.size, run_dir, Path(local) if variant == LOCAL else None).items():
                    values.setdefault(key, []).extend(measured)
                shutil.rmtree(run_dir)
                print(number, variant, {k: round(statistics.median(v), 3) for k, v in values.items()}, flush=True)
    step = statistics.median(samples[DIRECT]["step"])
    table = [
        {
            "checkpoint written": variant,
            "training blocked": f"{statistics.median(values['blocked']):.2f} s",
            "in steps": f"{statistics.median(values['blocked']) / step:.1f}",
            "committed after": f"{statistics.median(values['commit']):.2f} s",
            "step": f"{statistics.median(values['step']):.2f} s",
        }
        for variant, values in samples.items()
    ]
    ratio = statistics.median(samples[LOCAL]["blocked"]) / statistics.median(samples[DIRECT]["blocked"])
    nbytes = samples[DIRECT]["bytes"][0]
    title = (
        f"Saving a {args.size} encoder and its decoder, {nbytes / 1e9:.2f} GB, two ranks, ZeRO-2, bf16; "
        f"blocked time through a local folder / directly: {ratio:.2f}; {args.rounds} rounds in turns, medians"
    )
    save(args.out, device=torch.device("cpu"), title=title, table=table, samples=samples)


if __name__ == "__main__":
    main()

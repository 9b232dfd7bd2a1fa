"""Make a reference curve: the band in which the losses of runs of one recipe lie, whatever their seed.

nice -n 15 python benchmarks/reference_curves.py demo --runs DIR --out scale_mae/reference_curves/demo.json \\
    --wrong optim.base_lr=0.0001 optim.base_lr=0.01 model.target=pixel --result benchmarks/results/reference_curves_demo.json

Use --name and --set for a recipe with overrides, and --data if the path of the images differs between machines.

The script trains the recipe with each seed, with one process, one seed after the other. It does not repeat a complete run in
DIR, and resumes an incomplete one. It divides the schedule into intervals of equal length and averages the logged losses of
each run in each interval (scale_mae.report.reference_band). The band follows from these means as `compute_band` documents.

The result contains two checks. Each seed must lie inside the band of the other seeds. Runs with a wrong value, trained for a
part of the schedule, lie outside the band if the value changes the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from report import save, versions

import scale_mae
from scale_mae.config import Config
from scale_mae.data.index import INDEX_NAME, Index, existing_index
from scale_mae.report.reference_band import FORMAT, ReferenceCurve, check_band, compute_band, interval_means, setting_value
from scale_mae.report.run_record import RunRecord, read_run_record

MODEL = ("size", "image_size", "patch_size", "target", "mask_ratio")
KEYS = (*(f"model.{key}" for key in MODEL), "train.global_batch", "train.duration")


def train(recipe: str, folder: Path, overrides: list[str], share: float = 1.0) -> RunRecord:
    """Start or resume pre-training in ``folder`` and stop at this share of the schedule."""

    def progress() -> float:
        line = read_run_record(folder).log.lines[-1:] if (folder / "log.jsonl").exists() else []
        return line[0]["step"] / line[0]["total_steps"] if line else 0.0

    if progress() < share:
        command = [sys.executable, "-m", "scale_mae", "pretrain", recipe, f"run.dir={folder}", *overrides]
        with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            while process.poll() is None:
                if share < 1 and progress() >= share:
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(1)
            if process.wait():
                sys.exit(f"{folder}: pre-training failed. See its log.txt.")
    return read_run_record(folder)


def loss_means(record: RunRecord, ends: np.ndarray) -> np.ndarray:
    """Return the mean logged loss in each interval, ``[P]``. It is NaN where nothing was logged."""
    return interval_means(record.images(record.log.lines), record.log.column("loss"), ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a shipped recipe or path of a YAML file")
    parser.add_argument("--name", help="name of the curve (default: name of the recipe)")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="overrides for all runs")
    parser.add_argument("--data", help="name of the images (default: data.source)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3], help="seeds (default: %(default)s)")
    parser.add_argument("--intervals", type=int, default=12, help="intervals of the schedule (default: %(default)s)")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder of the run directories")
    parser.add_argument("--wrong", nargs="*", default=[], metavar="section.key=value", help="wrong values, one run for each")
    parser.add_argument("--wrong-share", type=float, default=0.4, help="share of the schedule (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="reference curve (JSON)")
    parser.add_argument("--result", type=Path, help="result file (JSON)")
    args = parser.parse_args()

    records = [train(args.recipe, args.runs / f"seed-{seed}", [f"run.seed={seed}", *args.set]) for seed in args.seeds]
    config = records[0].config
    assert isinstance(config, Config)
    index = Index.open(existing_index(config.data.source) or records[0].dir / INDEX_NAME)
    total = config.steps(config.train.duration, len(index)) * config.train.global_batch
    ends = np.round(np.arange(1, args.intervals + 1) * total / args.intervals)
    losses = np.stack([loss_means(record, ends) for record in records])
    setting = {key: setting_value(config, key) for key in KEYS} | {"data": [args.data or config.data.source, index.digest]}
    low, high = compute_band(losses)
    name = args.name or args.recipe
    curve = ReferenceCurve(name, setting, ends, low, high)

    leave_one_out = {}
    for number, seed in enumerate(args.seeds):
        edges = dict(zip(("low", "high"), compute_band(np.delete(losses, number, 0)), strict=True))
        leave_one_out[str(seed)] = str(check_band(records[number], replace(curve, **edges)))
    wrong = {}
    for override in args.wrong:
        record = train(args.recipe, args.runs / f"wrong-{override}", ["run.seed=9", *args.set, override], args.wrong_share)
        wrong_losses = [None if np.isnan(mean) else round(mean, 5) for mean in loss_means(record, ends).tolist()]
        wrong[override] = {"result": str(check_band(record, curve)), "loss": wrong_losses}

    runs = " ".join([args.recipe, *(override for override in args.set if not override.startswith("data.source="))])
    content = {
        "format": FORMAT,
        "name": name,
        "about": f"{runs}, one process, seeds {args.seeds}; made by benchmarks/reference_curves.py",
        "made_with": {"scale_mae": scale_mae.__version__} | versions(),
        "setting": setting,
        "images": ends.tolist(),
        "low": low.round(5).tolist(),
        "high": high.round(5).tolist(),
        "seeds": {str(seed): row.round(5).tolist() for seed, row in zip(args.seeds, losses, strict=True)},
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    table = [
        {"run": f"seed {seed}", "checked against": "the other seeds", "result": text} for seed, text in leave_one_out.items()
    ]
    table += [{"run": name, "checked against": "all seeds", "result": check["result"]} for name, check in wrong.items()]
    title = f"Reference curve {name}: each seed against the others, and wrong values"
    save(args.result, device=torch.device("cpu"), title=title, table=table, images=ends.tolist(), wrong=wrong)


if __name__ == "__main__":
    main()

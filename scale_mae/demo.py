"""The demo: ``make demo``, or ``python -m scale_mae.demo [FOLDER]``. It runs the commands that a user would type.

It pre-trains on the shipped images with two processes under ZeRO-2, stops one of them halfway, resumes, converts the encoder,
draws reconstructions of validation images, and prints the nearest-neighbor accuracy of the trained and an untrained encoder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from scale_mae.config import UserError, load_config
from scale_mae.data.index_builder import open_index

PROCESSES = 2
RECONSTRUCTED = (1, 5, 23, 42)  # positions in the validation images


def main(folder: Path) -> None:
    """Run the demo in ``folder``. If an earlier demo used the folder, it is deleted first.

    Raises:
        UserError: The folder contains something else, or a command failed.
    """
    started = time.monotonic()
    if (folder / "config.yaml").exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty, and not the folder of an earlier demo. Give another folder.")
    config = load_config("demo")
    total_steps = config.steps(config.train.duration, len(open_index(config.data.source)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--standalone"]
    pretrain = [*launcher, "-m", "scale_mae", "pretrain", "demo", f"run.dir={folder}"]
    scale_mae = [sys.executable, "-m", "scale_mae"]

    _print_title(f"1. Pre-train, and stop one of the {PROCESSES} processes halfway")
    _run_until(pretrain, folder, total_steps // 2)
    _print_title("2. Run the same command again, which resumes")
    _run(pretrain)
    _print_title("3. Convert the encoder to weights for timm")
    _run([*scale_mae, "convert", str(folder), "--to", "timm", "--out", str(folder / "encoder.safetensors")])
    _print_title("4. Reconstruct validation images from a quarter of their patches")
    images = [str(path) for path in _write_validation_images(folder / "images")]
    _run([*scale_mae, "reconstruct", str(folder), *images, "--out", str(folder / "reconstruction.png")])
    _print_title("5. Classify 2,000 validation images by their nearest neighbors among the training images")
    sources = ["--train", "demo:train", "--val", "demo:val", "--untrained"]
    _run([*scale_mae, "knn", str(folder / "encoder.safetensors"), *sources])
    print(f"\nDone in {time.monotonic() - started:.0f} s. See {folder / 'reconstruction.png'}.", flush=True)


def _print_title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _print_command(command: list[str]) -> None:
    print("$ " + shlex.join(command).replace(sys.executable, "python"), flush=True)


def _run(command: list[str]) -> None:
    _print_command(command)
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"this command failed with exit code {code}. Its output is above.")


def _run_until(command: list[str], folder: Path, step: int) -> None:
    """Run a command until ``step`` is logged. Then send SIGTERM to one process, after which all save and exit with 0."""
    _print_command(command)
    with subprocess.Popen(command) as launcher:
        try:
            while launcher.poll() is None and _last_logged_step(folder) < step:
                time.sleep(0.2)
            if launcher.poll() is not None:
                raise UserError(f"pre-training ended before step {step} with exit code {launcher.returncode}.")
            children = psutil.Process(launcher.pid).children()
            print(f"# kill -TERM one of {len(children)} processes", flush=True)
            os.kill(children[-1].pid, signal.SIGTERM)
            if code := launcher.wait():
                raise UserError(f"the stopped processes ended with exit code {code} instead of 0.")
        finally:
            launcher.terminate()


def _last_logged_step(folder: Path) -> int:
    """Return the step of the last complete line of ``log.jsonl``, or 0."""
    try:
        return int(json.loads((folder / "log.jsonl").read_text().rpartition("\n")[0].rpartition("\n")[2])["step"])
    except (OSError, ValueError):
        return 0


def _write_validation_images(folder: Path) -> list[Path]:
    index = open_index("demo:val")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"val-{sample:04d}.jpg" for sample in RECONSTRUCTED]
    for sample, path in zip(RECONSTRUCTED, paths, strict=True):
        path.write_bytes(index.read(sample))
    return paths


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/demo"))
    except UserError as error:
        sys.exit(f"scale-mae: error: {error}")

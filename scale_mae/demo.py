"""The whole job on the shipped images, as a user would type it: ``make demo``, or ``python -m scale_mae.demo [FOLDER]``.

Pre-trains with two processes under ZeRO-2, stops one of them in the middle, resumes, converts the encoder, draws
reconstructions of validation images, and prints nearest-neighbour accuracy of the trained and the untrained encoder.
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
PICTURES = (1, 5, 23, 42)  # of the validation images


def main(folder: Path) -> None:
    """Run the demonstration in ``folder``, which is emptied first if an earlier one used it.

    Raises:
        UserError: the folder holds something else, or a step failed.
    """
    began = time.monotonic()
    if (folder / "config.yaml").exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and not an earlier demonstration; name another folder")
    config = load_config("demo")
    total = config.steps(config.train.duration, len(open_index(config.data.source)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--standalone"]
    pretrain = [*launcher, "-m", "scale_mae", "pretrain", "demo", f"run.dir={folder}"]
    program = [sys.executable, "-m", "scale_mae"]

    _title(f"1. Pre-train, and stop one of the {PROCESSES} processes halfway")
    _stop_at(pretrain, folder, total // 2)
    _title("2. The same command again resumes")
    _run(pretrain)
    _title("3. Inference weights for timm")
    _run([*program, "convert", str(folder), "--to", "timm", "--out", str(folder / "encoder.safetensors")])
    _title("4. What the model makes of validation images it sees a quarter of")
    images = [str(path) for path in _validation_images(folder / "images")]
    _run([*program, "reconstruct", str(folder), *images, "--out", str(folder / "reconstruction.png")])
    _title("5. What the encoder has learnt: nearest neighbours of 2,000 validation images among the training images")
    sources = ["--train", "demo:train", "--val", "demo:val", "--untrained"]
    _run([*program, "knn", str(folder / "encoder.safetensors"), *sources])
    print(f"\n{time.monotonic() - began:.0f} s. Look at {folder / 'reconstruction.png'}", flush=True)


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _show(command: list[str]) -> None:
    print("$ " + shlex.join(command).replace(sys.executable, "python"), flush=True)


def _run(command: list[str]) -> None:
    _show(command)
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"this command failed with exit code {code}")


def _stop_at(command: list[str], folder: Path, step: int) -> None:
    """Run until ``step`` is logged, send SIGTERM to one process, and expect all to save and end well."""
    _show(command)
    with subprocess.Popen(command) as launcher:
        try:
            while launcher.poll() is None and _logged_step(folder) < step:
                time.sleep(0.2)
            if launcher.poll() is not None:
                raise UserError(f"pre-training ended before step {step} with exit code {launcher.returncode}")
            children = psutil.Process(launcher.pid).children()
            print(f"# kill -TERM one of {len(children)} processes", flush=True)
            os.kill(children[-1].pid, signal.SIGTERM)
            if code := launcher.wait():
                raise UserError(f"the stopped processes ended with exit code {code}, not 0")
        finally:
            launcher.terminate()


def _logged_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / "log.jsonl").read_text().rpartition("\n")[0].rpartition("\n")[2])["step"])
    except (OSError, ValueError):
        return 0


def _validation_images(folder: Path) -> list[Path]:
    index = open_index("demo:val")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"val-{sample:04d}.jpg" for sample in PICTURES]
    for sample, path in zip(PICTURES, paths, strict=True):
        path.write_bytes(index.read(sample))
    return paths


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/demo"))
    except UserError as error:
        sys.exit(f"scale-mae: error: {error}")

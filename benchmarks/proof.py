"""Does pre-training work? A test on a CPU with all images of Fashion-MNIST, one small ViT and several seeds.

python benchmarks/proof.py --runs DIR --out benchmarks/results/proof_cpu.json --picture docs/images/proof.png

This needs Debian's package dataset-fashion-mnist (60,000 and 10,000 images, MIT licence). The encoder is pre-trained
without labels for four lengths, and compared with encoders that are not pre-trained. The comparisons are k-NN and a linear
probe on frozen features, and fine-tuning against training from scratch for the same number of epochs, with all labels and
with 1 % of them. Then the encoder is pre-trained again with interruptions, on a changing number of processes, and under
ZeRO-3.

Commands of scale-mae do all the work. A run that is in DIR already is not repeated, and an interrupted run is continued.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from PIL import Image
from report import save

from scale_mae.demo_data.pack_fashion_mnist import ORIGINALS, read_idx

PROGRAM = [sys.executable, "-m", "scale_mae"]
RECIPES = Path(__file__).parent / "proof"
SEEDS = (0, 1, 2)
EPOCHS = (1, 2, 4, 8)  # of pre-training
FINETUNE, FINETUNE_FEW, PROBE = 2, 60, 2  # epochs
FEW = 60  # labeled images per class, which is 1 %


@dataclass(frozen=True)
class CommandRunner:
    """Runs commands of scale-mae.

    Attributes:
        folder: The folder of all runs.
        jobs: Number of single-threaded processes at a time.
    """

    folder: Path
    jobs: int

    @property
    def data(self) -> Path:
        """The folder of the packed images."""
        return self.folder / "data"

    def run(self, name: str, *command: str, done: Path, processes: int = 1, stop: Callable[[], bool] | None = None) -> None:
        """Run a command unless it was run before. Its output goes to a log next to the runs.

        Args:
            name: Name of the log.
            command: The command and its arguments, without ``scale-mae``.
            done: A file or folder that exists if the command was run before.
            processes: Number of processes, started by torchrun.
            stop: Called repeatedly. If it returns True, SIGTERM stops the command.
        """
        if done.exists():
            return
        program = PROGRAM
        if processes > 1:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            program = [*torchrun, "-m", "scale_mae"]
        with open(self.folder / f"{name}.log", "a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            with subprocess.Popen([*program, *command], env=environment, stdout=log, stderr=log) as process:
                while process.poll() is None:
                    if stop and stop():
                        ranks = [int(p) for p in _children(process.pid)] if processes > 1 else [process.pid]
                        os.kill(ranks[0], signal.SIGTERM)
                        process.wait()
                        return
                    time.sleep(0.2)
            if process.returncode or not done.exists():
                sys.exit(f"the command failed; see {self.folder / f'{name}.log'}")

    def run_all(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run all tasks, ``jobs`` at a time."""
        with ThreadPoolExecutor(self.jobs) as pool:
            for future in [pool.submit(task) for task in tasks]:
                future.result()


def _children(pid: int) -> list[str]:
    """Return the process IDs of the children of a process."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def pack(folder: Path, originals: Path) -> None:
    """Write both splits and the 1 % subset as tar shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name, per_class in (("train", "train", None), ("few", "train", FEW), ("val", "t10k", None)):
        if (folder / f"{split}.index").exists():
            continue
        images = read_idx(originals / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read_idx(originals / f"{name}-labels-idx1-ubyte.gz", 8)
        selected = np.arange(len(labels))
        if per_class:
            selected = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
        (folder / split).mkdir(exist_ok=True)
        with tarfile.open(folder / split / "00.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in selected:
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, "PNG", compress_level=1)
                for suffix, content in (("png", png.getvalue()), ("cls", b"%d" % labels[i])):
                    member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        index = [*PROGRAM, "index", str(folder / split), "--out", str(folder / f"{split}.index")]
        subprocess.run(index, check=True)


def checkpoint_of(run: Path, epochs: float) -> Path:
    """Return the last checkpoint of a pre-training run."""
    return run / "checkpoints" / f"step-{round(epochs * 60000 / 256):08d}"


class Experiments:
    """All runs of the comparison."""

    def __init__(self, runner: CommandRunner) -> None:
        self.runner = runner
        self.train, self.few, self.val = (str(runner.data / f"{split}.index") for split in ("train", "few", "val"))

    def pretraining_dir(self, seed: int, epochs: int) -> Path:
        """Return the run directory of a pre-training run."""
        return self.runner.folder / f"pretrain-{epochs}-seed{seed}"

    def pretrain(self, seed: int, epochs: int) -> None:
        """Pre-train, then measure k-NN accuracy. After the longest length, also measure the same encoder untrained."""
        run = self.pretraining_dir(seed, epochs)
        self._pretrain(run, seed, epochs)
        options = ["--untrained"] if epochs == EPOCHS[-1] else []
        self.knn(run, *options)

    def _pretrain(
        self, run: Path, seed: int, epochs: int, *overrides: str, processes: int = 1, stop_at: int | None = None
    ) -> None:
        steps = run / "log.jsonl"

        def has_reached_step() -> bool:
            lines = steps.read_text().splitlines() if steps.exists() else []
            return bool(lines) and json.loads(lines[-1])["step"] >= (stop_at or 0)

        settings = [f"run.dir={run}", f"run.seed={seed}", f"data.source={self.train}", f"train.duration={epochs} epochs"]
        done = checkpoint_of(run, epochs)
        command = ["pretrain", str(RECIPES / "pretrain.yaml"), *settings, *overrides]
        self.runner.run(run.name, *command, done=done, processes=processes, stop=has_reached_step if stop_at else None)

    def knn(self, run: Path, *options: str) -> None:
        """Measure the k-NN accuracy, and write it to ``knn.json`` in the run directory."""
        out = run / "knn.json"
        sources = ["--train", self.train, "--val", self.val, "--batch-size", "500", "--out", str(out)]
        self.runner.run(run.name, "knn", str(run), *sources, *options, done=out)

    def classify(self, task: str, name: str, seed: int, epochs: int, source: str, *overrides: str) -> None:
        """Fine-tune, or train a linear probe."""
        run = self.runner.folder / f"{name}-seed{seed}"
        settings = [f"run.dir={run}", f"run.seed={seed}", f"data.source={source}", f"classify.val_source={self.val}"]
        settings += [f"train.duration={epochs} epochs", f"classify.eval_interval={epochs} epochs", *overrides]
        self.runner.run(run.name, task, str(RECIPES / f"{task}.yaml"), *settings, done=run / "results" / f"{task}.json")

    def tasks(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """Return the pre-training tasks, and the tasks that need their results."""
        pretraining = [lambda s=s, e=e: self.pretrain(s, e) for e in reversed(EPOCHS) for s in SEEDS]
        transfer: list[Callable[[], None]] = []
        for seed in SEEDS:
            pretrained = [f"model.init_from={self.pretraining_dir(seed, EPOCHS[-1])}"]
            scratch = ["optim.layer_decay=1.0"]
            few = ["train.global_batch=100", "train.micro_batch=100", "optim.base_lr=0.002"]
            for kind, init in (("pretrained", pretrained), ("scratch", scratch)):
                transfer.append(
                    lambda s=seed, k=kind, o=init: self.classify("finetune", f"all-{k}", s, FINETUNE, self.train, *o)
                )
                transfer.append(
                    lambda s=seed, k=kind, o=init, f=few: self.classify(
                        "finetune", f"few-{k}", s, FINETUNE_FEW, self.few, *f, *o
                    )
                )
            for kind, init in (("pretrained", pretrained), ("untrained", [])):
                transfer.append(
                    lambda s=seed, k=kind, o=init: self.classify("linprobe", f"probe-{k}", s, PROBE, self.train, *o)
                )
        return pretraining, transfer

    def repeat_differently(self) -> None:
        """Repeat the second length with seed 0 in three ways: interrupted twice, on one and then two processes, and ZeRO-3."""
        epochs, total = EPOCHS[1], round(EPOCHS[1] * 60000 / 256)
        resumed, elastic, zero3 = (self.runner.folder / name for name in ("resumed", "elastic", "zero3"))
        for share in (1 / 3, 2 / 3):
            self._pretrain(resumed, 0, epochs, stop_at=round(total * share))
        self._pretrain(resumed, 0, epochs)
        self._pretrain(elastic, 0, epochs, stop_at=total // 2)
        self._pretrain(elastic, 0, epochs, "train.micro_batch=128", processes=2)
        self._pretrain(zero3, 0, epochs, "train.micro_batch=128", "engine.deepspeed=zero3", processes=2)
        for run in (resumed, elastic, zero3):
            self.knn(run)


def read_score(path: Path, key: str = "top1") -> float:
    """Return a score of a result file."""
    return float(json.loads(path.read_text())["scores"][key])


def collect_scores(experiments: Experiments) -> dict[str, list[float]]:
    """Return the top-1 accuracies of each comparison, one for each seed."""
    folder = experiments.runner.folder
    scores = {f"k-NN, {e} epochs": [read_score(experiments.pretraining_dir(s, e) / "knn.json") for s in SEEDS] for e in EPOCHS}
    longest = [experiments.pretraining_dir(s, EPOCHS[-1]) / "knn.json" for s in SEEDS]
    scores["k-NN, untrained"] = [read_score(path, "untrained_top1") for path in longest]
    for name, task in {"probe": "linprobe", "all": "finetune", "few": "finetune"}.items():
        for kind in ("pretrained", "untrained" if name == "probe" else "scratch"):
            scores[f"{name}, {kind}"] = [
                read_score(folder / f"{name}-{kind}-seed{s}" / "results" / f"{task}.json") for s in SEEDS
            ]
    for name in ("resumed", "elastic", "zero3"):
        scores[name] = [read_score(folder / name / "knn.json")]
    return scores


def check_claims(scores: dict[str, list[float]]) -> dict[str, bool]:
    """Return for each claim whether it holds.

    "Above" means that the worst seed of one side is better than the best seed of the other. "Clearly above" requires a margin
    of 1 point, and "far above" a margin of 5 points.
    """

    def is_above(high: str, low: str, margin: float = 0.0) -> bool:
        return min(scores[high]) > max(scores[low]) + margin

    lengths = [fmean(scores[f"k-NN, {e} epochs"]) for e in EPOCHS]
    repeated = scores[f"k-NN, {EPOCHS[1]} epochs"]
    spread = max(repeated) - min(repeated)
    return {
        "k-NN far above untrained": is_above(f"k-NN, {EPOCHS[-1]} epochs", "k-NN, untrained", 0.05),
        "linear probe far above untrained": is_above("probe, pretrained", "probe, untrained", 0.05),
        "fine-tuning above scratch, all labels": is_above("all, pretrained", "all, scratch"),
        "fine-tuning clearly above scratch, 1 % of the labels": is_above("few, pretrained", "few, scratch", 0.01),
        "longer pre-training is better, four lengths": all(a < b for a, b in pairwise(lengths)),
        **{f"{n} within the seeds' spread": abs(scores[n][0] - repeated[0]) <= spread for n in ("resumed", "elastic", "zero3")},
    }


def build_table(scores: dict[str, list[float]]) -> list[dict[str, str]]:
    """Return a table of the means and standard deviations over the seeds."""
    descriptions = {
        **{f"k-NN, {e} epochs": f"k-NN (k=20) after {e} epoch{'s' * (e > 1)} of pre-training" for e in EPOCHS},
        "k-NN, untrained": "k-NN (k=20), untrained encoder",
        "probe, pretrained": f"linear probe, {PROBE} epochs, after {EPOCHS[-1]} epochs of pre-training",
        "probe, untrained": f"linear probe, {PROBE} epochs, random encoder",
        "all, pretrained": f"fine-tuned, {FINETUNE} epochs, 60,000 labels",
        "all, scratch": f"from scratch, {FINETUNE} epochs, 60,000 labels",
        "few, pretrained": f"fine-tuned, {FINETUNE_FEW} epochs, 600 labels",
        "few, scratch": f"from scratch, {FINETUNE_FEW} epochs, 600 labels",
        **{n: f"k-NN after {EPOCHS[1]} epochs, seed 0, {n}" for n in ("resumed", "elastic", "zero3")},
    }
    return [
        {
            "what": text,
            "top-1, %": f"{100 * fmean(scores[key]):.2f}",
            "±": f"{100 * stdev(scores[key]):.2f}" if len(scores[key]) > 1 else "",
            "seeds": ", ".join(f"{100 * value:.2f}" for value in scores[key]),
        }
        for key, text in descriptions.items()
    ]


def plot(scores: dict[str, list[float]], path: Path) -> None:
    """Plot the lengths on the left and the comparisons on the right, with one dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=[1, 1.4])
    means = [100 * fmean(scores[f"k-NN, {e} epochs"]) for e in EPOCHS]
    left.plot(EPOCHS, means, color="tab:blue")
    for epochs in EPOCHS:
        left.plot([epochs] * len(SEEDS), [100 * v for v in scores[f"k-NN, {epochs} epochs"]], "o", color="tab:blue", alpha=0.6)
    left.axhline(100 * fmean(scores["k-NN, untrained"]), color="tab:grey", linestyle="--", label="untrained")
    left.set(xscale="log", xlabel="epochs of pre-training, no labels", ylabel="k-NN top-1, %", title="Longer is better")
    left.set_xticks(EPOCHS, [str(e) for e in EPOCHS])
    left.minorticks_off()
    left.legend()
    pairs = (("linear probe", "probe", "untrained"), ("600 labels", "few", "scratch"), ("60,000 labels", "all", "scratch"))
    for position, (_, name, without) in enumerate(pairs):
        for offset, kind, color in ((-0.18, without, "tab:grey"), (0.18, "pretrained", "tab:blue")):
            values = [100 * v for v in scores[f"{name}, {kind}"]]
            right.bar(position + offset, fmean(values), 0.34, color=color, alpha=0.5)
            right.plot([position + offset] * len(values), values, "o", color=color)
            right.annotate(f"{fmean(values):.1f}", (position + offset, max(values)), ha="center", va="bottom", xytext=(0, 4),
                           textcoords="offset points")  # fmt: skip
    right.set_xticks(range(len(pairs)), [text for text, *_ in pairs])
    right.set(ylabel="top-1, %", ylim=(40, 100), title="Without (grey) and with pre-training (blue)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run the missing experiments, and report all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder of all runs")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--picture", type=Path, help="PNG file for the plot")
    parser.add_argument("--jobs", type=int, default=2, help="single-threaded processes at a time (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, seconds_file = time.monotonic(), args.runs / "seconds.json"
    args.runs.mkdir(parents=True, exist_ok=True)
    earlier_seconds = json.loads(seconds_file.read_text()) if seconds_file.exists() else 0.0
    stopped = threading.Event()

    def record_seconds() -> None:
        while not stopped.wait(5):
            seconds_file.write_text(json.dumps(earlier_seconds + time.monotonic() - start))

    threading.Thread(target=record_seconds, daemon=True).start()
    runner = CommandRunner(args.runs, args.jobs)
    pack(runner.data, ORIGINALS)
    experiments = Experiments(runner)
    pretraining, transfer = experiments.tasks()
    runner.run_all(pretraining)
    runner.run_all(transfer)
    experiments.repeat_differently()
    stopped.set()
    seconds = earlier_seconds + time.monotonic() - start
    scores = collect_scores(experiments)
    claims = check_claims(scores)
    for text, holds in claims.items():
        print(f"{'yes' if holds else 'NO '} {text}")
    if args.picture:
        plot(scores, args.picture)
    save(
        args.out,
        device=torch.device("cpu"),
        title=f"Fashion-MNIST, {len(SEEDS)} seeds; {seconds / 60:.0f} minutes in total",
        table=build_table(scores),
        seeds=list(SEEDS),
        seconds=round(seconds),
        top1=scores,
        claims=claims,
    )


if __name__ == "__main__":
    main()

"""Proof that pre-training works, on real images and this machine's CPU: full Fashion-MNIST, one small ViT, several seeds.

python benchmarks/proof.py --runs DIR --out benchmarks/results/proof_cpu.json --picture docs/images/proof.png

Needs Debian's package dataset-fashion-mnist (60,000 and 10,000 images, MIT licence). Pre-trains without labels for four
lengths, and compares with encoders that were not pre-trained: k-NN and a linear probe on frozen features, fine-tuning against
training from scratch for equally many epochs, with all labels and with 1 % of them. Then pre-trains once more, resumed, elastic
and under ZeRO-3. Everything is done by scale-mae's commands; a run that is in DIR already is not repeated, and an interrupted
one goes on.
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
FEW = 60  # labelled images a class: 1 %


@dataclass(frozen=True)
class Lab:
    """Where things are, and how many processes work at once.

    Attributes:
        folder: of all runs.
        jobs: single-threaded processes at once.
    """

    folder: Path
    jobs: int

    @property
    def data(self) -> Path:
        """Of the packed images."""
        return self.folder / "data"

    def run(self, name: str, *command: str, done: Path, processes: int = 1, ask: Callable[[], bool] | None = None) -> None:
        """Run a command of scale-mae unless it was run; its output goes to a log beside the runs.

        Args:
            name: of the log.
            command: without the program.
            done: what is there when it has been run.
            processes: of torchrun.
            ask: polled while it runs; when it says so, it is stopped by SIGTERM.
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
                    if ask and ask():
                        ranks = [int(p) for p in _children(process.pid)] if processes > 1 else [process.pid]
                        os.kill(ranks[0], signal.SIGTERM)
                        process.wait()
                        return
                    time.sleep(0.2)
            if process.returncode or not done.exists():
                sys.exit(f"{self.folder / f'{name}.log'}: failed")

    def all(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Do all, ``jobs`` at once."""
        with ThreadPoolExecutor(self.jobs) as pool:
            for each in [pool.submit(task) for task in tasks]:
                each.result()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def pack(folder: Path, originals: Path) -> None:
    """Both splits and the 1 % as tar shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name, per_class in (("train", "train", None), ("few", "train", FEW), ("val", "t10k", None)):
        if (folder / f"{split}.index").exists():
            continue
        images = read_idx(originals / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read_idx(originals / f"{name}-labels-idx1-ubyte.gz", 8)
        kept = np.arange(len(labels))
        if per_class:
            kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
        (folder / split).mkdir(exist_ok=True)
        with tarfile.open(folder / split / "00.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in kept:
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, "PNG", compress_level=1)
                for suffix, content in (("png", png.getvalue()), ("cls", b"%d" % labels[i])):
                    member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        index = [*PROGRAM, "index", str(folder / split), "--out", str(folder / f"{split}.index")]
        subprocess.run(index, check=True)


def checkpoint_of(run: Path, epochs: float) -> Path:
    """The last checkpoint of a pre-training run."""
    return run / "checkpoints" / f"step-{round(epochs * 60000 / 256):08d}"


class Proof:
    """All runs of the proof, by name."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.train, self.few, self.val = (str(lab.data / f"{split}.index") for split in ("train", "few", "val"))

    def pretrained(self, seed: int, epochs: int) -> Path:
        """Run directory of a pre-training."""
        return self.lab.folder / f"pretrain-{epochs}-seed{seed}"

    def pretrain(self, seed: int, epochs: int) -> None:
        """Pre-train, then measure k-NN; of the longest also the same encoder untrained."""
        run = self.pretrained(seed, epochs)
        self._pretrain(run, seed, epochs)
        more = ["--untrained"] if epochs == EPOCHS[-1] else []
        self.knn(run, *more)

    def _pretrain(self, run: Path, seed: int, epochs: int, *more: str, processes: int = 1, stop_at: int | None = None) -> None:
        steps = run / "log.jsonl"

        def reached() -> bool:
            lines = steps.read_text().splitlines() if steps.exists() else []
            return bool(lines) and json.loads(lines[-1])["step"] >= (stop_at or 0)

        given = [f"run.dir={run}", f"run.seed={seed}", f"data.source={self.train}", f"train.duration={epochs} epochs", *more]
        done = checkpoint_of(run, epochs)
        command = ["pretrain", str(RECIPES / "pretrain.yaml"), *given]
        self.lab.run(run.name, *command, done=done, processes=processes, ask=reached if stop_at else None)

    def knn(self, run: Path, *more: str) -> None:
        """k-NN accuracy; written to ``knn.json`` in the run directory."""
        out = run / "knn.json"
        sources = ["--train", self.train, "--val", self.val, "--batch-size", "500", "--out", str(out)]
        self.lab.run(run.name, "knn", str(run), *sources, *more, done=out)

    def classify(self, task: str, name: str, seed: int, epochs: int, source: str, *more: str) -> None:
        """Fine-tune or probe."""
        run = self.lab.folder / f"{name}-seed{seed}"
        given = [f"run.dir={run}", f"run.seed={seed}", f"data.source={source}", f"classify.val_source={self.val}"]
        given += [f"train.duration={epochs} epochs", f"classify.eval_interval={epochs} epochs", *more]
        self.lab.run(run.name, task, str(RECIPES / f"{task}.yaml"), *given, done=run / "results" / f"{task}.json")

    def tasks(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """What the other things need, and these."""
        first = [lambda s=s, e=e: self.pretrain(s, e) for e in reversed(EPOCHS) for s in SEEDS]
        then: list[Callable[[], None]] = []
        for seed in SEEDS:
            trained = [f"model.init_from={self.pretrained(seed, EPOCHS[-1])}"]
            scratch = ["optim.layer_decay=1.0"]
            few = ["train.global_batch=100", "train.micro_batch=100", "optim.base_lr=0.002"]
            for kind, own in (("pretrained", trained), ("scratch", scratch)):
                then.append(lambda s=seed, k=kind, o=own: self.classify("finetune", f"all-{k}", s, FINETUNE, self.train, *o))
                then.append(
                    lambda s=seed, k=kind, o=own, f=few: self.classify(
                        "finetune", f"few-{k}", s, FINETUNE_FEW, self.few, *f, *o
                    )
                )
            for kind, own in (("pretrained", trained), ("untrained", [])):
                then.append(lambda s=seed, k=kind, o=own: self.classify("linprobe", f"probe-{k}", s, PROBE, self.train, *o))
        return first, then

    def otherwise(self) -> None:
        """The second length at seed 0 again: interrupted twice; begun by one process and ended by two; two under ZeRO-3."""
        epochs, total = EPOCHS[1], round(EPOCHS[1] * 60000 / 256)
        resumed, elastic, zero3 = (self.lab.folder / name for name in ("resumed", "elastic", "zero3"))
        for share in (1 / 3, 2 / 3):
            self._pretrain(resumed, 0, epochs, stop_at=round(total * share))
        self._pretrain(resumed, 0, epochs)
        self._pretrain(elastic, 0, epochs, stop_at=total // 2)
        self._pretrain(elastic, 0, epochs, "train.micro_batch=128", processes=2)
        self._pretrain(zero3, 0, epochs, "train.micro_batch=128", "engine.deepspeed=zero3", processes=2)
        for run in (resumed, elastic, zero3):
            self.knn(run)


def top1(path: Path, key: str = "top1") -> float:
    """A score of a result file."""
    return float(json.loads(path.read_text())["scores"][key])


def collect(proof: Proof) -> dict[str, list[float]]:
    """Top-1 accuracy of everything, one a seed."""
    folder = proof.lab.folder
    found = {f"k-NN, {e} epochs": [top1(proof.pretrained(s, e) / "knn.json") for s in SEEDS] for e in EPOCHS}
    last = [proof.pretrained(s, EPOCHS[-1]) / "knn.json" for s in SEEDS]
    found["k-NN, untrained"] = [top1(path, "untrained_top1") for path in last]
    for name, task in {"probe": "linprobe", "all": "finetune", "few": "finetune"}.items():
        for kind in ("pretrained", "untrained" if name == "probe" else "scratch"):
            found[f"{name}, {kind}"] = [top1(folder / f"{name}-{kind}-seed{s}" / "results" / f"{task}.json") for s in SEEDS]
    for name in ("resumed", "elastic", "zero3"):
        found[name] = [top1(folder / name / "knn.json")]
    return found


def verdicts(found: dict[str, list[float]]) -> dict[str, bool]:
    """What was to be shown. ``clearly`` is by more than the seeds' whole range on both sides; ``far``: 5 points besides."""

    def above(high: str, low: str, margin: float = 0.0) -> bool:
        return min(found[high]) > max(found[low]) + margin

    lengths = [fmean(found[f"k-NN, {e} epochs"]) for e in EPOCHS]
    again = found[f"k-NN, {EPOCHS[1]} epochs"]
    spread = max(again) - min(again)
    return {
        "k-NN far above untrained": above(f"k-NN, {EPOCHS[-1]} epochs", "k-NN, untrained", 0.05),
        "linear probe far above untrained": above("probe, pretrained", "probe, untrained", 0.05),
        "fine-tuning above scratch, all labels": above("all, pretrained", "all, scratch"),
        "fine-tuning clearly above scratch, 1 % of the labels": above("few, pretrained", "few, scratch", 0.01),
        "longer pre-training is better, four lengths": all(a < b for a, b in pairwise(lengths)),
        **{f"{n} within the seeds' spread": abs(found[n][0] - again[0]) <= spread for n in ("resumed", "elastic", "zero3")},
    }


def rows(found: dict[str, list[float]]) -> list[dict[str, str]]:
    """A table of means and standard deviations over seeds."""
    named = {
        **{f"k-NN, {e} epochs": f"k-NN (k=20) after {e} epoch{'s' * (e > 1)} of pre-training" for e in EPOCHS},
        "k-NN, untrained": "k-NN (k=20), encoder untrained",
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
            "top-1, %": f"{100 * fmean(found[key]):.2f}",
            "±": f"{100 * stdev(found[key]):.2f}" if len(found[key]) > 1 else "",
            "seeds": ", ".join(f"{100 * value:.2f}" for value in found[key]),
        }
        for key, text in named.items()
    ]


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Lengths on the left, comparisons on the right; a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=[1, 1.4])
    means = [100 * fmean(found[f"k-NN, {e} epochs"]) for e in EPOCHS]
    left.plot(EPOCHS, means, color="tab:blue")
    for epochs in EPOCHS:
        left.plot([epochs] * len(SEEDS), [100 * v for v in found[f"k-NN, {epochs} epochs"]], "o", color="tab:blue", alpha=0.6)
    left.axhline(100 * fmean(found["k-NN, untrained"]), color="tab:grey", linestyle="--", label="untrained")
    left.set(xscale="log", xlabel="epochs of pre-training, no labels", ylabel="k-NN top-1, %", title="Longer is better")
    left.set_xticks(EPOCHS, [str(e) for e in EPOCHS])
    left.minorticks_off()
    left.legend()
    pairs = (("linear probe", "probe", "untrained"), ("600 labels", "few", "scratch"), ("60,000 labels", "all", "scratch"))
    for place, (_, name, without) in enumerate(pairs):
        for offset, kind, colour in ((-0.18, without, "tab:grey"), (0.18, "pretrained", "tab:blue")):
            values = [100 * v for v in found[f"{name}, {kind}"]]
            right.bar(place + offset, fmean(values), 0.34, color=colour, alpha=0.5)
            right.plot([place + offset] * len(values), values, "o", color=colour)
            right.annotate(f"{fmean(values):.1f}", (place + offset, max(values)), ha="center", va="bottom", xytext=(0, 4),
                           textcoords="offset points")  # fmt: skip
    right.set_xticks(range(len(pairs)), [text for text, *_ in pairs])
    right.set(ylabel="top-1, %", ylim=(40, 100), title="Without (grey) and with pre-training (blue)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, then tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--picture", type=Path, help="PNG of the plot")
    parser.add_argument("--jobs", type=int, default=2, help="single-threaded processes at once (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, spent = time.monotonic(), args.runs / "seconds.json"
    args.runs.mkdir(parents=True, exist_ok=True)
    before = json.loads(spent.read_text()) if spent.exists() else 0.0
    stopped = threading.Event()

    def keep_time() -> None:
        while not stopped.wait(5):
            spent.write_text(json.dumps(before + time.monotonic() - began))

    threading.Thread(target=keep_time, daemon=True).start()
    lab = Lab(args.runs, args.jobs)
    pack(lab.data, ORIGINALS)
    proof = Proof(lab)
    first, then = proof.tasks()
    lab.all(first)
    lab.all(then)
    proof.otherwise()
    stopped.set()
    seconds = before + time.monotonic() - began
    found = collect(proof)
    shown = verdicts(found)
    for text, holds in shown.items():
        print(f"{'yes' if holds else 'NO '} {text}")
    if args.picture:
        draw(found, args.picture)
    save(
        args.out,
        device=torch.device("cpu"),
        title=f"Fashion-MNIST, {len(SEEDS)} seeds; all in {seconds / 60:.0f} minutes",
        table=rows(found),
        seeds=list(SEEDS),
        seconds=round(seconds),
        top1=found,
        shown=shown,
    )


if __name__ == "__main__":
    main()

"""How much time do metrics take, as a share of a training step: phase times, the work of a log step, and the exporter?

The first method times each part separately and adds them up: the phase times of every step, the work of every twentieth
step, which is a log step (reading, counting, ``counters.json``, ``log.jsonl``, ``log.txt``, console), and the CPU time of one
scrape per second. Prometheus usually scrapes every fifteen seconds. The sum is compared with a step on this machine. It is also
compared with a step of ViT-B on an H100 that reaches 40 % of its 989 TFLOP/s with 512 images (58.5 GFLOP for an image). On
a GPU the host works while the GPU computes, so the result is an upper bound. But phase times are CUDA events there, which
are not timed here.

The second method times intervals of ``log.interval`` steps of a real engine with metrics and without. Another process
scrapes the exporter once a second. The variants take turns, and every second round runs in reverse order.

    python benchmarks/metrics.py --rounds 8 --out benchmarks/results/metrics_cpu_NAME.json
    python benchmarks/metrics.py --rounds 1 --repeats 20      (a check that it runs)
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import redirect_stderr
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from report import save
from torch import Tensor
from training import paired_ratio

from scale_mae.checkpoint.saver import Saver
from scale_mae.config import load_config
from scale_mae.data.failure_counter import FailureCounter
from scale_mae.distributed.process_group import World, process_group
from scale_mae.engine.deepspeed import Engine
from scale_mae.metrics.step_timer import StepTimer
from scale_mae.model.mae import build_mae
from scale_mae.training.metrics_logger import MetricsLogger
from scale_mae.training.monitoring import build_monitoring
from scale_mae.training.time_limit import StopTimeEstimator

LOG_EVERY = 20
IMAGE, DECODER_DEPTH = 112, 2  # a short step, so that the share of metrics is large
H100_STEP_S = 512 * 58.5e9 / (0.4 * 989e12)
SCRAPER = """
import sys, time, urllib.request
from pathlib import Path
while True:
    if Path(sys.argv[2]).exists():
        urllib.request.urlopen(sys.argv[1]).read()
    time.sleep(1)
"""


class Training:
    """A real engine with its metrics."""

    def __init__(self, world: World, folder: Path, size: str, batch: int) -> None:
        setting = {"run.dir": str(folder / "run"), "log.interval": LOG_EVERY, "model.size": size, "model.image_size": IMAGE}
        setting |= {
            "train.global_batch": batch,
            "train.micro_batch": batch,
            "train.precision": "fp32",
            "engine.deepspeed": "zero1",
            "engine.compile": False,
        }
        config = load_config("vit_base", setting)
        (folder / "run").mkdir()
        self.model = build_mae(size, image_size=(IMAGE, IMAGE), decoder_depth=DECODER_DEPTH, seed=0)
        self.engine = Engine(self.model, config, world)
        monitoring = build_monitoring(config, world, self.model, dataset_size=1_281_167, total_steps=10**6)
        self.step_timer = monitoring.step_timer
        saver = Saver(folder / "run", config, world, zero_stage=1, max_bytes=0, main_only_bytes=0)
        decoder: Any = SimpleNamespace(fallbacks=0)
        self.metrics_logger = MetricsLogger(
            monitoring=monitoring,
            world=world,
            failure_counter=FailureCounter(0.1),
            saver=saver,
            stop_time=StopTimeEstimator(0),
            decoder=decoder,
            save_interval=1000,
        )
        self.hooks = dict(self.model._forward_hooks)
        self.step_number = 0
        (entry,) = (folder / "prometheus").glob("*.json")
        port = json.loads(entry.read_text())[0]["targets"][0].rpartition(":")[2]
        self.url = f"http://127.0.0.1:{port}/metrics"

    def steps(self, images: Tensor, noise: Tensor, *, measured: bool) -> dict[str, float]:
        """Train one interval between log steps. Return the wall-clock and CPU seconds of a step."""
        self.model._forward_hooks.clear()
        if measured:
            self.model._forward_hooks.update(self.hooks)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(LOG_EVERY):
            if measured:
                self.step_timer.mark("vote")
            loss = self.engine.forward_backward(images, noise)
            if measured:
                self.step_timer.mark("backward")
            self.engine.step(1e-5)
            if measured:
                self.step_timer.mark("optimizer")
                self.step_timer.mark("data")
                self.step_timer.end_step()
        if measured:
            self.log(float(loss))
        return {"wall_s": (time.perf_counter() - wall) / LOG_EVERY, "cpu_s": (time.process_time() - cpu) / LOG_EVERY}

    def log(self, loss: float) -> None:
        """Do the work of a log step."""
        self.step_number += LOG_EVERY
        self.metrics_logger.log_step(
            step=self.step_number, loss=loss, lr=1e-5, grad_norm=1.0, loss_scale=1.0, skipped_steps=0, rollbacks=0
        )


def time_phase_marks(device: torch.device, repeats: int) -> float:
    """Return the CPU seconds that the phase times of a step take."""
    watch, samples = StepTimer(device), []
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(LOG_EVERY):
            for name in ("vote", "forward", "backward", "optimizer", "data"):
                watch.mark(name)
            watch.end_step()
        samples.append((time.thread_time() - start) / LOG_EVERY)
        watch.read_steps()
    return median(samples)


def time_log_steps(training: Training, repeats: int) -> tuple[float, float]:
    """Return the (wall-clock, CPU) seconds of a log step."""
    wall, cpu = [], []
    for _ in range(repeats):
        for _ in range(LOG_EVERY):
            for name in ("vote", "forward", "backward", "optimizer", "data"):
                training.step_timer.mark(name)
            training.step_timer.end_step()
        wall_start, cpu_start = time.perf_counter(), time.thread_time()
        training.log(1.0)
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.thread_time() - cpu_start)
    return median(wall), median(cpu)


def time_scrapes(url: str, repeats: int) -> tuple[float, int]:
    """Return the CPU seconds of a scrape in this process, including the request, and the number of series."""
    samples = []
    for _ in range(repeats):
        start = time.process_time()
        with urllib.request.urlopen(url) as response:
            content = response.read()
        samples.append(time.process_time() - start)
    return median(samples), sum(not line.startswith(b"#") for line in content.splitlines())


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name, process_group() as world, redirect_stderr(io.StringIO()):
        training = Training(world, Path(name), options.size, options.batch)
        images = torch.randn(options.batch, 3, IMAGE, IMAGE, device=world.device)
        noise = torch.rand(options.batch, training.model.num_patches, device=world.device)
        training.steps(images, noise, measured=True)
        phase_marks = time_phase_marks(world.device, options.repeats)
        log_wall, log_cpu = time_log_steps(training, options.repeats)
        scrape, lines = time_scrapes(training.url, options.repeats)

        flag = Path(name) / "scrape"
        scraper = subprocess.Popen([sys.executable, "-c", SCRAPER, training.url, str(flag)])
        times: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for number in range(options.rounds):
            for measured in (True, False) if number % 2 else (False, True):
                flag.touch() if measured else flag.unlink(missing_ok=True)
                times[measured].append(training.steps(images, noise, measured=measured))
        scraper.kill()
        scraper.wait()
        training.metrics_logger.log.__exit__(None, None, None)
        device = world.device

    step = median(times_of_step["wall_s"] for times_of_step in times[False])
    ratios = {key: paired_ratio(times[True], times[False], key) for key in ("wall_s", "cpu_s")}
    rows = {
        "phase times of a step": (phase_marks, 1.0),
        f"log step, every {LOG_EVERY} steps": (log_wall, 1 / LOG_EVERY),
        "scrape, every second": (scrape, None),
    }
    table, shares = [], {"here": 0.0, "h100": 0.0}
    for part, (seconds, per_step) in rows.items():
        row = {"part": part, "us": f"{seconds * 1e6:.1f}"}
        for machine, step_seconds in (("here", step), ("h100", H100_STEP_S)):
            share = seconds * (per_step / step_seconds if per_step else 1.0)  # a scrape is a share of a second
            shares[machine] += share
            row[f"share of {'this machine' if machine == 'here' else 'an H100'}'s step"] = f"{share:.4%}"
        table.append(row)
    total = {"part": "total", "us": ""}
    table.append(total | dict(zip(list(table[0])[2:], (f"{share:.4%}" for share in shares.values()), strict=True)))
    title = (
        f"Cost of metrics, ViT-{options.size} encoder, batch {options.batch}, {IMAGE} pixels, step {step:.3f} s here and "
        f"{H100_STEP_S:.4f} s on an H100, {lines} series; {options.rounds} intervals of {LOG_EVERY} steps in turns, "
        f"with / without metrics: {ratios['wall_s']}, by CPU time {ratios['cpu_s']}"
    )
    samples: dict[str, Any] = {"with": times[True], "without": times[False], "log_step_cpu_s": log_cpu}
    save(options.out, device=device, title=title, table=table, samples=samples, shares=shares)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="encoder size (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images in a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="intervals with metrics, and without (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=300, help="measurements of each part (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

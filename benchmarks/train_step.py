"""Time of a training step of a masked autoencoder: forward, backward, AdamW.

Against transformers' ViTMAEForPreTraining: same weights, images, noise, optimizer and weight-decay groups. "ours" is a
plain PyTorch loop, "ours, ZeRO-1" is the engine that the system trains with, one process. The variants take turns, one
step each, in one process; every second round runs in reverse order. At bf16 the two plain loops hold weights, gradients
and moments in bf16 (``.bfloat16()``), the engine keeps fp32 masters and moments and so does more:

    python benchmarks/train_step.py --peer transformers --device cpu --batch 16 --rounds 8 --out benchmarks/results/FILE.json

Over sizes, compilation and recompute policies: the engine at bf16, ZeRO-1, one process; for each case the largest
micro-batch that fits (doubling, then bisection), its speed and its peak memory. "graphs" counts what torch.compile made:
0 in a compiled case means that nothing was compiled:

    python benchmarks/train_step.py --sizes base large huge --out benchmarks/results/FILE.json
    python benchmarks/train_step.py --device cpu --sizes nano --max-batch 4 --rounds 2     (a check that it runs)
"""

from __future__ import annotations

import argparse
import copy
import gc
import traceback
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from training import (
    DTYPES,
    POLICIES,
    Trial,
    engine_step,
    engine_world,
    largest,
    make_engine,
    make_inputs,
    matmul_rate,
    paired_ratio,
    peer_of,
    plain,
    timed,
)

from scale_mae.metrics.peak_flops import peak_flops
from scale_mae.model.mae import build_mae
from scale_mae.model.sizes import SIZES

IMAGE = 224


def main() -> None:
    options = _options()
    with engine_world(torch.device(options.device)) as world:
        compare(options, world) if options.peer else sweep(options, world)


def compare(options: argparse.Namespace, world: Any) -> None:
    """Ours, the peer and our engine, in turns."""
    size, batch = options.sizes[0], options.batch
    samples: dict[str, Any] = {}
    table = []
    for precision in options.precisions:
        dtype = DTYPES[precision]
        model = build_mae(size, image_size=(IMAGE, IMAGE), seed=0)
        flops = model.flops().train
        images, noise = make_inputs(model, batch, world.device)
        images = images.to(dtype)
        steps = {
            "ours": plain(copy.deepcopy(model).to(world.device, dtype), lambda m, i, n: m(i, n).loss),
            "transformers": plain(peer_of(model).to(world.device, dtype), lambda m, i, n: m(pixel_values=i, noise=n).loss),
            "ours, ZeRO-1": engine_step(make_engine(model, world, size=size, batch=batch, precision=precision)),
        }
        losses = {name: step(images, noise).item() for name, step in steps.items()}  # of the same weights; also the warm-up
        times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        for round_ in range(options.rounds):
            for name in list(steps)[:: -1 if round_ % 2 else 1]:
                times[name].append(timed(partial(steps[name], images, noise), world.device))
            print(precision, {name: round(values[-1]["wall_s"], 2) for name, values in times.items()}, flush=True)
        samples[precision] = {"first_loss": losses, "train_flops_per_image": flops, "times": times}
        for name, values in times.items():
            seconds = median(value["wall_s"] for value in values)
            table.append(
                {
                    "precision": precision,
                    "variant": name,
                    "median s": f"{seconds:.3f}",
                    "images/s": f"{batch / seconds:.2f}",
                    "TFLOP/s": f"{flops * batch / seconds / 1e12:.3f}",
                    "time / ours: median (min-max)": paired_ratio(values, times["ours"], "wall_s"),
                    "by CPU time": paired_ratio(values, times["ours"], "cpu_s"),
                    "first loss": f"{losses[name]:.6f}",
                }
            )
        del steps
        gc.collect()
    title = f"Training step, ViT-{size} MAE, batch {batch}, {IMAGE} pixels, medians of {options.rounds} steps taken in turns"
    report.save(options.out, device=world.device, title=title, table=table, samples=samples)


def sweep(options: argparse.Namespace, world: Any) -> None:
    """Every size, compiled or not, under every recompute policy, at the largest micro-batch that fits."""
    device = world.device
    measured = matmul_rate(torch.bfloat16, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_flops(name, "bf16")
    print(f"{name}: bf16 matrix product measured {measured / 1e12:.2f} TFLOP/s, taken as peak: {peak}", flush=True)
    table: list[dict[str, str]] = []
    cases: list[dict[str, Any]] = []
    for size in options.sizes:
        model = build_mae(size, image_size=(IMAGE, IMAGE), seed=0)
        found: dict[str, int] = {}  # by policy, in the mode before: where the search of the next mode begins
        for compiled in [mode == "compiled" for mode in options.modes]:
            for policy in options.policies:
                case: dict[str, Any] = {"size": size, "mode": "compiled" if compiled else "eager", "policy": policy}
                try:
                    start = found.get(policy) or min(options.batch, options.max_batch)
                    case |= measure(Trial(model, world, size, policy, compiled), options, start)
                    found[policy] = case["batch"]
                except Exception:  # one case that cannot run must not lose the others
                    traceback.print_exc()
                    case["error"] = traceback.format_exc()
                cases.append(case)
                table.append(_sweep_row(case, model.flops().train, peak, measured))
                title = f"Largest micro-batch and speed, bf16, ZeRO-1, one process, {IMAGE} pixels, {name}"
                facts = {"peak_flops_per_s": peak, "matmul_flops_per_s": measured}
                print(report.as_text(table[-1:]), flush=True)
                last = len(cases) == len(options.sizes) * len(options.modes) * len(options.policies)
                # after each case, so that a run cut short leaves what it has measured
                report.save(options.out, device=device, title=title, table=table, show=last, **facts, samples=cases)


def _sweep_row(case: dict[str, Any], flops: int, peak: float | None, measured: float) -> dict[str, str]:
    row = {key: case[key] for key in ("size", "mode", "policy")}
    blank = dict.fromkeys(("batch", "images/s", "TFLOP/s", "MFU", "of matmul speed", "peak GiB", "graphs"), "-")
    if "error" in case:
        return row | blank | {"batch": "failed"}
    if not case["batch"]:
        return row | blank | {"batch": "none fits"}
    speed = case["batch"] / median(case["step_s"])
    return row | {
        "batch": str(case["batch"]),
        "images/s": f"{speed:.1f}",
        "TFLOP/s": f"{speed * flops / 1e12:.2f}",
        "MFU": f"{speed * flops / peak:.1%}" if peak else "-",
        "of matmul speed": f"{speed * flops / measured:.1%}",
        "peak GiB": f"{case['peak_bytes'] / 2**30:.2f}" if case["peak_bytes"] else "-",
        "graphs": str(case["graphs"]),
    }


def measure(trial: Trial, options: argparse.Namespace, start: int) -> dict[str, Any]:
    """The largest micro-batch of a case, and how fast that is."""
    device = trial.world.device
    try:
        trial.close()  # collects what the case before it left
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        batch = largest(trial.fits, start, options.max_batch)
        if not batch:
            return {"batch": 0}
        return trial.measure(batch, options.rounds) | {"bytes_before": before}
    finally:
        trial.close()


def _options() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["transformers"], help="compare with this implementation, in turns")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["base"], help="with --peer, the first one")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of --peer")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--batch", type=int, default=16, help="of --peer; else where the search begins")
    parser.add_argument("--max-batch", type=int, help="where the search ends; on a CPU it searches only if this is set")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each variant")
    parser.add_argument("--peak-tflops", type=float, help="the device's bf16 peak, for MFU")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args()
    options.max_batch = options.max_batch or (4096 if options.device == "cuda" else options.batch)
    return options


if __name__ == "__main__":
    main()

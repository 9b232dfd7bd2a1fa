"""How much memory does each kind of activation checkpointing save, how much time does it cost, and are the gradients equal?

Memory is that of PyTorch's allocator, so it includes every live tensor. On a CPU it is the sum of all allocations and releases
that the profiler records during one forward and backward pass. On a GPU it is ``torch.cuda.memory_allocated``. Weights, inputs
and gradients exist before and do not count.

    held   live after the forward pass: the tensors kept for the backward pass, and the outputs
    peak   the largest live memory during both passes

"offload" moves the inputs of blocks to host memory. On a CPU they are there already, so "offload" must equal "full". Only a
GPU shows its effect.

The time is that of the forward pass, the backward pass and AdamW. The policies take turns on one model, one step each. Every
second round runs in reverse order.

    python benchmarks/activation_checkpointing.py --size base --batch 16 --rounds 6 --out benchmarks/results/FILE.json
    python benchmarks/activation_checkpointing.py --size nano --batch 2 --rounds 2      (a check that it runs)
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from training import DTYPES, POLICIES, make_inputs, paired_ratio, plain, timed

from scale_mae.engine.activation_checkpointing import apply_activation_checkpointing
from scale_mae.model.mae import MAE, build_mae
from scale_mae.model.sizes import SIZES

MARK = 1234567  # bytes of an allocation that no tensor of a model has: it marks the end of the forward pass


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_mae(options.size, image_size=(224, 224), seed=0).to(device, DTYPES[options.precision]).train()
    images, noise = make_inputs(model, options.batch, device)

    memory, differences = {}, {}
    expected: list[Tensor] = []
    for policy in POLICIES:
        set_policy(model, policy)
        model(images, noise).loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        expected = expected or gradients
        differences[policy] = max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True))
        memory[policy] = (cuda_memory if device.type == "cuda" else cpu_memory)(model, images, noise)
        model.zero_grad()
    del expected, gradients
    print({policy: {key: round(value / 2**20) for key, value in sizes.items()} for policy, sizes in memory.items()}, flush=True)

    step = plain(model, lambda m, i, n: m(i, n).loss)
    step(images, noise)
    times: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
    for round_ in range(options.rounds):
        for policy in POLICIES[:: -1 if round_ % 2 else 1]:
            set_policy(model, policy)
            times[policy].append(timed(partial(step, images, noise), device))
        print({policy: round(values[-1]["wall_s"], 2) for policy, values in times.items()}, flush=True)

    table = []
    for policy in POLICIES:
        row = {"policy": policy}
        for key, nbytes in memory[policy].items():
            row |= {f"{key} MiB": f"{nbytes / 2**20:.0f}", f"{key} / none": f"{nbytes / memory['none'][key]:.3f}"}
        row["median s"] = f"{median(value['wall_s'] for value in times[policy]):.3f}"
        row["time / none: median (min-max)"] = paired_ratio(times[policy], times["none"], "wall_s")
        row["by CPU time"] = paired_ratio(times[policy], times["none"], "cpu_s")
        row["gradients"] = "equal" if differences[policy] == 0 else f"differ by {differences[policy]:.1e}"
        table.append(row)
    title = (
        f"Activation checkpointing, ViT-{options.size} MAE, batch {options.batch}, {options.precision}, "
        f"medians of {options.rounds} steps"
    )
    samples: dict[str, Any] = {"memory_bytes": memory, "gradient_difference": differences, "times": times}
    report.save(options.out, device=device, title=title, table=table, samples=samples)


def set_policy(model: MAE, policy: str) -> None:
    """Replace the policy of a model, after the ``forward`` that the previous policy set on each block is removed."""
    blocks = [*model.blocks, *model.decoder_blocks]
    for block in blocks:
        block.__dict__.pop("forward", None)
    apply_activation_checkpointing(blocks, policy)


def cpu_memory(model: MAE, images: Tensor, noise: Tensor) -> dict[str, int]:
    """Return the bytes held after the forward pass and at the peak, from all events of the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        loss = model(images, noise).loss
        mark = torch.empty(MARK, dtype=torch.uint8)
        loss.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, peak, held = 0, 0, None
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.nbytes() == mark.nbytes:
            held = live
        else:
            live += event.nbytes()
            peak = max(peak, live)
    assert held is not None
    return {"held": held, "peak": peak}


def cuda_memory(model: MAE, images: Tensor, noise: Tensor) -> dict[str, int]:
    """Return the same for GPU memory, from the counters of the caching allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = model(images, noise).loss
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return {"held": held, "peak": torch.cuda.max_memory_allocated() - before}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="base", help="encoder size (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images in a step (default: %(default)s)")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each policy (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

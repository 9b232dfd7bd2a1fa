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
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from torch import Tensor, nn

from scale_mae.config import Config
from scale_mae.config.sections import OptimConfig
from scale_mae.metrics.peak_flops import peak_flops
from scale_mae.model.mae import MAE, build_mae
from scale_mae.model.sizes import SIZES

IMAGE = 224
LR = 1.5e-4
POLICIES = ("none", "full", "every_k", "selective", "offload")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Step = Callable[[Tensor, Tensor], Tensor]  # one whole training step of (images, noise); gives the loss


def main() -> None:
    options = _options()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a GPU; the engine takes one where it finds one
    from scale_mae.distributed.process_group import process_group

    with process_group() as world:
        if world.device.type != options.device:
            raise SystemExit(f"--device {options.device}: this machine has only {world.device.type}")
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


def paired_ratio(values: list[dict[str, float]], ours: list[dict[str, float]], key: str) -> str:
    pairs = [value[key] / mine[key] for value, mine in zip(values, ours, strict=True)]
    return f"{median(pairs):.3f} ({min(pairs):.3f}-{max(pairs):.3f})"


def plain(model: nn.Module, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Step:
    """A PyTorch training loop's step, with our weight-decay groups and fused AdamW."""
    from scale_mae.engine.optimizer import build_optimizer

    optimizer = build_optimizer(model.train(), OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = LR

    def step(images: Tensor, noise: Tensor) -> Tensor:
        loss = loss_of(model, images, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def make_engine(
    model: MAE, world: Any, *, size: str, batch: int, precision: str, policy: str = "none", compiled: bool = False
) -> Any:
    """The system's engine over a copy of the model."""
    from scale_mae.engine.deepspeed import Engine

    config = Config.model_validate(
        {
            "model": {"size": size},
            "train": {"global_batch": batch, "micro_batch": batch, "precision": precision, "activation_checkpointing": policy},
            "engine": {"deepspeed": "zero1", "compile": compiled},
        }
    )
    return Engine(copy.deepcopy(model), config, world)


def engine_step(engine: Any) -> Step:
    def step(images: Tensor, noise: Tensor) -> Tensor:
        loss: Tensor = engine.forward_backward(images, noise)
        engine.step(LR)
        return loss

    return step


def peer_of(model: MAE) -> nn.Module:
    """transformers' (5.x) model of the same shape with the same weights."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size, decoder = model.size, model.decoder_embed.out_features
    peer = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            intermediate_size=int(size.width * size.mlp_ratio),
            image_size=IMAGE,
            patch_size=size.patch_size,
            layer_norm_eps=model.norm.eps,
            decoder_hidden_size=decoder,
            decoder_num_hidden_layers=len(model.decoder_blocks),
            decoder_num_attention_heads=model.decoder_blocks[0].attn.num_heads,
            decoder_intermediate_size=4 * decoder,
            mask_ratio=model.mask_ratio,
            norm_pix_loss=True,
            attn_implementation="sdpa",
        )
    )
    peer.load_state_dict(dict(pair for name, value in model.state_dict().items() for pair in _renamed(name, value)))
    return peer


def _renamed(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    outer = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
    }
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    stem, _, kind = name.rpartition(".")
    if name in outer or stem in outer:
        return [(outer[name] if name in outer else f"{outer[stem]}.{kind}", value)]
    if ".qkv." in name or "blocks." in name:
        stack, number, part = stem.split(".", 2)
        layer = f"{'vit.' if stack == 'blocks' else 'decoder.decoder_'}layers.{number}"
        if part == "attn.qkv":
            return [(f"{layer}.attention.{x}_proj.{kind}", third) for x, third in zip("qkv", value.chunk(3), strict=True)]
        return [(f"{layer}.{inner.get(part, part)}.{kind}", value)]
    return [(f"decoder.{name}", value)]


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


class Trial:
    """One case. Its engine is made anew after running out of memory, which leaves DeepSpeed's buffers half filled."""

    def __init__(self, model: MAE, world: Any, size: str, policy: str, compiled: bool) -> None:
        self.model, self.world, self.size, self.policy, self.compiled = model, world, size, policy, compiled
        self.step: Step | None = None
        self.engine: Any = None

    def fits(self, batch: int) -> bool:
        """Whether two steps of this micro-batch run in the device's memory."""
        torch.compiler.reset()  # compile for this batch, not for a batch of any size
        try:
            self.run(batch, 2)
        except torch.OutOfMemoryError:
            fitted = False
        else:
            fitted = True
        if not fitted:  # outside of the handler, where the traceback still holds the activations
            self.close()
        print(f"  {self.size} {self.policy} {'compiled' if self.compiled else 'eager'} {batch}: {fitted}", flush=True)
        return fitted

    def run(self, batch: int, steps: int) -> None:
        if self.engine is None:
            options = {"size": self.size, "batch": batch, "precision": "bf16", "policy": self.policy}
            self.engine = make_engine(self.model, self.world, compiled=self.compiled, **options)
        images, noise = make_inputs(self.model, batch, self.world.device)
        step = engine_step(self.engine)
        for _ in range(steps):
            step(images, noise)
        _wait(self.world.device)

    def close(self) -> None:
        if self.engine is not None:
            self.engine._engine.destroy()
        self.engine = None
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(trial: Trial, options: argparse.Namespace, start: int) -> dict[str, Any]:
    """The largest micro-batch of a case, and how fast that is."""
    device, cuda = trial.world.device, trial.world.device.type == "cuda"
    try:
        trial.close()  # collects what the case before it left
        before = torch.cuda.memory_allocated(device) if cuda else 0
        batch = largest(trial.fits, start, options.max_batch)
        if not batch:
            return {"batch": 0}
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        trial.run(batch, 2)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        at_once = 4 if cuda else 1  # steps between two looks at the clock, so that the host runs ahead as in training
        images, noise = make_inputs(trial.model, batch, device)
        step = engine_step(trial.engine)
        seconds = [
            timed(lambda: [step(images, noise) for _ in range(at_once)], device)["wall_s"] / at_once
            for _ in range(options.rounds)
        ]
        return {
            "batch": batch,
            "step_s": seconds,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
            "bytes_before": before,
            "graphs": graphs,
        }
    finally:
        trial.close()


def largest(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest batch up to ``limit`` that fits, to one part in 16; 0 if none does."""
    low, high, batch = 0, limit + 1, start
    while low < batch < high:
        if fits(batch):
            low, batch = batch, min(2 * batch, limit)
        else:
            high, batch = batch, batch if low else batch // 2
    while high - low > max(1, low // 16) and low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large matrix product, the fastest of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return float(2 * n**3 / min(timed(lambda: a @ b, device)["wall_s"] for _ in range(10)))


def timed(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of the clock, and of this process's threads."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    _wait(device)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_inputs(model: MAE, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    return images.to(device), torch.rand(batch, model.num_patches, generator=generator).to(device)


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
    parser.add_argument("--max-batch", type=int, help="where the search ends; on a CPU it does not search unless told")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each variant")
    parser.add_argument("--peak-tflops", type=float, help="the device's bf16 peak, for MFU")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args()
    options.max_batch = options.max_batch or (4096 if options.device == "cuda" else options.batch)
    return options


if __name__ == "__main__":
    main()

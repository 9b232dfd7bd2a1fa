"""Training steps that the benchmarks time: a plain PyTorch loop, the engine, and transformers' ViTMAEForPreTraining."""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from scale_mae.config import Config
from scale_mae.config.schema import OptimConfig
from scale_mae.model.mae import MAE

LR = 1.5e-4
POLICIES = ("none", "full", "every_k", "selective", "offload")
TINY_DECODER = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2}  # of a rehearsal
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Step = Callable[[Tensor, Tensor], Tensor]  # one whole training step of (images, noise); gives the loss


@contextmanager
def engine_world(device: torch.device, *, rehearse: bool = False) -> Iterator[Any]:
    """The process group of one process, which the engine needs, on a device."""
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a GPU; the engine takes one where it finds one
    from scale_mae.distributed.process_group import process_group

    with process_group() as world:
        if world.device.type != device.type:
            raise SystemExit(f"the engine uses {world.device}, not {device}")
        if rehearse:
            torch.set_num_threads(1)  # threads of a shared machine wait for each other longer than they work
        yield world


def plain(model: nn.Module, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Step:
    """A PyTorch training loop's step, with our weight-decay groups and fused AdamW."""
    optimizer = adamw(model.train())

    def step(images: Tensor, noise: Tensor) -> Tensor:
        loss = loss_of(model, images, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def mixed(peer: nn.Module, dtype: torch.dtype) -> Step:
    """A step of transformers' model with automatic mixed precision: fp32 weights, autocast, and loss scaling for fp16."""
    optimizer = adamw(peer.train())
    device = next(peer.parameters()).device.type
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def step(images: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            loss: Tensor = peer(pixel_values=images, noise=noise).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW with the settings and the weight-decay groups of our training."""
    from scale_mae.engine.optimizer import has_weight_decay

    config = OptimConfig()
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[has_weight_decay(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[decay], "weight_decay": config.weight_decay if decay else 0.0} for decay in groups],
        lr=LR,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def make_engine(
    model: MAE,
    world: Any,
    *,
    size: str,
    batch: int,
    precision: str,
    policy: str = "none",
    compiled: bool = False,
    zero: str = "zero1",
) -> Any:
    """The system's engine over a copy of the model."""
    from scale_mae.engine.deepspeed import Engine

    config = Config.model_validate(
        {
            "model": {"size": size},
            "train": {"global_batch": batch, "micro_batch": batch, "precision": precision, "activation_checkpointing": policy},
            "engine": {"deepspeed": zero, "compile": compiled},
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
            image_size=model.image_size[0],
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


class Trial:
    """One case. Its engine is made anew after running out of memory, which leaves DeepSpeed's buffers half filled."""

    def __init__(self, model: MAE, world: Any, size: str, policy: str, compiled: bool, zero: str = "zero1") -> None:
        self.model, self.world, self.size, self.policy = model, world, size, policy
        self.compiled, self.zero = compiled, zero
        self.engine: Any = None

    def fits(self, batch: int) -> bool:
        """Whether two steps of this micro-batch run in the device's memory."""
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

    def run(self, batch: int, steps: int) -> tuple[Step, Tensor, Tensor]:
        """Make ``steps`` steps of a micro-batch; the step and its inputs. Compiles for this batch, not for one of any size."""
        torch.compiler.reset()
        if self.engine is None:
            options = {"size": self.size, "batch": batch, "precision": "bf16", "policy": self.policy, "zero": self.zero}
            self.engine = make_engine(self.model, self.world, compiled=self.compiled, **options)
        images, noise = make_inputs(self.model, batch, self.world.device)
        step = engine_step(self.engine)
        for _ in range(steps):
            step(images, noise)
        wait(self.world.device)
        return step, images, noise

    def measure(self, batch: int, rounds: int) -> dict[str, Any]:
        """Seconds of a step, peak memory, and the graphs that torch.compile makes."""
        device, cuda = self.world.device, self.world.device.type == "cuda"
        torch._dynamo.utils.counters.clear()
        step, images, noise = self.run(batch, 2)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = times_of(partial(step, images, noise), device, rounds)
        peak = torch.cuda.max_memory_allocated(device) if cuda else None
        return {"batch": batch, "step_s": seconds, "peak_bytes": peak, "graphs": graphs}

    def close(self) -> None:
        """Free the engine's memory."""
        if self.engine is not None:
            self.engine._engine.destroy()
        self.engine = None
        free(self.world.device)


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


def times_of(step: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of a step. On a GPU several steps pass between two looks at the clock, so that the host runs ahead."""
    at_once = 4 if device.type == "cuda" else 1
    return [timed(lambda: [step() for _ in range(at_once)], device)["wall_s"] / at_once for _ in range(rounds)]


def timed(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of the clock, and of this process's threads."""
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wait(device)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_inputs(model: MAE, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and noise, made on the device: the host would take seconds for a large batch."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch, 3, *model.image_size, generator=generator, device=device)
    return images, torch.rand(batch, model.num_patches, generator=generator, device=device)


def paired_ratio(values: list[dict[str, float]], ours: list[dict[str, float]], key: str) -> str:
    pairs = [value[key] / mine[key] for value, mine in zip(values, ours, strict=True)]
    return f"{median(pairs):.3f} ({min(pairs):.3f}-{max(pairs):.3f})"

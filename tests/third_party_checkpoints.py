"""Writes checkpoints as plain DeepSpeed code writes them, and records the state of the engine that wrote them."""

import argparse
import collections
import contextlib
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from ranks import run_ranks
from torch import nn

TABLE = torch.sin(torch.arange(15, dtype=torch.float32).reshape(3, 5) * 0.37)  # values that 16 bits cannot represent
STEPS = 3


class LiveState(NamedTuple):
    """The state of the engine when it saved a checkpoint.

    Attributes:
        folder: The folder that was passed to ``save_checkpoint``. It holds the file ``latest``.
        state: The fp32 master weight of each trained parameter, and the value of each frozen parameter and buffer, by name.
        moments: ``step``, ``exp_avg`` and ``exp_avg_sq`` of the optimizer, by parameter name.
    """

    folder: pathlib.Path
    state: dict
    moments: dict


class AwkwardModel(nn.Module):
    """A model whose checkpoint is hard to read: tied, frozen, unused, empty and odd-sized parameters, and buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("table", TABLE.clone())
        self.register_buffer("short", TABLE[0].half())
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.embed = nn.Embedding(11, 5)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.first = nn.Linear(7, 13)
        self.again = self.first  # one module with two names
        self.second = nn.Linear(13, 5)
        self.norm = nn.LayerNorm(5)
        self.spare = nn.Module()  # never runs, because ZeRO-3 cannot gather an empty parameter
        self.spare.empty = nn.Parameter(torch.empty(0, 3))
        self.spare.empty_too = nn.Parameter(torch.empty(4, 0, 2), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.unused = nn.Parameter(torch.randn(3, 3))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight  # one parameter with two names

    def forward(self, tokens):
        self.count += 1
        x = self.embed(tokens)
        x = self.frozen(x + self.table[0].to(x.dtype) + self.short.to(x.dtype))
        x = self.norm(self.second(torch.tanh(self.again(x)))) * self.scale
        x = self.head(x).float()
        return x.logsumexp(-1).mean() + x[:, :3].square().mean()


def build_parameter_groups(model, count):
    """Return one to three parameter groups with different learning rates and decays. Frozen parameters are included."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if n.endswith("weight") and "norm" not in n]
    others = [p for n, p in named if "unused" in n]
    vectors = [p for n, p in named if not any(p is q for q in (*matrices, *others))]
    groups = {1: [[p for _, p in named]], 2: [matrices + others, vectors], 3: [matrices, vectors, others]}[count]
    return [{"params": p, "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(groups)]


CLIENT = {
    "args": argparse.Namespace(lr=1),
    "out": pathlib.Path("x"),
    "noise": np.zeros(3),
    "seen": collections.defaultdict(int),
}
FP32: dict = {}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
OVERFLOW = {"fp16": {"enabled": True, "initial_scale_power": 60}}  # every step overflows and is skipped
ACCUMULATE = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"zero_force_ds_cpu_optimizer": False}
CPU = {"device": "cpu"}


class Layout(NamedTuple):
    """A configuration of DeepSpeed, which determines the layout of its checkpoints.

    Attributes:
        groups: Number of parameter groups.
        precision: The ``fp16`` or ``bf16`` section of the config.
        zero: The ``zero_optimization`` section.
        options: More keys of the config.
        zero_init: Whether the model is built under ``deepspeed.zero.Init``.
        save_options: More arguments of ``save_checkpoint``.
    """

    groups: int
    precision: dict
    zero: dict
    options: dict | None = None
    zero_init: bool = False
    save_options: dict | None = None


LAYOUTS = {
    "zero1-fp32": Layout(1, FP32, {"stage": 1}),
    "zero2-fp32": Layout(3, FP32, {"stage": 2}),
    "zero3-fp32": Layout(2, FP32, {"stage": 3}),
    "zero1-bf16": Layout(2, BF16, {"stage": 1}, save_options={"client_state": CLIENT}),
    "zero2-bf16": Layout(3, BF16, {"stage": 2}),
    "zero3-bf16": Layout(3, BF16, {"stage": 3}, save_options={"client_state": CLIENT}),
    "zero1-fp16": Layout(3, FP16, {"stage": 1}),
    "zero2-fp16": Layout(2, FP16, {"stage": 2}),
    "zero3-fp16": Layout(1, FP16, {"stage": 3}),
    "zero1-bf16-wrapper": Layout(2, BF16, {"stage": 1}, ACCUMULATE),
    "zero2-bf16-accumulate": Layout(2, BF16, {"stage": 2}, ACCUMULATE),
    "zero1-fp16-offload": Layout(2, FP16, {"stage": 1, "offload_optimizer": CPU}, OFFLOAD),
    "zero2-bf16-offload": Layout(3, BF16, {"stage": 2, "offload_optimizer": CPU}, OFFLOAD),
    "zero3-bf16-offload": Layout(3, BF16, {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, OFFLOAD),
    "zero2-round-robin": Layout(2, BF16, {"stage": 2, "round_robin_gradients": True}),
    "zero2-aligned": Layout(2, BF16, {"stage": 2, "parameter_alignment": True}),
    "zero2-elastic": Layout(2, BF16, {"stage": 2, "elastic_checkpoint": True}),
    "zero2-without-frozen": Layout(2, BF16, {"stage": 2}, save_options={"exclude_frozen_parameters": True}),
    "zero3-sub-groups": Layout(2, BF16, {"stage": 3, "sub_group_size": 40, "param_persistence_threshold": 0}),
    "zero3-gathered": Layout(1, BF16, {"stage": 3, "gather_16bit_weights_on_model_save": True, "sub_group_size": 60}),
    "zero3-init": Layout(2, BF16, {"stage": 3}, zero_init=True),
    "zero1-overflow": Layout(2, OVERFLOW, {"stage": 1}),
    "zero2-overflow": Layout(2, OVERFLOW, {"stage": 2}),
    "zero3-overflow": Layout(2, OVERFLOW, {"stage": 3}),
    "zero0-fp32": Layout(1, FP32, {"stage": 0}),
    "zero0-bf16": Layout(2, BF16, {"stage": 0}),
    "zero0-fp16": Layout(3, FP16, {"stage": 0}),
}


def train_third_party_checkpoints(folder, layouts):
    """Train each layout and save the last two steps. Rank 0 writes the engine's state to ``live.pt`` next to them."""
    import deepspeed
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True  # PyTorch supports it on a CPU, slowly
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for name, layout in layouts.items():
        config = {"zero_optimization": layout.zero, **layout.precision, **(layout.options or {})}
        config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
        with deepspeed.zero.Init(config_dict_or_path=config) if layout.zero_init else contextlib.nullcontext():
            model = AwkwardModel()
        optimizer = torch.optim.AdamW(build_parameter_groups(model, layout.groups), lr=0.02)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for step in range(1, STEPS + 1):
            for _ in range(2):
                engine.backward(engine(torch.randint(11, (2,), generator=generator)))
                engine.step()
            if step >= STEPS - 1:
                engine.save_checkpoint(str(folder / name), **(layout.save_options or {}))
        state, moments = gather_state(engine)
        if layout.save_options and "exclude_frozen_parameters" in layout.save_options:
            for frozen in [n for n, p in engine.module.named_parameters() if not p.requires_grad]:
                del state[frozen]
        if dist.get_rank() == 0:
            torch.save(
                (state, moments), folder / name / "live.pt"
            )  # tensors cannot be sent through a pipe by a process that exits


def gather_state(engine):
    """Return the state and the moments of the engine, by every name of each parameter."""
    import deepspeed

    params = [p for p in engine.module.parameters() if getattr(p, "ds_numel", 1)]
    stage = engine.zero_optimization_stage()
    with deepspeed.zero.GatheredParameters(params) if stage == 3 else contextlib.nullcontext():
        module = {n: t.detach().clone() for n, t in engine.module.state_dict().items()}
    gather = {0: gather_zero0, 1: gather_zero12, 2: gather_zero12, 3: gather_zero3}[stage]
    masters = {id(p): values for p, *values in gather(engine.optimizer, params)}
    state, moments = dict(module), {}
    for name, p in engine.module.named_parameters(remove_duplicate=False):
        if p.requires_grad and id(p) in masters:
            state[name], moments[name] = masters[id(p)]
            assert torch.equal(state[name].to(module[name].dtype), module[name]), f"{name}: not its master weight"
    return state, moments


def gather_zero0(optimizer, params):
    """Yield each parameter with its master weight and moments, for ZeRO-0."""
    masters = {}  # ID of the 16-bit parameter -> fp32 parameter
    for half, full in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
        masters |= {id(h): f for h, f in zip(half, full, strict=True)}
    for p in params:
        master = masters.get(id(p), p)
        state = getattr(optimizer, "optimizer", optimizer).state[master]
        if state:
            yield p, master.detach().clone(), dict(state)


def gather_zero12(optimizer, params):
    """The same for ZeRO-1 and 2. Master weights and moments have the offset of the 16-bit values in the flat vector."""
    from deepspeed import comm as dist

    def all_gather(part):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.detach().contiguous())
        return torch.cat(parts)

    halves = optimizer.bf16_groups_flat if hasattr(optimizer, "bf16_groups_flat") else optimizer.bit16_groups_flat
    for half, group in zip(halves, optimizer.optimizer.param_groups, strict=True):
        master, state = all_gather(group["params"][0]), dict(optimizer.optimizer.state.get(group["params"][0], {}))
        state = {k: v if k == "step" else all_gather(v) for k, v in state.items()}
        for p in params:
            if p.numel() and half.data_ptr() <= p.data_ptr() < half.data_ptr() + half.nbytes:
                start = (p.data_ptr() - half.data_ptr()) // p.element_size()
                stop = start + p.numel()
                moments = {k: v if k == "step" else v[start:stop] for k, v in state.items()}
                yield p, master[start:stop].reshape(p.shape), moments


def gather_zero3(optimizer, params):
    """The same for ZeRO-3, with DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    steps = [state["step"] for state in optimizer.optimizer.state.values()]
    for p in params:
        if p.requires_grad:
            moments = {k: safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")} if steps else {}
            yield p, safe_get_full_fp32_param(p), moments | ({"step": steps[0]} if steps else {})


def make_third_party_checkpoints(folder, layouts=LAYOUTS, ranks=2):
    """Train and save every layout. Return a LiveState for each."""
    run_ranks(ranks, train_third_party_checkpoints, folder, layouts)
    return {name: LiveState(folder / name, *torch.load(folder / name / "live.pt")) for name in layouts}

"""Checkpoints as users of plain DeepSpeed write them, nothing of ours in them, with what the live engine held."""

import argparse
import collections
import contextlib
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from ranks import run_ranks
from torch import nn

TABLE = torch.sin(torch.arange(15, dtype=torch.float32).reshape(3, 5) * 0.37)  # not exact in 16 bits
STEPS = 3


class LiveState(NamedTuple):
    """What the live engine held when it saved.

    Attributes:
        folder: what ``save_checkpoint`` was given; holds ``latest``.
        state: name -> fp32 master; of frozen parameters and buffers what the module holds.
        moments: name -> the optimizer's ``step``, ``exp_avg`` and ``exp_avg_sq``.
    """

    folder: pathlib.Path
    state: dict
    moments: dict


class AwkwardModel(nn.Module):
    """All that makes a checkpoint hard to read: tied, frozen, unused, empty and odd-sized parameters, buffers."""

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
        self.again = self.first  # a module under two names
        self.second = nn.Linear(13, 5)
        self.norm = nn.LayerNorm(5)
        self.spare = nn.Module()  # never run: ZeRO-3 cannot gather an empty parameter
        self.spare.empty = nn.Parameter(torch.empty(0, 3))
        self.spare.empty_too = nn.Parameter(torch.empty(4, 0, 2), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.unused = nn.Parameter(torch.randn(3, 3))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight  # a parameter under two names

    def forward(self, tokens):
        self.count += 1
        x = self.embed(tokens)
        x = self.frozen(x + self.table[0].to(x.dtype) + self.short.to(x.dtype))
        x = self.norm(self.second(torch.tanh(self.again(x)))) * self.scale
        x = self.head(x).float()
        return x.logsumexp(-1).mean() + x[:, :3].square().mean()


def groups_of(model, count):
    """One, two or three parameter groups with their own learning rate and decay; frozen parameters go in as well."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if n.endswith("weight") and "norm" not in n]
    others = [p for n, p in named if "unused" in n]
    vectors = [p for n, p in named if not any(p is q for q in (*matrices, *others))]
    parts = {1: [[p for _, p in named]], 2: [matrices + others, vectors], 3: [matrices, vectors, others]}[count]
    return [{"params": p, "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(parts)]


CLIENT = {
    "args": argparse.Namespace(lr=1),
    "out": pathlib.Path("x"),
    "noise": np.zeros(3),
    "seen": collections.defaultdict(int),
}
FP32: dict = {}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
OVERFLOW = {"fp16": {"enabled": True, "initial_scale_power": 60}}  # no step is ever made
ACCUMULATE = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"zero_force_ds_cpu_optimizer": False}
CPU = {"device": "cpu"}


class Layout(NamedTuple):
    """A way to save: parameter groups, precision, DeepSpeed's ``zero_optimization``, and more of the above."""

    groups: int
    precision: dict
    zero: dict
    more: dict | None = None
    init: bool = False  # built under ``deepspeed.zero.Init``
    save: dict | None = None  # further arguments of ``save_checkpoint``


LAYOUTS = {
    "zero1-fp32": Layout(1, FP32, {"stage": 1}),
    "zero2-fp32": Layout(3, FP32, {"stage": 2}),
    "zero3-fp32": Layout(2, FP32, {"stage": 3}),
    "zero1-bf16": Layout(2, BF16, {"stage": 1}, save={"client_state": CLIENT}),
    "zero2-bf16": Layout(3, BF16, {"stage": 2}),
    "zero3-bf16": Layout(3, BF16, {"stage": 3}, save={"client_state": CLIENT}),
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
    "zero2-without-frozen": Layout(2, BF16, {"stage": 2}, save={"exclude_frozen_parameters": True}),
    "zero3-sub-groups": Layout(2, BF16, {"stage": 3, "sub_group_size": 40, "param_persistence_threshold": 0}),
    "zero3-gathered": Layout(1, BF16, {"stage": 3, "gather_16bit_weights_on_model_save": True, "sub_group_size": 60}),
    "zero3-init": Layout(2, BF16, {"stage": 3}, init=True),
    "zero1-overflow": Layout(2, OVERFLOW, {"stage": 1}),
    "zero2-overflow": Layout(2, OVERFLOW, {"stage": 2}),
    "zero3-overflow": Layout(2, OVERFLOW, {"stage": 3}),
    "zero0-fp32": Layout(1, FP32, {"stage": 0}),
    "zero0-bf16": Layout(2, BF16, {"stage": 0}),
    "zero0-fp16": Layout(3, FP16, {"stage": 0}),
}


def train_third_party_checkpoints(folder, layouts):
    """Train each layout, save the last two steps; the first rank leaves ``live.pt`` beside the checkpoints."""
    import deepspeed
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True  # PyTorch computes it on a CPU, slowly
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for name, layout in layouts.items():
        config = {"zero_optimization": layout.zero, **layout.precision, **(layout.more or {})}
        config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
        with deepspeed.zero.Init(config_dict_or_path=config) if layout.init else contextlib.nullcontext():
            model = AwkwardModel()
        optimizer = torch.optim.AdamW(groups_of(model, layout.groups), lr=0.02)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for step in range(1, STEPS + 1):
            for _ in range(2):
                engine.backward(engine(torch.randint(11, (2,), generator=generator)))
                engine.step()
            if step >= STEPS - 1:
                engine.save_checkpoint(str(folder / name), **(layout.save or {}))
        live = look(engine)
        if layout.save and "exclude_frozen_parameters" in layout.save:
            for frozen in [n for n, p in engine.module.named_parameters() if not p.requires_grad]:
                del live[0][frozen]
        if dist.get_rank() == 0:
            torch.save(live, folder / name / "live.pt")  # a pipe cannot carry tensors of a process that ends


def look(engine):
    """The state and moments that the live engine holds, by all names of each parameter."""
    import deepspeed

    params = [p for p in engine.module.parameters() if getattr(p, "ds_numel", 1)]
    stage = engine.zero_optimization_stage()
    with deepspeed.zero.GatheredParameters(params) if stage == 3 else contextlib.nullcontext():
        module = {n: t.detach().clone() for n, t in engine.module.state_dict().items()}
    look_at = {0: unsharded, 1: partitioned, 2: partitioned, 3: cut}[stage]
    masters = {id(p): values for p, *values in look_at(engine.optimizer, params)}
    state, moments = dict(module), {}
    for name, p in engine.module.named_parameters(remove_duplicate=False):
        if p.requires_grad and id(p) in masters:
            state[name], moments[name] = masters[id(p)]
            assert torch.equal(state[name].to(module[name].dtype), module[name]), f"{name}: this test looks in the wrong place"
    return state, moments


def unsharded(optimizer, params):
    """Stage 0: parameter, master, moments."""
    masters = {}  # 16-bit parameter -> fp32
    for half, full in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
        masters |= {id(h): f for h, f in zip(half, full, strict=True)}
    for p in params:
        master = masters.get(id(p), p)
        state = getattr(optimizer, "optimizer", optimizer).state[master]
        if state:
            yield p, master.detach().clone(), dict(state)


def partitioned(optimizer, params):
    """Stages 1 and 2: the place of a parameter's 16-bit values in the live flat vector is that of its master and moments."""
    from deepspeed import comm as dist

    def whole(part):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.detach().contiguous())
        return torch.cat(parts)

    halves = optimizer.bf16_groups_flat if hasattr(optimizer, "bf16_groups_flat") else optimizer.bit16_groups_flat
    for half, group in zip(halves, optimizer.optimizer.param_groups, strict=True):
        master, state = whole(group["params"][0]), dict(optimizer.optimizer.state.get(group["params"][0], {}))
        state = {k: v if k == "step" else whole(v) for k, v in state.items()}
        for p in params:
            if p.numel() and half.data_ptr() <= p.data_ptr() < half.data_ptr() + half.nbytes:
                start = (p.data_ptr() - half.data_ptr()) // p.element_size()
                place = slice(start, start + p.numel())
                yield p, master[place].reshape(p.shape), {k: v if k == "step" else v[place] for k, v in state.items()}


def cut(optimizer, params):
    """Stage 3, by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    steps = [state["step"] for state in optimizer.optimizer.state.values()]
    for p in params:
        if p.requires_grad:
            moments = {k: safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")} if steps else {}
            yield p, safe_get_full_fp32_param(p), moments | ({"step": steps[0]} if steps else {})


def make_third_party_checkpoints(folder, layouts=LAYOUTS, ranks=2):
    """Train and save every layout: layout -> Live."""
    run_ranks(ranks, train_third_party_checkpoints, folder, layouts)
    return {name: LiveState(folder / name, *torch.load(folder / name / "live.pt")) for name in layouts}

"""The engine: DeepSpeed at every ZeRO stage equals plain PyTorch; precisions, offload, and waits for the device."""

import itertools

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from scale_mae.config import Config, ConfigError, load_config
from scale_mae.config.schema import OptimConfig
from scale_mae.engine.optimizer import build_optimizer, build_parameter_groups
from scale_mae.engine.schedule import LRSchedule
from scale_mae.model.mae import build_mae

STEPS, BATCH = 10, 8
SCHEDULE = LRSchedule(peak_lr=2e-3, min_lr=0.0, warmup_steps=3, total_steps=STEPS)


def small_mae():
    return build_mae("nano", image_size=(16, 16), patch_size=(4, 4), decoder_width=32, decoder_depth=1, decoder_heads=2, seed=0)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 16, 16, generator=generator), torch.rand(BATCH, 16, generator=generator)


def make_config(stage="zero2", precision="fp32", micro_batch=BATCH, clip=None, activation_checkpointing="none"):
    return Config.model_validate(
        {
            "train": {
                "global_batch": BATCH,
                "micro_batch": micro_batch,
                "precision": precision,
                "activation_checkpointing": activation_checkpointing,
            },
            "engine": {"deepspeed": stage},
            "optim": {"clip_grad_norm": clip},
        }
    )


def plain_trace(clip=None):
    """Return the losses and gradient norms of PyTorch's AdamW without DeepSpeed."""
    model = small_mae()
    optimizer = build_optimizer(model, OptimConfig(), fused=False)
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(*batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).item())
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE.lr(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def engine_trace(engine, world, config, steps=STEPS):
    """Return the same values of the engine, which gets this rank's part of each batch."""
    accumulation = config.accumulation(world.size)
    losses, norms = [], []
    for step in range(steps):
        images, noise = batch(step)
        total = torch.zeros(())
        for micro_step in range(accumulation):
            first = (micro_step * world.size + world.rank) * config.train.micro_batch
            part = slice(first, first + config.train.micro_batch)
            total += engine.forward_backward(images[part], noise[part]) / accumulation
            norm = engine.step(SCHEDULE.lr(step), return_norm=micro_step + 1 == accumulation)
        (loss,) = world.all_reduce_sum(total[None] / world.size)
        losses.append(loss)
        norms.append(norm)
    return losses, norms


def traces(settings):
    """Run one engine per setting, one after another, on a rank."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    with process_group() as world:
        configs = [make_config(**s) for s in settings]
        return [engine_trace(Engine(small_mae(), config, world), world, config) for config in configs]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_losses_equal_plain_pytorch_for_every_stage_accumulation_and_world_size(ranks, clip):
    settings = [
        {"stage": f"zero{stage}", "micro_batch": BATCH // (ranks * accumulation), "clip": clip}
        for stage, accumulation in itertools.product(range(4), (1, 4))
    ]
    losses, norms = plain_trace(clip)
    assert max(norms) > 0.5  # otherwise clipping would change nothing
    for setting, got in zip(settings, run_ranks(ranks, traces, settings)[0], strict=True):
        np.testing.assert_allclose(got[0], losses, rtol=1e-5, err_msg=str(setting))
        np.testing.assert_allclose(got[1], norms, rtol=1e-3, err_msg=str(setting))


def test_losses_with_offload_equal_plain_pytorch():
    settings = [{"stage": s, "micro_batch": 2} for s in ("zero2_offload", "zero3_offload")]
    losses, _ = plain_trace()
    for setting, got in zip(settings, run_ranks(2, traces, settings)[0], strict=True):
        np.testing.assert_allclose(got[0], losses, rtol=1e-5, err_msg=str(setting))


def test_losses_in_bf16_are_within_half_a_percent_of_fp32():
    settings = [{"stage": f"zero{s}", "precision": "bf16", "micro_batch": 2} for s in range(4)]
    losses, _ = plain_trace()
    for setting, got in zip(settings, run_ranks(2, traces, settings)[0], strict=True):
        np.testing.assert_allclose(got[0], losses, rtol=5e-3, err_msg=str(setting))


def fp16_run(stage):
    """Train in fp16 on a CPU, to test the loss scale. DeepSpeed rejects this, but PyTorch can compute it."""
    from deepspeed.accelerator import get_accelerator

    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    get_accelerator().is_fp16_supported = lambda: True
    with process_group() as world:
        config = make_config(stage, "fp16", micro_batch=2)
        engine = Engine(small_mae(), config, world)
        before = engine.loss_scale
        losses, _ = engine_trace(engine, world, config)
        skipped_before = engine.skipped_steps
        # a loss beyond the range of fp16 makes the gradients overflow: the step is skipped and the scale is lowered
        images, noise = batch(0)
        for _ in range(3):
            engine.forward_backward(images[:2] * 1e18, noise[:2])
            engine.step(1e-3)
            engine.forward_backward(images[:2], noise[:2])
            norm = engine.step(1e-3, return_norm=True)
        return losses, skipped_before, before, engine.loss_scale, engine.skipped_steps, norm, engine.weights_are_finite()


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_fp16_uses_a_dynamic_loss_scale(stage):
    losses, skipped_before, before, after, skipped, norm, finite = run_ranks(2, fp16_run, stage)[0]
    np.testing.assert_allclose(losses, plain_trace()[0], rtol=5e-3)
    assert skipped_before == 0
    assert before == 2**16
    assert after < before
    assert skipped > skipped_before
    assert norm is None
    assert finite


def build_fp16_engine():
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False  # independent of this processor
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    with process_group() as world:
        Engine(small_mae(), make_config(precision="fp16"), world)


def test_a_precision_that_the_device_does_not_support_is_an_error():
    with pytest.raises(RankError, match=r"train\.precision=fp16: this cpu does not support it") as caught:
        run_ranks(1, build_fp16_engine)
    assert caught.value.kinds == ["ConfigError"]


class WaitCounter(TorchDispatchMode):
    """Counts reads of tensor values by the host. Each of them would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return op(*args, **(kwargs or {}))


def count_waits(setting):
    """Return the number of reads in a step that is not logged, and in a step that is logged."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    with process_group() as world:
        config = make_config(**setting)
        engine = Engine(small_mae(), config, world)
        counts = []
        for step, logged in enumerate((False, False, False, True)):
            with WaitCounter() as waits:
                images, noise = batch(step)
                engine.forward_backward(images, noise)
                engine.step(1e-3, return_norm=logged)
            counts.append(waits.count)
        return counts[2:]


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_the_host_never_waits_between_log_steps_in_bf16(stage):
    not_logged, logged = run_ranks(1, count_waits, {"stage": stage, "precision": "bf16"})[0]
    assert not_logged == 0
    assert logged > 0


def test_weight_decay_groups_equal_those_of_the_reference():
    model = small_mae()
    groups = build_parameter_groups(model, OptimConfig())
    assert [(group.weight_decay, group.lr_scale) for group in groups] == [(0.0, 1.0), (0.05, 1.0)]
    without, with_decay = (group.names for group in groups)
    names = [name for name, _ in model.named_parameters()]
    assert [n for n in names if n in without] == without  # checkpoints rely on this order
    assert [n for n in names if n in with_decay] == with_decay
    assert sorted(without + with_decay) == sorted(names)
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= set(with_decay)
    assert {"norm.weight", "norm.bias", "blocks.0.attn.qkv.bias", "patch_embed.proj.bias"} <= set(without)
    model.head = torch.nn.Linear(2, 2)
    model.head.bias = torch.nn.Parameter(torch.zeros(2, 2))
    without, with_decay = (group.names for group in build_parameter_groups(model, OptimConfig()))
    assert "head.weight" in with_decay
    assert "head.bias" in without


def test_a_deepspeed_file_must_not_set_keys_of_the_config(tmp_path):
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}')
    with pytest.raises(ConfigError, match=r"sets gradient_clipping, which optim\.clip_grad_norm decides"):
        load_config("debug", [f"engine.deepspeed={path}"]).deepspeed_json()


def build_engine_from(path):
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    with process_group() as world:
        Engine(small_mae(), make_config(stage=path), world)


def test_an_invalid_deepspeed_file_is_an_error(tmp_path):
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 7}}')
    with pytest.raises(RankError, match=r"own\.json: DeepSpeed rejects it") as caught:
        run_ranks(1, build_engine_from, str(path))
    assert caught.value.kinds == ["ConfigError"]

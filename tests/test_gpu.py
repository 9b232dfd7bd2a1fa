"""Tests that need a GPU. Without a GPU they are deselected."""

import pytest
import torch
from bad_gradients import train_with_a_bad_step
from ranks import run_ranks
from test_engine import BATCH, SCHEDULE, STEPS, batch, make_config, plain_trace, small_mae
from test_trainer import log, train, train_until
from test_trainer import make_config as make_run

from scale_mae.engine.activation_checkpointing import apply_activation_checkpointing
from scale_mae.metrics.step_timer import StepTimer
from scale_mae.model.mae import build_mae

pytestmark = pytest.mark.gpu
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def gpu_losses(precision):
    """Return losses, or an error, by DeepSpeed config. One process runs them all, because starting a process takes seconds."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    results = {}
    with process_group() as world:
        for stage in STAGES:
            try:
                engine, losses = Engine(small_mae(), make_config(stage, precision), world), []
                for step in range(STEPS):
                    images, noise = (t.to(world.device) for t in batch(step))
                    losses.append(engine.forward_backward(images, noise).item())
                    engine.step(SCHEDULE.lr(step), return_norm=True)
                results[stage] = losses
            except Exception as error:
                results[stage] = f"{type(error).__name__}: {error}"
    return results


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-2), ("fp32", 1e-3), ("fp16", 1e-2)])
def test_losses_equal_plain_pytorch_on_the_host(precision, tolerance):
    expected = plain_trace()[0]
    results = run_ranks(1, gpu_losses, precision)[0]
    close = pytest.approx(expected, tolerance)
    wrong = {stage: losses for stage, losses in results.items() if isinstance(losses, str) or losses != close}
    assert not wrong, f"expected {expected}"


def step_without_waiting(stage):
    """Do four steps. In the last one, every wait for the GPU is an error."""
    from scale_mae.data.transforms import normalize
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    with process_group() as world:
        engine = Engine(small_mae(), make_config(stage, "bf16"), world)
        timer = StepTimer(world.device)
        engine.model.register_forward_hook(timer.mark_forward)
        images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8).pin_memory()
        noise = torch.rand(8, 16).pin_memory()
        for step in range(4):
            if step == 3:
                torch.cuda.set_sync_debug_mode("error")
            on_device = normalize(images.to(world.device, non_blocking=True), (0.5,) * 3, (0.25,) * 3)
            engine.forward_backward(on_device, noise.to(world.device, non_blocking=True))
            timer.mark("backward")
            engine.step(1e-3)
            timer.mark("optimizer")
            timer.end_step()
        torch.cuda.set_sync_debug_mode("default")
        return timer.read_steps()


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_the_host_does_not_wait_for_the_gpu_between_log_steps(stage):
    step_times = run_ranks(1, step_without_waiting, stage)[0]
    assert [step.keys() for step in step_times] == [{"forward", "backward", "optimizer", "other"}] * 4
    assert all(step["forward"] > 0 for step in step_times)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_stops_and_resumes(tmp_path, precision):
    config = make_run(tmp_path, **{"train.precision": precision, "engine.compile": precision == "bf16"})
    assert not run_ranks(1, train_until, config, 4)[0].finished
    assert run_ranks(1, train, config)[0].finished
    assert sorted(log(tmp_path, "loss")) == list(range(1, 11))


def peak_memory_and_gradients(policy):
    model = build_mae("small", image_size=(224, 224), seed=0).cuda().bfloat16()
    apply_activation_checkpointing([*model.blocks, *model.decoder_blocks], policy)
    images, noise = torch.randn(32, 3, 224, 224, device="cuda"), torch.rand(32, 196, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    model(images, noise).loss.backward()
    return torch.cuda.max_memory_allocated(), {n: p.grad.float().cpu() for n, p in model.named_parameters()}


def test_activation_checkpointing_saves_memory_and_keeps_gradients():
    results = {policy: peak_memory_and_gradients(policy) for policy in ("none", "every_k", "selective", "full", "offload")}
    memory = {policy: bytes_ for policy, (bytes_, _) in results.items()}
    assert memory["offload"] <= memory["full"] < memory["every_k"] < memory["none"]
    assert memory["full"] < memory["selective"] < memory["none"]
    for policy, (_, gradients) in results.items():
        for name, expected in results["none"][1].items():
            assert (gradients[name] - expected).norm() <= 0.02 * expected.norm() + 1e-6, (policy, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_with_non_finite_gradients_changes_nothing_on_a_gpu(tmp_path, precision):
    settings = [{"stage": s, "precision": precision, "micro_batch": BATCH // 2} for s in STAGES]
    for setting, (unchanged, skipped, _, _, finite) in zip(
        settings, run_ranks(1, train_with_a_bad_step, settings, float("nan"), 0, tmp_path)[0], strict=True
    ):
        assert unchanged, setting
        assert skipped == (0, 1, 1.0, None), setting
        assert finite, setting

"""What only a GPU shows. Left out where there is none."""

import pytest
import torch
from bad_gradients import leave_out
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
    """Losses of some steps by DeepSpeed config, or what was raised. One process for all: starting one takes seconds."""
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    found = {}
    with process_group() as ranks:
        for stage in STAGES:
            try:
                engine, losses = Engine(small_mae(), make_config(stage, precision), ranks), []
                for step in range(STEPS):
                    images, noise = (t.to(ranks.device) for t in batch(step))
                    losses.append(engine.forward_backward(images, noise).item())
                    engine.step(SCHEDULE.lr(step), return_norm=True)
                found[stage] = losses
            except Exception as error:
                found[stage] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-2), ("fp32", 1e-3), ("fp16", 1e-2)])
def test_losses_follow_plain_pytorch_on_the_host(precision, tolerance):
    expected = plain_trace()[0]
    found = run_ranks(1, gpu_losses, precision)[0]
    close = pytest.approx(expected, tolerance)
    wrong = {stage: losses for stage, losses in found.items() if isinstance(losses, str) or losses != close}
    assert not wrong, f"not {expected}"


def step_without_waiting(stage):
    """A step that is not logged, with every wait for the GPU turned into an error."""
    from scale_mae.data.transforms import normalize
    from scale_mae.distributed.process_group import process_group
    from scale_mae.engine.deepspeed import Engine

    with process_group() as ranks:
        engine = Engine(small_mae(), make_config(stage, "bf16"), ranks)
        watch = StepTimer(ranks.device)
        engine.model.register_forward_hook(watch.mark_forward)
        images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8).pin_memory()
        noise = torch.rand(8, 16).pin_memory()
        for step in range(4):
            if step == 3:
                torch.cuda.set_sync_debug_mode("error")
            on_device = normalize(images.to(ranks.device, non_blocking=True), (0.5,) * 3, (0.25,) * 3)
            engine.forward_backward(on_device, noise.to(ranks.device, non_blocking=True))
            watch.mark("backward")
            engine.step(1e-3)
            watch.mark("optimizer")
            watch.end_step()
        torch.cuda.set_sync_debug_mode("default")
        return watch.read_steps()


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_no_wait_for_the_gpu_between_log_steps(stage):
    laps = run_ranks(1, step_without_waiting, stage)[0]
    assert [step.keys() for step in laps] == [{"forward", "backward", "optimizer", "other"}] * 4
    assert all(step["forward"] > 0 for step in laps)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_stops_and_resumes(tmp_path, precision):
    config = make_run(tmp_path, **{"train.precision": precision, "engine.compile": precision == "bf16"})
    assert not run_ranks(1, train_until, config, 4)[0].finished
    assert run_ranks(1, train, config)[0].finished
    assert sorted(log(tmp_path, "loss")) == list(range(1, 11))


def peak(policy):
    model = build_mae("small", image_size=(224, 224), seed=0).cuda().bfloat16()
    apply_activation_checkpointing([*model.blocks, *model.decoder_blocks], policy)
    images, noise = torch.randn(32, 3, 224, 224, device="cuda"), torch.rand(32, 196, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    model(images, noise).loss.backward()
    return torch.cuda.max_memory_allocated(), {n: p.grad.float().cpu() for n, p in model.named_parameters()}


def test_recomputation_saves_memory_and_keeps_gradients():
    results = {policy: peak(policy) for policy in ("none", "every_k", "selective", "full", "offload")}
    memory = {policy: bytes_ for policy, (bytes_, _) in results.items()}
    assert memory["offload"] <= memory["full"] < memory["every_k"] < memory["none"]
    assert memory["full"] < memory["selective"] < memory["none"]
    for policy, (_, gradients) in results.items():
        for name, expected in results["none"][1].items():
            assert (gradients[name] - expected).norm() <= 0.02 * expected.norm() + 1e-6, (policy, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_gradient_changes_nothing_on_a_gpu(tmp_path, precision):
    settings = [{"stage": s, "precision": precision, "micro_batch": BATCH // 2} for s in STAGES]
    for setting, (unchanged, skipped, _, _, finite) in zip(
        settings, run_ranks(1, leave_out, settings, float("nan"), 0, tmp_path)[0], strict=True
    ):
        assert unchanged, setting
        assert skipped == (0, 1, 1.0, None), setting
        assert finite, setting

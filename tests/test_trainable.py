"""The engine with a classifier: layer decay, EMA, LARS and evaluation at every ZeRO stage, and resuming at another one."""

import copy
import functools
import gc
import itertools
import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks
from test_engine import WaitCounter
from trainable_models import SmallClassifier, labeled_batch

from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config
from scale_mae.engine import lars as optimizers

BATCH, SAVED, STEPS, DECAY = 8, 3, 5, 0.7
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 1.5e-3, 1e-3, 5e-4)  # none is 0, so that the EMA changes in the first step
LR_SCALES = {"head.weight": 2.0}
ADAMW, LARS = {"name": "adamw", "layer_decay": 0.65}, {"name": "lars", "weight_decay": 1e-4, "trust_coefficient": 0.1}
SMALL_SUB_GROUPS = {"stage": 3, "sub_group_size": 1000, "stage3_param_persistence_threshold": 0}
ONLY_PERSISTENT = {"stage": 3, "stage3_param_persistence_threshold": 10**6}
STATE_KEYS = {True: ("fp32", "momentum_buffer", "ema"), False: ("fp32", "exp_avg", "exp_avg_sq", "ema")}


def make_config(folder, layout, precision="fp32", micro_batch=4, ema=DECAY, lars=False):
    for name, zero in (("sub_groups", SMALL_SUB_GROUPS), ("persistent", ONLY_PERSISTENT)):
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    own = folder / f"{layout}.json"
    return Config.model_validate(
        {
            "run": {"task": "finetune"},
            "optim": (LARS if lars else ADAMW) | {"ema_decay": ema},
            "train": {"global_batch": BATCH, "micro_batch": micro_batch, "precision": precision},
            "engine": {"deepspeed": str(own) if own.exists() else layout},
        }
    )


def build_engine(config, world):
    from deepspeed.accelerator import get_accelerator

    from scale_mae.engine.deepspeed import Engine

    get_accelerator().is_fp16_supported = lambda: True
    return Engine(SmallClassifier(lr_scales=LR_SCALES), config, world)


def copies(engine, world, key=None):
    """Copy the master weights of this process, or one of the optimizer's states."""
    from scale_mae.checkpoint.partitions import iterate_local_partitions

    states = engine._engine.basic_optimizer.state
    return [(states[p][key] if key else p).detach().clone() for p, _ in iterate_local_partitions(engine._engine, world.rank)]


def weights(engine):
    """Return the full weights of the model in its precision."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    full_weights = []
    for p in engine.model.parameters():
        with GatheredParameters([p], enabled=engine.zero_stage == 3):
            full_weights.append(p.detach().clone())
    return full_weights


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def train(engine, world, config, steps, bad=None):
    """Train, and return the losses. The step ``bad`` has NaN gradients. Check the EMA after every step."""
    accumulation, micro = config.accumulation(world.size), config.train.micro_batch
    losses = []
    for step in steps:
        images, labels = labeled_batch(step)
        total = torch.zeros(())
        ema = copies(engine, world, "ema" if engine._engine.basic_optimizer.state else None)
        for number in range(accumulation):
            part = slice(*((number * world.size + world.rank + i) * micro for i in (0, 1)))
            inputs = images[part] * (float("nan") if step == bad else 1)
            total += engine.forward_backward(inputs, labels[part]) / accumulation
            engine.step(LEARNING_RATES[step])
        losses += world.all_reduce_sum(total[None] / world.size)
        for average, master in zip(ema, copies(engine, world), strict=True):
            average.copy_(average if engine.last_step_skipped else DECAY * average + (1 - DECAY) * master)
        if config.optim.ema_decay and engine._engine.basic_optimizer.state:
            for average, expected in zip(copies(engine, world, "ema"), ema, strict=True):
                torch.testing.assert_close(average, expected, atol=1e-7, rtol=1e-6)
                assert not engine.last_step_skipped or torch.equal(average, expected)
    return losses


def evaluate(engine, world):
    """Return the logits with the weights and with their EMA. Check that both are restored bit for bit, also after an error."""
    images, _ = labeled_batch(99)
    states = (None, "ema") if engine._engine.basic_optimizer.state else (None,)

    def everything():
        return [*itertools.chain(*(copies(engine, world, key) for key in states)), *weights(engine)]

    before, all_logits = everything(), []
    for ema, fails in itertools.product((False, True), (False, True)):
        with suppress(ZeroDivisionError), engine.evaluation_mode(ema=ema):
            assert not any(module.training for module in engine.model.modules())
            logits = engine.model(images).numpy()
            all_logits += [] if fails else [logits]
            _ = 1 / (not fails)
        assert all(module.training for module in engine.model.modules())
        assert torch.is_grad_enabled()
        assert same(before, everything())
    return all_logits


def write(folder, jobs):
    """For each job: evaluate, train, evaluate, save, continue, and skip a bad step. Return losses and logits by job."""
    from scale_mae.distributed.process_group import process_group

    gc.freeze()
    results = {}
    with process_group() as world:
        for job in jobs:
            layout, precision, lars = job
            config = make_config(folder, layout, precision, lars=lars)
            engine = build_engine(config, world)
            logits = evaluate(engine, world)
            losses = train(engine, world, config, range(SAVED))
            logits += evaluate(engine, world)
            engine.save(folder / "-".join(map(str, (*job, world.size))), {})
            losses += train(engine, world, config, range(SAVED, STEPS))
            after, skipped = copies(engine, world), engine.skipped_steps
            assert precision == "fp16" or not skipped
            train(engine, world, config, [STEPS], bad=STEPS)
            assert same(after, copies(engine, world))
            assert engine.skipped_steps == skipped + 1
            results[job] = losses, logits
    return results


def expected_groups(lars):
    """Return (weight decay, learning-rate multiplier) of each parameter group."""
    if lars:
        return [(0.0, 1.0), (1e-4, 1.0), (1e-4, 2.0)]
    scales = [0.65**above for above in range(5, 0, -1)]
    return [*((0.0, scale) for scale in (*scales, 1.0)), *((0.05, scale) for scale in (*scales, 2.0))]


def read(folder, jobs):
    """For each job: load with another layout, save, evaluate, and continue. Return losses and logits."""
    from scale_mae.distributed.process_group import process_group

    gc.freeze()
    results = []
    with process_group() as world:
        for source, target, layout, precision, lars in jobs:
            config = make_config(folder, layout, precision, micro_batch=BATCH // world.size, lars=lars)
            engine = build_engine(config, world)
            engine.load(folder / source)
            engine.save(folder / target, {})
            logits = evaluate(engine, world)
            scales = sorted((group["weight_decay"], group["lr_scale"]) for group in engine._optimizer.param_groups)
            assert scales == expected_groups(lars)
            results.append((train(engine, world, config, range(SAVED, STEPS)), logits))
    return results


WRITTEN = [
    *((layout, "fp32", False) for layout in ("zero0", "zero1", "zero2", "zero3", "sub_groups", "persistent", "zero3_offload")),
    *((layout, "bf16", False) for layout in ("zero0", "zero2", "zero3")),
    ("zero0", "fp16", False),
    ("zero2", "fp16", False),
    *(("zero0", precision, True) for precision in ("fp32", "bf16", "fp16")),
]
ON_ONE = [(f"zero{stage}", "fp32", False) for stage in range(4)]
RESHARDINGS = {  # world size that loads: [(layout, world size that saved, layout that loads)]
    2: [
        ("zero0", 1, "zero3"),
        ("zero3", 1, "zero2"),
        ("zero2", 1, "zero0"),
        ("sub_groups", 2, "zero1"),
        ("zero1", 2, "sub_groups"),
    ],
    1: [("zero3", 2, "zero0"), ("zero1", 2, "zero3"), ("zero3_offload", 2, "zero2"), ("zero0", 2, "zero1")],
}
IN_16_BIT = [("zero0", "zero3", "bf16"), ("zero3", "zero2", "bf16"), ("zero2", "zero0", "fp16"), ("zero0", "zero2", "fp16")]


@functools.cache
def plain(lars):
    """Train with plain PyTorch. Return the losses, and the EMA at the step of the checkpoint."""
    model = SmallClassifier(lr_scales=LR_SCALES)
    groups = []
    for name, p in model.named_parameters():
        layer = {"blocks": 1, "fc_norm": 5, "head": 5}.get(name.split(".")[0], 0)
        layer += int(name.split(".")[1]) if layer == 1 else 0
        decays = p.ndim > 1 and name not in ("cls_token", "pos_embed")
        scale = LR_SCALES.get(name, 1.0) * (1.0 if lars else 0.65 ** (5 - layer))
        groups.append({"params": [p], "weight_decay": (1e-4 if lars else 0.05) * decays, "scale": scale})
    lars_options = {"momentum": 0.9, "trust_coefficient": 0.1}
    optimizer = optimizers.LARS(groups, **lars_options) if lars else torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.95))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        loss = model(*labeled_batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        for group in groups:
            group["lr"] = LEARNING_RATES[step] * group["scale"]
        optimizer.step()
        losses.append(loss.item())
        if step < SAVED:
            average = {n: DECAY * average[n] + (1 - DECAY) * p.detach() for n, p in model.named_parameters()}
    return losses, average


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return folder, {1: run_ranks(1, write, folder, ON_ONE)[0], 2: run_ranks(2, write, folder, WRITTEN)[0]}


@pytest.fixture(scope="module")
def resharded(written):
    folder, _ = written
    results = {}
    for size, hops in RESHARDINGS.items():
        jobs = [(f"{one}-fp32-False-{by}", f"{one}-{other}@{size}", other, "fp32", False) for one, by, other in hops]
        if size == 2:
            jobs += [(f"{one}-{p}-False-2", f"{one}-{other}@2{p}", other, p, False) for one, other, p in IN_16_BIT]
            jobs += [(f"zero0-{p}-True-2", f"lars@2{p}", "zero0", p, True) for p in ("fp32", "bf16", "fp16")]
        results |= dict(zip([(*job[:2], *job[3:]) for job in jobs], run_ranks(size, read, folder, jobs)[0], strict=True))
    return results


def test_losses_with_layer_decay_equal_plain_pytorch_at_every_stage(written):
    for results in written[1].values():
        for (layout, precision, lars), (losses, _) in results.items():
            rtol = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 1.0}[precision]  # fp16 skips steps until its loss scale fits
            np.testing.assert_allclose(losses, plain(lars)[0], rtol=rtol, err_msg=f"{layout} {precision} {lars}")


def test_the_ema_equals_that_of_plain_pytorch_and_is_evaluated(written):
    folder, by_size = written
    fresh = SmallClassifier().eval()
    for size, results in by_size.items():
        for (layout, precision, lars), (_, (first, first_ema, last, last_ema)) in results.items():
            reader = ZeroReader(folder / f"{layout}-{precision}-{lars}-{size}" / DEEPSPEED_TAG)
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
            assert np.array_equal(first, first_ema)
            assert np.abs(last - last_ema).max() > 1e-3
            for key, logits in (("fp32", last), ("ema", last_ema)):
                model = copy.deepcopy(fresh)
                for name, p in model.named_parameters():
                    p.data = reader.flat(name, key).reshape(p.shape).clone()
                expected = model.to(dtype)(labeled_batch(99)[0]).detach().numpy()
                np.testing.assert_allclose(
                    logits, expected, atol=1e-5 if precision == "fp32" else 1e-2, err_msg=f"{layout} {precision} {key}"
                )
            if precision == "fp32":
                for name, average in plain(lars)[1].items():
                    torch.testing.assert_close(reader.flat(name, "ema").reshape(average.shape), average, atol=2e-5, rtol=1e-4)


def test_a_run_resumes_at_another_stage_with_its_ema_and_learning_rates(written, resharded):
    folder, by_size = written
    for (source, target, precision, lars), (losses, logits) in resharded.items():
        one, other = ZeroReader(folder / source / DEEPSPEED_TAG), ZeroReader(folder / target / DEEPSPEED_TAG)
        for name, key in itertools.product(one.parameters, STATE_KEYS[lars]):
            assert torch.equal(one.flat(name, key), other.flat(name, key)), (target, name, key)
        assert sorted(g["lr_scale"] for g in other.groups)[-1] == 2.0
        layout, size = source.split("-")[0], int(source[-1])
        straight, (_, _, *expected) = by_size[size][layout, precision, lars]
        # the loss scalers of the stages skip different steps in fp16
        rtol = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 1.0}[precision]
        np.testing.assert_allclose(losses, straight[SAVED:], rtol=rtol, err_msg=target)
        np.testing.assert_allclose(logits, expected, atol=1e-5 if precision == "fp32" else 5e-2)
        if lars:  # with the same world size and stage
            assert losses == straight[SAVED:]


def load_into_adamw(folder, source):
    from scale_mae.distributed.process_group import process_group

    with process_group() as world:
        config = make_config(folder, "zero1")
        engine = build_engine(config, world)
        before = copies(engine, world)
        try:
            engine.load(folder / source)
        finally:
            assert same(before, copies(engine, world))


def test_a_checkpoint_of_another_optimizer_is_an_error_and_changes_nothing(written):
    with pytest.raises(RankError, match=r"its optimizer has no state exp_avg for ") as caught:
        run_ranks(1, load_into_adamw, written[0], "zero0-fp32-True-2")
    assert caught.value.kinds == ["CheckpointError"]


def count_waits(folder):
    from scale_mae.distributed.process_group import process_group

    counts = []
    with process_group() as world:
        for layout in ("zero1", "zero2"):
            engine = build_engine(make_config(folder, layout, "bf16", micro_batch=BATCH), world)
            for step in range(3):
                with WaitCounter() as waits:
                    engine.forward_backward(*labeled_batch(step))
                    engine.step(1e-3)
            counts.append(waits.count)
        with (
            pytest.raises(ValueError, match=r"optim\.ema"),
            build_engine(make_config(folder, "zero2", ema=None), world).evaluation_mode(True),
        ):
            pass
    return counts


def test_the_host_does_not_wait_for_the_ema(tmp_path):
    assert run_ranks(1, count_waits, tmp_path)[0] == [0, 0]

"""Training a classifier: layer decay, a moving average, LARS and evaluation, at every stage, resumed on others."""

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
from test_engine import Waits
from trainable_models import SmallClassifier, labelled

from scale_mae.checkpoint.paths import DEEPSPEED_TAG
from scale_mae.checkpoint.zero_reader import ZeroReader
from scale_mae.config import Config
from scale_mae.engine import lars as optimizers

BATCH, SAVED, STEPS, DECAY = 8, 3, 5, 0.7
RATES = (5e-4, 1e-3, 2e-3, 1.5e-3, 1e-3, 5e-4)  # none is 0, so that the average moves in the first step
SCALES = {"head.weight": 2.0}
ADAMW, LARS = {"name": "adamw", "layer_decay": 0.65}, {"name": "lars", "weight_decay": 1e-4, "trust_coefficient": 0.1}
PIECES = {"stage": 3, "sub_group_size": 1000, "stage3_param_persistence_threshold": 0}
WHOLE = {"stage": 3, "stage3_param_persistence_threshold": 10**6}
OPTIMIZER = {True: ("fp32", "momentum_buffer", "ema"), False: ("fp32", "exp_avg", "exp_avg_sq", "ema")}


def make_config(folder, layout, precision="fp32", micro_batch=4, ema=DECAY, lars=False):
    for name, zero in (("pieces", PIECES), ("whole", WHOLE)):
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


def build(config, ranks):
    from deepspeed.accelerator import get_accelerator

    from scale_mae.engine.deepspeed import Engine

    get_accelerator().is_fp16_supported = lambda: True
    return Engine(SmallClassifier(scales=SCALES), config, ranks)


def copies(engine, ranks, key=None):
    """This process's masters, or one of the optimizer's states."""
    from scale_mae.checkpoint.partitions import local_partitions

    states = engine._engine.basic_optimizer.state
    return [(states[p][key] if key else p).detach().clone() for p, _ in local_partitions(engine._engine, ranks.rank)]


def weights(engine):
    """What the model computes with."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    found = []
    for p in engine.model.parameters():
        with GatheredParameters([p], enabled=engine.zero_stage == 3):
            found.append(p.detach().clone())
    return found


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def train(engine, ranks, config, steps, bad=None):
    """Losses; those of a bad step have no finite gradients. The average follows the recursion, from wherever it stands."""
    accumulation, micro = config.accumulation(ranks.size), config.train.micro_batch
    losses = []
    for step in steps:
        images, labels = labelled(step)
        total = torch.zeros(())
        average = copies(engine, ranks, "ema" if engine._engine.basic_optimizer.state else None)
        for number in range(accumulation):
            part = slice(*((number * ranks.size + ranks.rank + i) * micro for i in (0, 1)))
            spoilt = images[part] * (float("nan") if step == bad else 1)
            total += engine.forward_backward(spoilt, labels[part]) / accumulation
            engine.step(RATES[step])
        losses += ranks.all_reduce_sum(total[None] / ranks.size)
        for was, master in zip(average, copies(engine, ranks), strict=True):
            was.copy_(was if engine.last_step_skipped else DECAY * was + (1 - DECAY) * master)
        if config.optim.ema_decay and engine._engine.basic_optimizer.state:
            for now, expected in zip(copies(engine, ranks, "ema"), average, strict=True):
                torch.testing.assert_close(now, expected, atol=1e-7, rtol=1e-6)
                assert not engine.last_step_skipped or torch.equal(now, expected)
    return losses


def evaluate(engine, ranks):
    """Logits with the weights and with their average; both come back bit for bit, from an error too."""
    images, _ = labelled(99)
    states = (None, "ema") if engine._engine.basic_optimizer.state else (None,)

    def everything():
        return [*itertools.chain(*(copies(engine, ranks, key) for key in states)), *weights(engine)]

    before, found = everything(), []
    for ema, fails in itertools.product((False, True), (False, True)):
        with suppress(ZeroDivisionError), engine.evaluation_mode(ema=ema):
            assert not any(module.training for module in engine.model.modules())
            logits = engine.model(images).numpy()
            found += [] if fails else [logits]
            _ = 1 / (not fails)
        assert all(module.training for module in engine.model.modules())
        assert torch.is_grad_enabled()
        assert same(before, everything())
    return found


def write(folder, jobs):
    """Each: evaluate, train, evaluate, save, train on with a step left out; losses and logits."""
    from scale_mae.distributed.process_group import process_group

    gc.freeze()
    told = {}
    with process_group() as ranks:
        for job in jobs:
            layout, precision, lars = job
            config = make_config(folder, layout, precision, lars=lars)
            engine = build(config, ranks)
            logits = evaluate(engine, ranks)
            losses = train(engine, ranks, config, range(SAVED))
            logits += evaluate(engine, ranks)
            engine.save(folder / "-".join(map(str, (*job, ranks.size))), {})
            losses += train(engine, ranks, config, range(SAVED, STEPS))
            after, skipped = copies(engine, ranks), engine.skipped_steps
            assert precision == "fp16" or not skipped
            train(engine, ranks, config, [STEPS], bad=STEPS)
            assert same(after, copies(engine, ranks))
            assert engine.skipped_steps == skipped + 1
            told[job] = losses, logits
    return told


def expected_groups(lars):
    if lars:
        return [(0.0, 1.0), (1e-4, 1.0), (1e-4, 2.0)]
    scales = [0.65**above for above in range(5, 0, -1)]
    return [*((0.0, scale) for scale in (*scales, 1.0)), *((0.05, scale) for scale in (*scales, 2.0))]


def read(folder, jobs):
    """Load each source as another layout, save at once, evaluate, train on; losses and logits."""
    from scale_mae.distributed.process_group import process_group

    gc.freeze()
    told = []
    with process_group() as ranks:
        for source, target, layout, precision, lars in jobs:
            config = make_config(folder, layout, precision, micro_batch=BATCH // ranks.size, lars=lars)
            engine = build(config, ranks)
            engine.load(folder / source)
            engine.save(folder / target, {})
            logits = evaluate(engine, ranks)
            scales = sorted((group["weight_decay"], group["lr_scale"]) for group in engine._optimizer.param_groups)
            assert scales == expected_groups(lars)
            told.append((train(engine, ranks, config, range(SAVED, STEPS)), logits))
    return told


WRITTEN = [
    *((layout, "fp32", False) for layout in ("zero0", "zero1", "zero2", "zero3", "pieces", "whole", "zero3_offload")),
    *((layout, "bf16", False) for layout in ("zero0", "zero2", "zero3")),
    ("zero0", "fp16", False),
    ("zero2", "fp16", False),
    *(("zero0", precision, True) for precision in ("fp32", "bf16", "fp16")),
]
ON_ONE = [(f"zero{stage}", "fp32", False) for stage in range(4)]
HOPS = {  # (written as, by so many ranks, read as)
    2: [("zero0", 1, "zero3"), ("zero3", 1, "zero2"), ("zero2", 1, "zero0"), ("pieces", 2, "zero1"), ("zero1", 2, "pieces")],
    1: [("zero3", 2, "zero0"), ("zero1", 2, "zero3"), ("zero3_offload", 2, "zero2"), ("zero0", 2, "zero1")],
}
IN_16_BIT = [("zero0", "zero3", "bf16"), ("zero3", "zero2", "bf16"), ("zero2", "zero0", "fp16"), ("zero0", "zero2", "fp16")]


@functools.cache
def plain(lars):
    """Losses of PyTorch alone, and its weights and their average at the time of saving."""
    model = SmallClassifier(scales=SCALES)
    groups = []
    for name, p in model.named_parameters():
        layer = {"blocks": 1, "fc_norm": 5, "head": 5}.get(name.split(".")[0], 0)
        layer += int(name.split(".")[1]) if layer == 1 else 0
        decays = p.ndim > 1 and name not in ("cls_token", "pos_embed")
        scale = SCALES.get(name, 1.0) * (1.0 if lars else 0.65 ** (5 - layer))
        groups.append({"params": [p], "weight_decay": (1e-4 if lars else 0.05) * decays, "scale": scale})
    of_lars = {"momentum": 0.9, "trust_coefficient": 0.1}
    optimizer = optimizers.LARS(groups, **of_lars) if lars else torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.95))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        loss = model(*labelled(step)).loss
        optimizer.zero_grad()
        loss.backward()
        for group in groups:
            group["lr"] = RATES[step] * group["scale"]
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
def moved(written):
    folder, _ = written
    told = {}
    for size, hops in HOPS.items():
        jobs = [(f"{one}-fp32-False-{by}", f"{one}-{other}@{size}", other, "fp32", False) for one, by, other in hops]
        if size == 2:
            jobs += [(f"{one}-{p}-False-2", f"{one}-{other}@2{p}", other, p, False) for one, other, p in IN_16_BIT]
            jobs += [(f"zero0-{p}-True-2", f"lars@2{p}", "zero0", p, True) for p in ("fp32", "bf16", "fp16")]
        told |= dict(zip([(*job[:2], *job[3:]) for job in jobs], run_ranks(size, read, folder, jobs)[0], strict=True))
    return told


def test_every_stage_gives_the_losses_of_plain_pytorch_with_rates_by_layer(written):
    for told in written[1].values():
        for (layout, precision, lars), (losses, _) in told.items():
            rtol = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 1.0}[precision]  # fp16 leaves steps out as it finds its scale
            np.testing.assert_allclose(losses, plain(lars)[0], rtol=rtol, err_msg=f"{layout} {precision} {lars}")


def test_the_average_is_that_of_plain_pytorch_and_what_is_evaluated(written):
    folder, by_size = written
    fresh = SmallClassifier().eval()
    for size, told in by_size.items():
        for (layout, precision, lars), (_, (first, first_ema, last, last_ema)) in told.items():
            reader = ZeroReader(folder / f"{layout}-{precision}-{lars}-{size}" / DEEPSPEED_TAG)
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
            assert np.array_equal(first, first_ema)
            assert np.abs(last - last_ema).max() > 1e-3
            for key, logits in (("fp32", last), ("ema", last_ema)):
                model = copy.deepcopy(fresh)
                for name, p in model.named_parameters():
                    p.data = reader.flat(name, key).reshape(p.shape).clone()
                expected = model.to(dtype)(labelled(99)[0]).detach().numpy()
                np.testing.assert_allclose(
                    logits, expected, atol=1e-5 if precision == "fp32" else 1e-2, err_msg=f"{layout} {precision} {key}"
                )
            if precision == "fp32":
                for name, average in plain(lars)[1].items():
                    torch.testing.assert_close(reader.flat(name, "ema").reshape(average.shape), average, atol=2e-5, rtol=1e-4)


def test_other_stages_and_ranks_resume_with_average_and_rates(written, moved):
    folder, by_size = written
    for (source, target, precision, lars), (losses, logits) in moved.items():
        one, other = ZeroReader(folder / source / DEEPSPEED_TAG), ZeroReader(folder / target / DEEPSPEED_TAG)
        for name, key in itertools.product(one.parameters, OPTIMIZER[lars]):
            assert torch.equal(one.flat(name, key), other.flat(name, key)), (target, name, key)
        assert sorted(g["lr_scale"] for g in other.groups)[-1] == 2.0
        layout, size = source.split("-")[0], int(source[-1])
        straight, (_, _, *expected) = by_size[size][layout, precision, lars]
        # scalers of fp16 differ from stage to stage in when they leave steps out
        rtol = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 1.0}[precision]
        np.testing.assert_allclose(losses, straight[SAVED:], rtol=rtol, err_msg=target)
        np.testing.assert_allclose(logits, expected, atol=1e-5 if precision == "fp32" else 5e-2)
        if lars:  # the same ranks and stage
            assert losses == straight[SAVED:]


def missing(folder, source):
    from scale_mae.distributed.process_group import process_group

    with process_group() as ranks:
        config = make_config(folder, "zero1")
        engine = build(config, ranks)
        before = copies(engine, ranks)
        try:
            engine.load(folder / source)
        finally:
            assert same(before, copies(engine, ranks))


def test_a_checkpoint_of_another_optimizer_is_refused_before_anything_changes(written):
    with pytest.raises(RankError, match=r"its optimizer has no state exp_avg for ") as caught:
        run_ranks(1, missing, written[0], "zero0-fp32-True-2")
    assert caught.value.kinds == ["CheckpointError"]


def count_waits(folder):
    from scale_mae.distributed.process_group import process_group

    counts = []
    with process_group() as ranks:
        for layout in ("zero1", "zero2"):
            engine = build(make_config(folder, layout, "bf16", micro_batch=BATCH), ranks)
            for step in range(3):
                with Waits() as waits:
                    engine.forward_backward(*labelled(step))
                    engine.step(1e-3)
            counts.append(waits.count)
        with (
            pytest.raises(ValueError, match=r"optim\.ema"),
            build(make_config(folder, "zero2", ema=None), ranks).evaluation_mode(True),
        ):
            pass
    return counts


def test_the_average_lets_the_host_go_on(tmp_path):
    assert run_ranks(1, count_waits, tmp_path)[0] == [0, 0]
